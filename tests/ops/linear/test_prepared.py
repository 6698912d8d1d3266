"""Packed copies of int8 and sparse layers go stale with the tensors that they were made of."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import recsys_kernels as rk
from recsys_kernels.ops.linear.prepared import Prepared, PreparedByTensor
from recsys_kernels.ops.linear.sparse import crossover


def float_layer(in_features: int = 40, out_features: int = 24) -> torch.nn.Linear:
    torch.manual_seed(in_features)
    return torch.nn.Linear(in_features, out_features).requires_grad_(False)


def rows(count: int = 5, width: int = 40) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


def int8() -> rk.Int8Linear:
    return rk.Int8Linear.from_float(float_layer())


def sparse() -> rk.SparseLinear:
    return rk.SparseLinear.from_dense(float_layer(), 0.5)


def int8_mlp() -> rk.Int8MLP:
    return rk.Int8MLP(int8(), rk.Int8Linear.from_float(float_layer(24, 8)))


def sparse_mlp() -> rk.SparseMLP:
    return rk.SparseMLP(sparse(), rk.SparseLinear.from_dense(float_layer(24, 8), 0.5))


MAKE: dict[str, Callable[[], Any]] = {
    "int8": int8,
    "sparse": sparse,
    "sparse int8": lambda: sparse().quantize(),
    "int8 mlp": int8_mlp,
    "sparse mlp": sparse_mlp,
}


def weights(module: Any) -> torch.Tensor:
    """The tensor of weights of a layer, or of the first layer of an MLP."""
    layer = module[0] if isinstance(module, torch.nn.Sequential) else module
    return layer.weight if isinstance(layer, rk.Int8Linear) else layer.values  # type: ignore[no-any-return]


def assign_data(tensor: torch.Tensor) -> None:
    tensor.data = torch.flip(tensor.detach(), (0,)).clone()


def multiply_data(tensor: torch.Tensor) -> None:
    tensor.data.mul_(-1)


def write_numpy(tensor: torch.Tensor) -> None:
    array = tensor.detach().numpy()
    array[...] = -array


WRITES = (assign_data, multiply_data, write_numpy)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", MAKE)
def test_writes_that_torch_does_not_count_are_seen(name: str, write: Callable[[torch.Tensor], None]) -> None:
    module = MAKE[name]()
    before = module(rows()).clone()
    module(rows())
    write(weights(module))
    with rk.backend("reference"):
        wanted = module(rows())
    assert not torch.allclose(before, wanted)
    torch.testing.assert_close(module(rows()), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module(rows(1)), wanted_of(module, rows(1)), rtol=1e-4, atol=1e-4)


def wanted_of(module: Any, input: torch.Tensor) -> torch.Tensor:
    with rk.backend("reference"):
        return module(input)  # type: ignore[no-any-return]


@pytest.mark.parametrize("part", ["bias", "weight_scale"])
@pytest.mark.parametrize("name", ["int8", "sparse int8"])
def test_assigned_data_of_other_tensors_is_seen(name: str, part: str) -> None:
    module = MAKE[name]()
    module(rows())
    tensor = getattr(module, part)
    tensor.data = tensor.detach() * 3
    torch.testing.assert_close(module(rows()), wanted_of(module, rows()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("part", ["bias", "weight_scale", "input_qparams"])
@pytest.mark.parametrize("name", ["int8", "sparse int8"])
def test_uncounted_writes_to_other_tensors(name: str, part: str, write: Callable[[torch.Tensor], None]) -> None:
    module: Any = rk.Int8Linear.from_float(float_layer(), "static", input_range=(-2.0, 1.0))
    if name.startswith("sparse"):
        module = sparse().quantize("static", input_range=(-2.0, 1.0))
    module(rows())
    module(rows())
    tensor = getattr(module, part)
    if part != "input_qparams":
        write(tensor)
    elif write is assign_data:
        tensor.data = torch.tensor([0.25, 2.0])
    else:  # a range cannot be negative
        tensor.numpy()[...] = (0.25, 2.0)
    for count in (5, 1):
        wanted = wanted_of(module, rows(count))
        torch.testing.assert_close(module(rows(count)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", MAKE)
def test_compiled_code_sees_uncounted_writes(name: str, write: Callable[[torch.Tensor], None]) -> None:
    module = MAKE[name]()
    compiled = torch.compile(module, backend="eager")
    before = compiled(rows()).clone()
    write(weights(module))
    wanted = wanted_of(module, rows())
    assert not torch.allclose(before, wanted)
    torch.testing.assert_close(compiled(rows()), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MAKE)
def test_refresh_after_a_write_that_leaves_no_trace(name: str) -> None:
    """One weight behind the first KiB, through numpy."""
    linear = float_layer(400, 60)
    module: Any = rk.Int8Linear.from_float(linear)
    if name.startswith("sparse"):
        module = rk.SparseLinear.from_dense(linear, 0.2)
        module = module.quantize() if name == "sparse int8" else module
    if name.endswith("mlp"):
        module = (rk.SparseMLP if name.startswith("sparse") else rk.Int8MLP)(module)
    module(rows(5, 400))
    array = weights(module).detach().numpy().reshape(-1)
    array[-1] = 60 if array[-1] < 0 else -60
    module.refresh()
    torch.testing.assert_close(module(rows(5, 400)), wanted_of(module, rows(5, 400)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", MAKE)
def test_copies_do_not_share_what_was_made(name: str) -> None:
    module = MAKE[name]()
    before = module(rows())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        multiply_data(weights(other))
        assert not torch.allclose(other(rows()), before)
        assert torch.equal(module(rows()), before)


@pytest.mark.parametrize("wrong", [2**30, -1])
@pytest.mark.parametrize("kind", ["float", "dynamic", "weight_only"])
def test_columns_of_layers_that_run_dense_are_checked(monkeypatch: pytest.MonkeyPatch, kind: str, wrong: int) -> None:
    """A dense copy of a layer would drop a weight far outside, and take -1 for the last column."""
    monkeypatch.setattr(crossover, "limits", lambda *args: (0.0, 0.0))
    module = sparse() if kind == "float" else sparse().quantize(kind)
    module.col_indices[3] = wrong
    for count in (1, 20):
        with pytest.raises(IndexError, match=f"is {wrong} in row"):
            module(rows(count))


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("part", ["crow_indices", "col_indices"])
@pytest.mark.parametrize("value", [2**30, -(2**30), 7])
@pytest.mark.parametrize("kind", ["float", "dynamic"])
def test_structures_written_between_forward_and_backward(kind: str, value: int, part: str, functional: bool) -> None:
    """A module keeps a copy, so that its gradients are right; a function raises what is wrong."""
    module = rk.SparseLinear.from_dense(torch.nn.Linear(40, 24), 0.5)
    module = module if kind == "float" else module.quantize()
    x = rows().requires_grad_()
    (wanted,) = torch.autograd.grad(module(x).sum(), x)
    stored = module.values, module.crow_indices, module.col_indices
    scale = module.weight_scale
    out = rk.functional.sparse_linear(x, *stored, 24, weight_scale=scale) if functional else module(x)
    getattr(module, part).numpy()[1:] = value
    if not functional:
        (found,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(found, wanted)
        return
    with pytest.raises((IndexError, RuntimeError)):
        torch.autograd.grad(out.sum(), x)


# ---- the class ------------------------------------------------------------------------------------------------------


def test_prepared_names_its_tensors() -> None:
    first, second = torch.ones(3), torch.ones(2)
    prepared = Prepared("it", (first, second))
    assert prepared.is_fresh(first, second, None, None)
    assert not prepared.is_fresh(first, None, None, None)
    assert not prepared.is_fresh(second, second, None, None)
    second.add_(1)
    assert not prepared.is_fresh(first, second, None, None)


def test_values_of_trained_parameters_are_compared() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    prepared = Prepared("it", (weight,), [weight])
    assert prepared.has_values([weight])
    weight.data[2] = float("nan")
    assert not prepared.has_values([weight])
    assert Prepared("it", (weight,), [weight]).has_values([weight])
    assert not Prepared("it", (weight,)).has_values([weight])


def test_values_by_tensor_go_with_their_tensor() -> None:
    known: PreparedByTensor[list[int]] = PreparedByTensor()
    first, made = torch.ones(3), []

    def make() -> list[int]:
        made.append([len(made)])
        return made[-1]

    assert known.get((first, None), (1,), make) is known.get((first, None), (1,), make)
    assert known.get((first, None), (2,), make) == [1]
    assert known.get((first, None), (1,), make) == [0]
    first.add_(1)
    assert known.get((first, None), (1,), make) == [2]
    with torch.inference_mode():
        assert known.get((torch.ones(3),), (1,), make) == [3]
    assert len(known) == 1
    del first
    assert len(known) == 0
