"""Quantized tables whose ``weight`` reads as floats."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import recsys_kernels as rk
from recsys_kernels.ops.embedding_bag.dequantizing import (
    DequantizedWeight,
    DequantizingEmbedding,
    DequantizingEmbeddingBag,
)

ROWS, DIM = 50, 16


def table(bits: int = 8) -> Any:
    torch.manual_seed(0)
    return DequantizingEmbedding.from_float(nn.Embedding(ROWS, DIM), bits)


def values(module: Any) -> torch.Tensor:
    """The table from the documented format."""
    q = module.state_dict()["weight"].long()
    if module.bits == 4:
        q = torch.stack((q & 15, q >> 4), dim=2).flatten(1)
    scale, bias = module.scale_bias.double().unbind(1)
    return ((q * scale[:, None] + bias[:, None]) * 2.0 ** int(module.exponent)).float()


READS: dict[str, Callable[[Any], Any]] = {
    "matmul": lambda w: torch.ones(3, DIM) @ w.T,
    "transpose": lambda w: torch.matmul(torch.ones(3, DIM), w.transpose(0, 1)),
    "linear": lambda w: F.linear(torch.ones(3, DIM), w),
    "cat": lambda w: torch.cat([w, w]),
    "split": lambda w: torch.cat(torch.split(w, [20, 30])),
    "broadcast": lambda w: torch.ones(2, 1, DIM) - w,
    "left": lambda w: w * 2,
    "right": lambda w: 2 * w,
    "slice": lambda w: w[3:9:2],
    "all but the first": lambda w: w[1:],
    "columns": lambda w: w[:, :3],
    "row": lambda w: w[-1],
    "one value": lambda w: w[0, 1],
    "ids": lambda w: w[torch.tensor([[1, -1], [0, 5]])],
    "int32 ids": lambda w: w[torch.tensor([1, 2], dtype=torch.int32)],
    "scalar id": lambda w: w[torch.tensor(7)],
    "mask": lambda w: w[torch.arange(ROWS) % 2 == 0],
    "index_select": lambda w: torch.index_select(w, 0, torch.tensor([3, 4])),
    "embedding": lambda w: F.embedding(torch.tensor([[1, 2]]), w),
    "embedding with max_norm": lambda w: F.embedding(torch.tensor([[1, 2]]), w, max_norm=0.5),
    "embedding_bag": lambda w: F.embedding_bag(torch.tensor([[1, 2]]), w),
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data[2:4],
    "half": lambda w: w.to(torch.float16),
    "zeros_like": torch.zeros_like,
    "deepcopy": copy.deepcopy,
    "numpy": lambda w: torch.from_numpy(w.numpy()),
    "rows": lambda w: torch.stack([row.sum() for row in w]),
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", READS)
def test_reads_are_those_of_a_plain_tensor(name: str, bits: int) -> None:
    module = table(bits)
    out = READS[name](module.weight)
    assert type(out) is torch.Tensor
    torch.testing.assert_close(out, READS[name](values(module)), rtol=1e-5, atol=1e-5)


def test_sizes_and_types_dequantize_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = table()

    def dequantize(self: Any) -> torch.Tensor:
        raise AssertionError("dequantized")

    monkeypatch.setattr(rk.QuantizedEmbedding, "dequantize", dequantize)
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.shape, weight.size(0), weight.dim(), len(weight)) == ((ROWS, DIM), ROWS, 2, ROWS)
    assert (weight.dtype, weight.device.type, weight.requires_grad) == (torch.float32, "cpu", False)
    assert weight.is_floating_point()
    assert weight[torch.tensor([4])].shape == (1, DIM)  # a lookup of some rows does neither
    with pytest.raises(AssertionError, match="dequantized"):
        weight.sum()


WRITES: dict[str, Callable[[Any], Any]] = {
    "mul_": lambda w: w.mul_(2),
    "copy_": lambda w: w.copy_(torch.ones(ROWS, DIM)),
    "setitem": lambda w: w.__setitem__(0, 1.0),
    "iadd": lambda w: w.__iadd__(1),
    "data": lambda w: w.data.normal_(),
    "set data": lambda w: setattr(w, "data", torch.ones(1)),
    "init": nn.init.normal_,
    "out": lambda w: torch.add(torch.ones(ROWS, DIM), 1, out=w),
    "requires_grad_": lambda w: w.requires_grad_(True),
    "operator": lambda w: torch.ops.aten.mul_.Tensor(w, 2),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_are_refused(name: str) -> None:
    module = table()
    before = values(module)
    with pytest.raises(RuntimeError, match=r"computed from quantized rows at every read, so it cannot be written to"):
        WRITES[name](module.weight)
    assert torch.equal(values(module), before)


def test_gradients_flow_past_the_weight() -> None:
    module, x = table(), torch.randn(3, DIM, requires_grad=True)
    (x @ module.weight.T).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, values(module).sum(0).expand(3, DIM))


@pytest.mark.parametrize("index", [torch.tensor([ROWS]), torch.tensor([-ROWS - 1])])
def test_wrong_indices(index: torch.Tensor) -> None:
    with pytest.raises(IndexError):
        table().weight[index]
    with pytest.raises((IndexError, RuntimeError)):
        F.embedding(index, table().weight)


def test_state_copies_and_moves() -> None:
    module = table()
    plain = rk.QuantizedEmbedding(ROWS, DIM)
    plain.load_state_dict(module.state_dict())
    assert torch.equal(plain.dequantize(), module.weight + 0)
    other = table()
    other.load_state_dict(plain.state_dict())
    for twin in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin.weight + 0, values(module))
        assert torch.equal(twin(torch.arange(4)), module(torch.arange(4)))
    assert list(module.state_dict()) == ["weight", "scale_bias", "exponent"]
    assert module.state_dict()["weight"].dtype == torch.uint8
    assert module.nbytes == plain.nbytes
    assert copy.deepcopy(module).half().weight.dtype == torch.float16
    assert copy.deepcopy(module).to("meta").weight.shape == (ROWS, DIM)
    assert isinstance(module.weight, DequantizedWeight)


def test_bags() -> None:
    bag = nn.EmbeddingBag(ROWS, DIM, mode="sum", padding_idx=2)
    module: Any = DequantizingEmbeddingBag.from_float(bag, 8)
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(module(ids), module.weight[torch.tensor([1, 3])].sum(0, keepdim=True))
    torch.testing.assert_close(module.to_float().weight.detach(), values(module), rtol=1e-6, atol=1e-6)


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = table()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.items(ids) @ self.items.weight.T


def test_graphs() -> None:
    model, ids = Scores(), torch.arange(4)
    expected = model(ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), expected)
    torch.testing.assert_close(torch.export.export(model, (ids,)).module()(ids), expected)
    torch.testing.assert_close(torch.func.vmap(lambda row: row @ model.items.weight.T)(model.items(ids)), expected)
