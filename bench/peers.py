"""Embedding bags: the sides of a comparison, recsys_kernels and every library a user might run instead.

A builder takes a Workload and returns a Side, or raises AbsentError with the reason. Float peers share the workload's
table, quantized ones quantize it themselves. Every side gets its input in the format it likes best, converted outside
the timed part; FBGEMM's bounds check is off (ours has no such switch). Many-table sides return one tensor,
[batch, tables * dim]: peers that make one a table concatenate.

FBGEMM loads beside torch 2.13 as `pip install --no-deps fbgemm-gpu-cpu==1.8.0`. TorchRec stands on it and goes in with
--no-deps too, because it requires the CUDA build of FBGEMM: torchrec==1.8.0 tensordict pyvers torchmetrics==1.0.3
lightning-utilities pyre-extensions typing-inspect.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recsys_kernels as rk
from bench import probe
from bench.cases import BITS, LOOP, Batch, Case, Workload
from bench.sides import ONE_THREAD, OURS, REFERENCE, AbsentError, Side
from recsys_kernels.backends import selection as _backends

FBGEMM = "fbgemm IntNBit"
FBGEMM_SPLIT = "fbgemm Split"
TORCHREC = "torchrec"


def _gradient(name: str, bag: nn.EmbeddingBag, work: Workload) -> Side:
    grad_output = work.grad_output

    def forward(batch: Batch) -> Any:
        return bag(batch.indices.clone(), batch.offsets)

    def backward(output: Tensor) -> Tensor:
        return torch.autograd.grad(output, bag.weight, grad_output)[0]

    return Side(name, backward, forward, work.case.threads, torch.enable_grad)


def _bag_options(case: Case) -> dict[str, Any]:
    return {"mode": "sum", "include_last_offset": True, "sparse": case.kind == "sparse backward"}


def ours(work: Workload) -> Side:
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
        run = _backends.implementation("quantized_embedding_bag", inputs[0])
        return cast(Tensor, run(*table, *inputs, None, 0, -1, True, _backends.dtype_argument(torch.float32)))

    return Side(OURS, operator, threads=case.threads)


def _torch_bag(work: Workload, table: int) -> nn.EmbeddingBag:
    frozen = work.case.kind == "forward"
    return nn.EmbeddingBag.from_pretrained(work.table[table], freeze=frozen, **_bag_options(work.case))


def _torch_quantized_bag(work: Workload) -> nn.Module:
    case, (low, high) = work.case, torch.aminmax(work.table[0], dim=1)
    module: Any = importlib.import_module("torch.ao.nn.quantized")
    bag = module.EmbeddingBag(case.rows, case.dim, mode="sum", include_last_offset=True, dtype=torch.quint8)
    # One grid a row, from its lowest value to its highest.
    scale = (high - low) / 255
    bag.set_weight(torch.quantize_per_channel(work.table[0], scale, -low / scale, 0, torch.quint8))
    return cast(nn.Module, bag)


def _torch(work: Workload) -> Side:
    case = work.case
    if case.kind != "forward":
        return _gradient(LOOP, _torch_bag(work, 0), work)
    if case.tables > 1:
        bags = [_torch_bag(work, t) for t in range(case.tables)]

        def split(batch: Batch) -> Any:
            return [(ids.clone(), batch.offsets[: case.batch + 1]) for ids in batch.indices.chunk(case.tables)]

        def loop(inputs: Any) -> Tensor:
            return torch.cat([bag(*pair) for bag, pair in zip(bags, inputs, strict=True)], 1)

        return Side(LOOP, loop, split, case.threads)
    if case.level == "module":
        bag = _torch_bag(work, 0) if BITS[case.dtype] >= 16 else _torch_quantized_bag(work)
        return Side(LOOP, lambda inputs: bag(*inputs), threads=case.threads)
    if BITS[case.dtype] >= 16:
        weight = work.table[0]

        def lookup(inputs: Any) -> Tensor:
            return F.embedding_bag(inputs[0], weight, inputs[1], mode="sum", include_last_offset=True)

        return Side(LOOP, lookup, threads=case.threads)
    kind = "byte" if BITS[case.dtype] == 8 else "4bit"
    packed = getattr(torch.ops.quantized, f"embedding_bag_{kind}_prepack")(work.table[0])
    op = getattr(torch.ops.quantized, f"embedding_bag_{kind}_rowwise_offsets").default
    return Side(LOOP, lambda inputs: op(packed, *inputs, include_last_offset=True), threads=case.threads)


@functools.cache
def _fbgemm() -> SimpleNamespace:
    base = "fbgemm_gpu.split_table_batched_embeddings_ops"
    modules = (f"{base}_inference", f"{base}_training", f"{base}_common", "fbgemm_gpu.split_embedding_configs")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            names = [vars(importlib.import_module(name)) for name in modules]
    except (ImportError, OSError) as error:  # OSError: built for another torch, undefined symbols
        raise AbsentError(f"fbgemm_gpu: {error}") from error
    return SimpleNamespace(**{key: value for part in names for key, value in part.items() if not key.startswith("__")})


def _int32(batch: Batch) -> Any:
    return batch.indices.int(), batch.offsets.int()  # the type FBGEMM's inference tables work with


def _fbgemm_inference(work: Workload) -> Side:
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


def _fbgemm_training(work: Workload) -> Side:
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


def _torchrec(work: Workload) -> Side:
    case = work.case
    try:
        torchrec: Any = importlib.import_module("torchrec")
    except (ImportError, OSError) as error:
        raise AbsentError(f"torchrec: {error}") from error
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


_PEERS: dict[str, Callable[[Workload], Side]] = {
    LOOP: _torch,
    FBGEMM: _fbgemm_inference,
    FBGEMM_SPLIT: _fbgemm_training,
    TORCHREC: _torchrec,
}


@contextmanager
def _reference() -> Iterator[None]:
    with torch.inference_mode(), rk.backend("reference"):
        yield


def sides_of(case: Case) -> list[str]:
    """Names of the sides to compare `case` with. Those in OWN are variants of our own side, not peers."""
    if case.kind != "forward":
        return [LOOP]
    split = [FBGEMM_SPLIT] if BITS[case.dtype] >= 16 else []
    torchrec = [TORCHREC] if case.tables > 1 else []
    return [LOOP, FBGEMM, *split, *torchrec, ONE_THREAD if case.threads > 1 else REFERENCE]


def build(name: str, work: Workload, own: Side) -> Side:
    """Side `name` of a case; `own` is what `ours` returned for it. Raises AbsentError where it cannot run."""
    if name == ONE_THREAD:
        return replace(own, name=name, threads=1)
    if name == REFERENCE:
        return replace(own, name=name, context=_reference)
    return _PEERS[name](work)


def limit(work: Workload) -> probe.Limit | None:
    """What the rows of a forward case could be read at. Raises ProbeUnavailableError."""
    case = work.case
    if case.kind != "forward":
        return None
    return probe.probe(work.probe_ids().numpy(), case.tables * case.rows, case.row_bytes, case.threads)
