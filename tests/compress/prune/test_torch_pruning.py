"""Layers with masks of torch.nn.utils.prune, which a hook applies: SparseLinear and optimize take what a call takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_support import WIDTH, by_name, kinds, mlp, only_linear, rows, without_timing
from sparse_support import dense_of
from torch import nn
from torch.nn.utils import prune

import recsys_kernels as rk
from recsys_kernels.compress.converters import sparse_linear as sparse_module

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def never_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where sparse layers are always faster."""
    monkeypatch.setattr(sparse_module, "runs_dense", lambda *layer: (False, False))


def masked_mlp() -> nn.Sequential:
    """An MLP as it is after a step of training: the attributes ``weight`` are those of the call before."""
    model = mlp().eval()
    for layer, amount in ((model[0], 0.75), (model[3], 0.8), (model[6], 0.5)):
        prune.l1_unstructured(layer, "weight", amount)
    prune.random_unstructured(model[6], "weight", 0.5)  # two masks together
    prune.l1_unstructured(model[6], "bias", 0.5)
    model[0].register_forward_hook(lambda module, args, out: out + 1.0)
    model[6].register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    model(rows()).square().mean().backward()
    optimizer.step()
    return model


def weights(layer: Any, name: str = "weight") -> torch.Tensor:
    return (getattr(layer, f"{name}_orig") * getattr(layer, f"{name}_mask")).detach()


def test_from_dense_takes_what_a_call_takes() -> None:
    layer = masked_mlp()[6]
    old = layer.weight.detach().clone()
    assert not torch.equal(old, weights(layer))
    with torch.no_grad():
        module = rk.SparseLinear.from_dense(layer, None)  # type: ignore[arg-type]
    assert torch.equal(dense_of(module), weights(layer).double())
    assert torch.equal(module.bias, weights(layer, "bias"))
    assert 0.6 < module.sparsity < 0.9
    assert module.values.requires_grad
    assert module.values.is_leaf
    assert torch.equal(layer.weight, old)
    layer.weight_orig.requires_grad_(False)
    assert not rk.SparseLinear.from_dense(layer, None).values.requires_grad  # type: ignore[arg-type]
    sparser = rk.SparseLinear.from_dense(layer, 0.9)  # type: ignore[arg-type]
    assert sparser.nnz == round(0.1 * weights(layer).numel())
    with torch.inference_mode():
        assert torch.equal(rk.SparseLinear.from_dense(layer, None).values, module.values)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("choice", ["sparse", "int8+sparse"])
def test_masked_models_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch, choice: str, sampled: bool) -> None:
    without_timing(monkeypatch)
    model = masked_mlp()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = [layer.weight for layer in (model[0], model[3], model[6])]
    new, report = only_linear(model, choice, sample_inputs=rows(40) if sampled else None)
    assert all(layer.weight is weight for layer, weight in zip((model[0], model[3], model[6]), before, strict=True))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [len(layer._forward_pre_hooks) for layer in (model[0], model[3], model[6])] == [1, 1, 3]
    assert [layer.action for layer in report.layers] == [choice] * 3
    assert [layer.sparsity for layer in report.layers[:2]] == [0.75, 0.8]
    assert "75.0% of its weights dropped" in report.layers[0].reason
    assert kinds(new) == {
        "0": "SparseLinear", "1": "ReLU", "2": "Dropout", "3": "SparseLinear", "6": "SparseLinear",
    }  # fmt: skip
    assert [len(layer._forward_pre_hooks) for layer in (new[0], new[3], new[4])] == [0, 0, 1]
    with torch.no_grad():
        close = 1e-5 if choice == "sparse" else 0.1
        torch.testing.assert_close(new(rows()), model(rows()), rtol=close, atol=close)
        assert not torch.allclose(new(rows()), mlp().eval()(rows()), rtol=0.1, atol=0.1)


def test_what_is_kept_keeps_its_masks() -> None:
    model = masked_mlp()
    new, report = only_linear(model, "sparse", skip=["0", "6"])
    assert {name: layer.action for name, layer in by_name(report).items()} == {"0": "kept", "3": "sparse", "6": "kept"}
    assert kinds(new) == {"0": "Linear", "1": "ReLU", "2": "Dropout", "3": "SparseLinear", "6": "Linear"}
    first, last = new[0], new[-1]
    assert list(last.state_dict()) == list(model[6].state_dict())
    assert last.weight_orig is not model[6].weight_orig
    with torch.no_grad():
        torch.testing.assert_close(new(rows()), model(rows()))
    new(rows()).sum().backward()
    assert first.weight_orig.grad.count_nonzero() > 0
    assert not first.weight_orig.grad[first.weight_mask == 0].any()
    for layer, name in ((first, "weight"), (last, "weight"), (last, "bias")):
        prune.remove(layer, name)
    assert not prune.is_pruned(new)
    assert prune.is_pruned(model)


def test_a_model_that_is_one_masked_layer() -> None:
    linear = nn.Linear(WIDTH, 32)
    prune.ln_structured(linear, "weight", 0.75, 2, 0)
    new, report = only_linear(linear, "sparse")
    assert type(new) is rk.SparseLinear
    assert report.layers[0].sparsity == 0.75
    assert report.bytes_before > report.bytes_after
    with torch.no_grad():
        torch.testing.assert_close(new(rows()), linear(rows()))


def test_masks_that_stay() -> None:
    reason = "has masks of torch.nn.utils.prune: torch.nn.utils.prune.remove(layer, 'weight') leaves a plain layer"
    linear = nn.Linear(WIDTH, 32)
    prune.l1_unstructured(linear, "weight", 0.75)
    new, report = only_linear(linear, "int8")
    assert prune.is_pruned(new)
    assert report.layers[0].reason == reason
    only_bias = nn.Linear(WIDTH, 32)
    prune.l1_unstructured(only_bias, "bias", 0.5)
    _, report = only_linear(only_bias, "sparse", sparsity=0.5)
    assert "torch.nn.utils.prune.remove(layer, 'bias') leaves a plain layer" in report.layers[0].reason


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        prune.l1_unstructured(self.fc, "weight", 0.75)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.fc(x), self.fc.weight)


@pytest.mark.parametrize("sampled", [True, False])
def test_weights_that_other_code_reads_stay(sampled: bool) -> None:
    model = Reader().eval()
    new, report = only_linear(model, "sparse", sample_inputs=rows() if sampled else None)
    assert not report.swapped
    assert "Reader.forward" in report.layers[0].reason
    assert prune.is_pruned(new.fc)
    assert torch.equal(new(rows()), model(rows()))
