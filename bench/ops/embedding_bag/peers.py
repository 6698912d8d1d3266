"""Embedding bags: the sides of a comparison, recsys_kernels and every library a user might run instead.

Peers with float tables share the workload's table; peers with quantized tables quantize that table themselves. Every
side gets input in the format that suits the side best, converted outside of the timed part. FBGEMM's bounds check is
off (ours has no such switch). Sides with many tables return one tensor, [batch, tables * dim]: a peer that makes a
tensor for each table concatenates.

FBGEMM loads beside torch 2.13 as `pip install --no-deps fbgemm-gpu-cpu==1.8.0`. TorchRec needs FBGEMM and is installed
with --no-deps too, because TorchRec requires the CUDA build: torchrec==1.8.0 tensordict pyvers torchmetrics==1.0.3
lightning-utilities pyre-extensions typing-inspect.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recsys_kernels as rk
from bench.core import probe
from bench.core.sides import ONE_THREAD, OURS, REFERENCE, Side, import_peer
from bench.ops.embedding_bag.cases import BITS, TORCH, Batch, EmbeddingBagCase, EmbeddingBagWorkload
from recsys_kernels.backends import selection

FBGEMM = "fbgemm IntNBit"
FBGEMM_SPLIT = "fbgemm Split"
TORCHREC = "torchrec"


def _gradient(name: str, bag: nn.EmbeddingBag, work: EmbeddingBagWorkload) -> Side:
    grad_output = work.grad_output

    def forward(batch: Batch) -> Any:
        return bag(batch.indices.clone(), batch.offsets)

    def backward(output: Tensor) -> Tensor:
        return torch.autograd.grad(output, bag.weight, grad_output)[0]

    return Side(name, backward, forward, work.case.threads, torch.enable_grad)


def _bag_options(case: EmbeddingBagCase) -> dict[str, Any]:
    return {"mode": "sum", "include_last_offset": True, "sparse": case.kind == "sparse backward"}


def ours(work: EmbeddingBagWorkload) -> Side:
    """The module a user would take, with tables of its own (on huge pages where the system gives them)."""
    case, table = work.case, work.table
    bits = BITS[case.dtype]
    module: Any
    if case.tables > 1:
        configs = [rk.EmbeddingBagConfig(f"t{t}", case.rows, case.dim) for t in range(case.tables)]
        module = rk.EmbeddingBagCollection(configs, weight_dtype=table.dtype)
        with torch.no_grad():
            for t in range(case.tables):
                module.table(f"t{t}").copy_(table[t])
        module = module if bits >= 16 else module.quantize(bits)
    elif bits < 16:
        module = rk.QuantizedEmbeddingBag.from_float(_torch_bag(work, 0), bits=bits)
    else:
        module = rk.EmbeddingBag(case.rows, case.dim, dtype=table.dtype, **_bag_options(case))
        with torch.no_grad():
            module.weight.copy_(table[0])
    if case.kind != "forward":
        return _gradient(OURS, module, work)
    if case.tables > 1 or case.level == "module":
        return Side(OURS, lambda inputs: module(*inputs), threads=case.threads)
    # The function or the operator, as torch's side is one.
    if bits >= 16:
        weight = module.weight.detach()

        def lookup(inputs: Any) -> Tensor:
            return rk.functional.embedding_bag(inputs[0], weight, inputs[1], mode="sum", include_last_offset=True)

        return Side(OURS, lookup, threads=case.threads)
    table = module.table

    def operator(inputs: Any) -> Tensor:
        run = selection.implementation("quantized_embedding_bag", inputs[0])
        return cast(Tensor, run(*table, *inputs, None, 0, -1, True, selection.dtype_argument(torch.float32)))

    return Side(OURS, operator, threads=case.threads)


def _torch_bag(work: EmbeddingBagWorkload, table: int) -> nn.EmbeddingBag:
    frozen = work.case.kind == "forward"
    return nn.EmbeddingBag.from_pretrained(work.table[table], freeze=frozen, **_bag_options(work.case))


def _torch_quantized_bag(work: EmbeddingBagWorkload) -> nn.Module:
    case, (low, high) = work.case, torch.aminmax(work.table[0], dim=1)
    module: Any = importlib.import_module("torch.ao.nn.quantized")
    bag = module.EmbeddingBag(case.rows, case.dim, mode="sum", include_last_offset=True, dtype=torch.quint8)
    # One grid a row, from its lowest value to its highest.
    scale = (high - low) / 255
    bag.set_weight(torch.quantize_per_channel(work.table[0], scale, -low / scale, 0, torch.quint8))
    return cast(nn.Module, bag)


def _torch(work: EmbeddingBagWorkload) -> Side:
    case = work.case
    if case.kind != "forward":
        return _gradient(TORCH, _torch_bag(work, 0), work)
    if case.tables > 1:
        bags = [_torch_bag(work, t) for t in range(case.tables)]

        def split(batch: Batch) -> Any:
            return [(ids.clone(), batch.offsets[: case.batch + 1]) for ids in batch.indices.chunk(case.tables)]

        def loop(inputs: Any) -> Tensor:
            return torch.cat([bag(*pair) for bag, pair in zip(bags, inputs, strict=True)], 1)

        return Side(TORCH, loop, split, case.threads)
    if case.level == "module":
        bag = _torch_bag(work, 0) if BITS[case.dtype] >= 16 else _torch_quantized_bag(work)
        return Side(TORCH, lambda inputs: bag(*inputs), threads=case.threads)
    if BITS[case.dtype] >= 16:
        weight = work.table[0]

        def lookup(inputs: Any) -> Tensor:
            return F.embedding_bag(inputs[0], weight, inputs[1], mode="sum", include_last_offset=True)

        return Side(TORCH, lookup, threads=case.threads)
    kind = "byte" if BITS[case.dtype] == 8 else "4bit"
    packed = getattr(torch.ops.quantized, f"embedding_bag_{kind}_prepack")(work.table[0])
    op = getattr(torch.ops.quantized, f"embedding_bag_{kind}_rowwise_offsets").default
    return Side(TORCH, lambda inputs: op(packed, *inputs, include_last_offset=True), threads=case.threads)


@functools.cache
def _fbgemm() -> SimpleNamespace:
    base = "fbgemm_gpu.split_table_batched_embeddings_ops"
    modules = (f"{base}_inference", f"{base}_training", f"{base}_common", "fbgemm_gpu.split_embedding_configs")
    names = {key: value for module in import_peer(*modules) for key, value in vars(module).items()}
    return SimpleNamespace(**{key: value for key, value in names.items() if not key.startswith("__")})


def _int32(batch: Batch) -> Any:
    return batch.indices.int(), batch.offsets.int()  # the type FBGEMM's inference tables work with


def _fbgemm_inference(work: EmbeddingBagWorkload) -> Side:
    fb, case = _fbgemm(), work.case
    weights, output = (
        getattr(fb.SparseType, t) for t in (case.dtype.upper(), "FP16" if case.dtype == "fp16" else "FP32")
    )
    module = fb.IntNBitTableBatchedEmbeddingBagsCodegen(
        [(f"t{t}", case.rows, case.dim, weights, fb.EmbeddingLocation.HOST) for t in range(case.tables)],
        device="cpu",
        output_dtype=output,
        bounds_check_mode=fb.BoundsCheckMode.NONE,
        row_alignment=1,
    )
    if BITS[case.dtype] >= 16:  # what initialize_weights does, without a second copy of the tables
        module.weights_host = work.table.view(-1).view(torch.uint8)
        module.initialize_logical_weights_placements_and_offsets()
        module.weight_initialized = True
    else:
        module.initialize_weights()
        for chunk, rows, params in zip(
            *(x.split(1 << 16) for x in (work.table[0], *module.split_embedding_weights()[0])), strict=True
        ):
            packed = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(chunk, BITS[case.dtype])
            rows.copy_(packed[:, :-4])
            params.copy_(packed[:, -4:])
    return Side(FBGEMM, lambda inputs: module(*inputs), _int32, case.threads)


def _fbgemm_training(work: EmbeddingBagWorkload) -> Side:
    fb, case = _fbgemm(), work.case
    precision = getattr(fb.SparseType, case.dtype.upper())
    module = fb.SplitTableBatchedEmbeddingBagsCodegen(
        [(case.rows, case.dim, fb.EmbeddingLocation.HOST, fb.ComputeDevice.CPU)] * case.tables,
        weights_precision=precision,
        output_dtype=precision,
        bounds_check_mode=fb.BoundsCheckMode.NONE,
        device=torch.device("cpu"),
        preallocated_host_buffers={"weights": work.table.view(-1)},
    )
    # its operators have no kernel for inference mode
    return Side(FBGEMM_SPLIT, lambda inputs: module(*inputs), threads=case.threads, context=torch.no_grad)


def _torchrec(work: EmbeddingBagWorkload) -> Side:
    case = work.case
    torchrec: Any = import_peer("torchrec")[0]
    names = [f"f{t}" for t in range(case.tables)]
    configs = [
        torchrec.EmbeddingBagConfig(
            name=f"t{t}", num_embeddings=case.rows, embedding_dim=case.dim, feature_names=[names[t]]
        )
        for t in range(case.tables)
    ]
    module = torchrec.EmbeddingBagCollection(configs, device=torch.device("meta"))
    for t in range(case.tables):
        module.embedding_bags[f"t{t}"].weight = nn.Parameter(work.table[t], requires_grad=False)

    def jagged(batch: Batch) -> Any:
        return torchrec.KeyedJaggedTensor(names, batch.indices.clone(), offsets=batch.offsets)

    return Side(TORCHREC, lambda features: module(features).values(), jagged, case.threads)


PEERS: dict[str, Callable[[EmbeddingBagWorkload], Side]] = {
    TORCH: _torch,
    FBGEMM: _fbgemm_inference,
    FBGEMM_SPLIT: _fbgemm_training,
    TORCHREC: _torchrec,
}


def sides_of(case: EmbeddingBagCase) -> list[str]:
    """The names of the sides that a case is compared with."""
    if case.kind != "forward":
        return [TORCH]
    split = [FBGEMM_SPLIT] if BITS[case.dtype] >= 16 else []
    torchrec = [TORCHREC] if case.tables > 1 else []
    return [TORCH, FBGEMM, *split, *torchrec, ONE_THREAD if case.threads > 1 else REFERENCE]


def limit(work: EmbeddingBagWorkload) -> probe.ReadLimit | None:
    """The rate at which the rows of a forward case could be read. Raises ProbeUnavailableError."""
    case = work.case
    if case.kind != "forward":
        return None
    return probe.probe_reads(work.probe_ids().numpy(), case.tables * case.rows, case.row_bytes, case.threads)
