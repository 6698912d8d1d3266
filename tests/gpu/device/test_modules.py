"""The modules on the device beside torch's own, forwards and backwards, eager and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import recsys_kernels as rk
from recsys_kernels.testing import assert_matches

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def bags(device: torch.device, rows: int = 200, count: int = 3000) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(8)
    indices = torch.randint(0, rows, (count,), generator=rng)
    offsets = torch.cat([torch.zeros(3), torch.randint(0, count, (250,), generator=rng).sort().values]).long()
    return indices.to(device), offsets.to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_embedding_bag(device: torch.device, mode: str, dtype: torch.dtype, padding_idx: int | None) -> None:
    torch.manual_seed(9)
    ours = rk.EmbeddingBag(200, 72, mode=mode, padding_idx=padding_idx, dtype=dtype, device=device)
    exact = torch.nn.EmbeddingBag(200, 72, mode=mode, padding_idx=padding_idx, dtype=torch.float64)
    exact.load_state_dict(ours.state_dict())
    indices, offsets = bags(device)
    out, wanted = ours(indices, offsets), exact(indices.cpu(), offsets.cpu())
    assert out.device.type == device.type
    assert_matches(out, wanted)
    grad = torch.randn(out.shape, dtype=torch.float64).to(dtype)
    out.backward(grad.to(device))
    wanted.backward(grad.double())
    assert ours.weight.grad is not None
    assert_matches(ours.weight.grad, exact.weight.grad)
    with torch.no_grad():
        assert torch.equal(ours(indices, offsets), out)


def test_gradient_of_weights(device: torch.device) -> None:
    torch.manual_seed(10)
    indices, offsets = bags(device)
    weight = torch.randn(200, 40, device=device, requires_grad=True)
    factors = torch.randn(indices.shape, device=device, requires_grad=True)
    out = rk.functional.embedding_bag(indices, weight, offsets, mode="sum", per_sample_weights=factors)
    out.square().sum().backward()
    exact, own = (t.detach().cpu().double().requires_grad_() for t in (weight, factors))
    wanted = torch.nn.functional.embedding_bag(indices.cpu(), exact, offsets.cpu(), mode="sum", per_sample_weights=own)
    wanted.square().sum().backward()
    for ours, theirs in ((out, wanted), (weight.grad, exact.grad), (factors.grad, own.grad)):
        assert ours is not None
        assert_matches(ours, theirs)


def test_sparse_gradient(device: torch.device) -> None:
    torch.manual_seed(11)
    indices, offsets = bags(device)
    ours = rk.EmbeddingBag(200, 16, mode="mean", sparse=True, device=device)
    theirs = torch.nn.EmbeddingBag(200, 16, mode="mean", sparse=True, device=device)
    theirs.load_state_dict(ours.state_dict())
    for bag in (ours, theirs):
        bag(indices, offsets).square().sum().backward()
    assert_matches(ours.weight.grad.to_dense(), theirs.weight.grad.to_dense())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_quantized(device: torch.device, mode: str, bits: int) -> None:
    torch.manual_seed(12)
    bag = torch.nn.EmbeddingBag(200, 50, mode=mode)
    on_cpu = rk.QuantizedEmbeddingBag.from_float(bag, bits)
    indices, offsets = bags(device)
    for ours in (on_cpu.to(device), rk.QuantizedEmbeddingBag.from_float(bag.to(device), bits)):
        assert_matches(ours(indices, offsets), ours.to_float()(indices, offsets))
        for key, value in ours.state_dict().items():
            assert torch.equal(value.cpu(), on_cpu.state_dict()[key].cpu()), key


def collection(device: torch.device) -> rk.EmbeddingBagCollection:
    Config = rk.EmbeddingBagConfig
    tables = [Config("a", 300, 64, ["x", "y"]), Config("b", 70, 33, pooling="mean"), Config("c", 90, 16, pooling="max")]
    return rk.EmbeddingBagCollection(tables).to(device)


def jagged(device: torch.device, batch: int = 37) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(13)
    offsets = torch.cat([torch.zeros(1), torch.randint(0, 9, (4 * batch,), generator=rng).cumsum(0)]).long()
    indices = torch.randint(0, 70, (int(offsets[-1]),), generator=rng)
    return indices.to(device), offsets.to(device)


def expected(
    module: rk.EmbeddingBagCollection, indices: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, list[torch.nn.EmbeddingBag]]:
    """The same by torch's modules in float64 on the CPU, and these."""
    bags = []
    for bag in module.embedding_bags.values():
        plain = bag.to_float() if isinstance(bag, rk.QuantizedEmbeddingBag) else bag
        shape = (plain.num_embeddings, plain.embedding_dim)
        bags.append(torch.nn.EmbeddingBag(*shape, mode=plain.mode, include_last_offset=True, dtype=torch.float64))
        bags[-1].load_state_dict({"weight": plain.weight.detach().cpu().double()})
    a, b, c = bags
    batch = (offsets.numel() - 1) // 4
    parts = []
    for feature, bag in enumerate((a, a, b, c)):
        bounds = offsets[feature * batch : (feature + 1) * batch + 1].cpu()
        parts.append(bag(indices[bounds[0] : bounds[-1]].cpu(), bounds - bounds[0]))
    return torch.cat(parts, 1), bags


def assert_gradients_match(module: torch.nn.Module, bags: list[torch.nn.EmbeddingBag]) -> None:
    for parameter, bag in zip(module.parameters(), bags, strict=True):
        assert parameter.grad is not None
        assert_matches(parameter.grad, bag.weight.grad)


@pytest.mark.parametrize("bits", [None, 8, 4, {"a": 8, "b": 4}], ids=str)
def test_collection(device: torch.device, bits: Any) -> None:
    torch.manual_seed(14)
    module, (indices, offsets) = collection(device), jagged(device)
    if bits is not None:
        module = module.quantize(bits)
    out = module(indices, offsets)
    wanted, bags = expected(module, indices, offsets)
    assert_matches(out, wanted)
    if bits is None:
        out.square().sum().backward()
        wanted.square().sum().backward()
        assert_gradients_match(module, bags)


def test_compiled(device: torch.device) -> None:
    module, (indices, offsets) = collection(device), jagged(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    out = compiled(indices, offsets)
    wanted, bags = expected(module, indices, offsets)
    assert_matches(out, wanted)
    out.square().sum().backward()
    wanted.square().sum().backward()
    assert_gradients_match(module, bags)


def test_opcheck(device: torch.device) -> None:
    """torch's own checks of what the dispatcher picks for this device."""
    weight, scales = torch.randn(20, 24, device=device), torch.ones(20, 2, dtype=torch.float16, device=device)
    rows = torch.randint(0, 255, (20, 24), dtype=torch.uint8, device=device)
    indices, offsets = torch.arange(12, device=device), torch.tensor([0, 3, 3, 12], device=device)
    rest, ops = (None, 0, -1, True), torch.ops.recsys_kernels
    plan = torch.tensor([[0, 24, 0, 0, 0, 0], [1, 24, 24, 1, 8, -2], [0, 24, 48, 2, 0, 0]], device=device)
    empty, options = scales[:0], (72, torch.float32)
    for operator, args in (
        (ops.embedding_bag, (weight, indices, offsets, *rest)),
        (ops.embedding_bag_max, (weight, indices, offsets, -1, True, True)),
        (ops.embedding_bag_backward, (weight[:3].contiguous(), indices, offsets, *rest, 20)),
        (ops.embedding_bag_weights_backward, (weight[:3].contiguous(), weight, indices, offsets, 0, -1, True)),
        (ops.quantized_embedding_bag, (rows, scales, -2, 24, 8, indices, offsets, *rest, torch.float32)),
        (ops.embedding_bag_collection, ([weight, rows], [empty, scales], plan, indices, offsets, None, *options)),
    ):
        torch.library.opcheck(operator.default, args)
