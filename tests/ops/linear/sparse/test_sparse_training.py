"""Sparse layers in training: gradients, new values at their places in what the CPU reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sparse_support import (
    DTYPES,
    FUNCTIONS,
    PATTERNS,
    dense_of,
    float_layer,
    pack,
    quantized,
    rows,
    run_packed,
    sparse,
)
from support import Calls
from torch.utils._python_dispatch import TorchDispatchMode

import recsys_kernels as rk
from recsys_kernels import testing
from recsys_kernels.backends import selection
from recsys_kernels.testing import assert_matches

pytestmark = pytest.mark.usefixtures("one_thread")


def repack(*args: Any) -> torch.Tensor:
    return selection.implementation("sparse_repack", args[1])(*args)


@pytest.mark.parametrize("epilogue", FUNCTIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_training_as_a_masked_dense_layer(implementation: str, pattern: str, epilogue: str | None) -> None:
    """Steps of SGD move the kept weights as those of a masked layer, and nothing else."""
    module = sparse(pattern, epilogue=epilogue)
    kept_weights = dense_of(module) != 0
    weight = dense_of(module).requires_grad_()
    bias = module.bias.detach().double().requires_grad_()  # type: ignore[union-attr]
    steps = [torch.optim.SGD(module.parameters(), 0.1), torch.optim.SGD([weight, bias], 0.1)]
    x, direction = rows(20), torch.randn(20, 22, generator=torch.Generator().manual_seed(9))
    for _ in range(3):
        for step in steps:
            step.zero_grad()
        (module(x) * direction).mean().backward()
        (FUNCTIONS[epilogue](F.linear(x.double(), weight * kept_weights, bias)) * direction).mean().backward()
        assert module.values.grad is not None
        assert module.values.grad.shape == module.values.shape
        for step in steps:
            step.step()
    assert (dense_of(module)[~kept_weights] == 0).all() or pattern == "2:4"
    assert_matches((dense_of(module) * kept_weights).float(), (weight * kept_weights).detach())
    with torch.no_grad():
        assert_matches(module(x), FUNCTIONS[epilogue](F.linear(x.double(), dense_of(module), module.bias.double())))


@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_of_the_input(implementation: str, frozen: bool) -> None:
    for pattern in PATTERNS:
        for module in (sparse(pattern), quantized(pattern), sparse(pattern, float_layer(5, 3))):
            module.requires_grad_(not frozen)
            x = rows(9, module.in_features).requires_grad_()
            direction = torch.randn(9, module.out_features, generator=torch.Generator().manual_seed(3))
            for _ in range(2):
                (grad,) = torch.autograd.grad(module(x), x, direction)
                assert_matches(grad, direction.double() @ dense_of(module))
            structure = module._structure
            assert structure is not None
            torch.autograd.grad(module(x), x, direction)
            assert module._structure is structure


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gradients_of_16_bit_layers(implementation: str, dtype: torch.dtype) -> None:
    module = sparse(linear=float_layer(dtype=dtype))
    x = rows(9).to(dtype).requires_grad_()
    out = module(x)
    assert out.dtype == dtype
    grads = torch.autograd.grad(out, (x, module.values, module.bias), torch.ones_like(out))
    assert [g.dtype for g in grads] == [dtype] * 3
    assert_matches(grads[0], dense_of(module).sum(0).expand(9, -1))
    assert_matches(grads[1], x.detach().double().sum(0)[module.col_indices.long()])


def test_training_makes_no_dense_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer whose dense weights would be 4 MB no new tensor has a third of that; its pack is one of them."""
    module = sparse("block4x1", float_layer(1000, 1000), 0.95)
    x = rows(4, 1000).requires_grad_()
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.nbytes)
            return out

    with rk.backend("cpu"), Sizes():
        module(x).sum().backward()
    assert 4 * module.nnz < largest < 4_000_000 / 3


def test_a_step_of_training_puts_values_into_their_places() -> None:
    """Packs are made once; a layer in eval() keeps its own, also where gradients are not switched off."""
    for pattern in PATTERNS:
        module = sparse(pattern, float_layer(70, 50), epilogue="relu")
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for count in (3, 40) * 2:
            x = rows(count, 70).requires_grad_()
            with Calls() as calls:
                out = module(x)
                out.sum().backward()
            wanted = F.relu(F.linear(x.double(), dense_of(module), module.bias.double()))  # type: ignore[union-attr]
            assert_matches(out, wanted)
            assert_matches(x.grad, torch.autograd.grad(wanted.sum(), x)[0].double())
            optimizer.step()
            optimizer.zero_grad()
        with rk.backend("cpu"):
            assert calls.names.count("recsys_kernels::sparse_repack") == 2
            assert "recsys_kernels::sparse_pack" not in calls.names
        module.eval()
        module(x)
        with Calls() as calls:
            module(x)
        assert not {"recsys_kernels::sparse_pack", "recsys_kernels::sparse_repack"} & set(calls.names)


@pytest.mark.parametrize("kind", [0, 1], ids=["few", "many"])
def test_new_values_in_a_packed_layer(implementation: str, kind: int) -> None:
    """What comes out is what packing the values gives; a number of 0 is where none belongs."""
    for sample in testing.sparse_linear_samples(torch.float32):
        values, crow, col, n, k = sample.layer[:5]
        if values.dtype != torch.float32:
            continue
        numbers = torch.arange(1, values.numel() + 1).int().view(torch.float32).reshape(values.shape)
        generator = torch.Generator().manual_seed(n)
        bias, x = torch.randn(n, generator=generator), torch.randn(9, k, generator=generator)
        places = pack(numbers, crow, col, n, k, None, bias, None, 2, 1, kind)
        for given in (bias, None):
            packed = pack(values, crow, col, n, k, None, given, None, 2, 1, kind)
            results = [run_packed(x, each, n, torch.float32) for each in (packed, repack(places, values, given))]
            assert torch.equal(*results)
        if values.numel():
            with pytest.raises(RuntimeError, match="places name value"):
                repack(places, values.new_empty(0), None)
        with pytest.raises(RuntimeError, match="values must be float32"):
            repack(places, values.half(), None)
        half = pack(values.half(), crow, col, n, k, None, None, None, 2, 1, kind)
        with pytest.raises(RuntimeError, match="places must be packed from float32"):
            repack(half, values, None)


def test_gradients_where_inference_mode_is_left_for_them() -> None:
    torch.manual_seed(0)
    layer = rk.SparseLinear.from_dense(torch.nn.Linear(12, 8), 0.5)
    x, grad = torch.randn(3, 12), torch.randn(3, 8)
    (wanted,) = torch.autograd.grad(layer(x), layer.values, grad)
    again = rk.SparseLinear.from_dense(layer.to_dense(), 0.5)
    with torch.inference_mode(), torch.enable_grad():
        (found,) = torch.autograd.grad(again(x), again.values, grad)
    assert torch.equal(found, wanted)
