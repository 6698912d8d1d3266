"""The test cases that torch ships for ``nn.EmbeddingBag`` and ``F.embedding_bag``, run against ours."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import named
from torch.testing._internal import common_methods_invocations, common_nn

import recsys_kernels as rk
from recsys_kernels.testing import FLOAT_DTYPES, assert_matches

pytestmark = pytest.mark.usefixtures("one_thread")

_IDS, _OFFSETS, _TABLE = torch.tensor([1, 2, 3]), torch.tensor([0, 2]), torch.arange(24.0).reshape(6, 4)

# Where ours deviates from torch on purpose: the call, what torch does, what ours does. Errors by their class.
DEVIATIONS: dict[str, tuple[tuple[Any, ...], dict[str, Any], Any, Any]] = {
    # FBGEMM and TorchRec have weighted means, too: the weighted sum over the size of the bag.
    "weights for a mean": (
        (_IDS, _TABLE, _OFFSETS),
        {"mode": "mean", "per_sample_weights": torch.full((3,), 2.0)},
        NotImplementedError,
        [[12.0, 14.0, 16.0, 18.0], [24.0, 26.0, 28.0, 30.0]],
    ),
    # torch's last bag ends at the last offset or takes the rest, which depends on other options. Ours ends there.
    "indices behind the last offset": (
        (_IDS, _TABLE, torch.tensor([0, 1, 2])),
        {"mode": "max", "include_last_offset": True},
        [[4.0, 5.0, 6.0, 7.0], [12.0, 13.0, 14.0, 15.0]],
        [[4.0, 5.0, 6.0, 7.0], [8.0, 9.0, 10.0, 11.0]],
    ),
    # torch's message is that a list has no attribute "dim".
    "a list of indices": (([1, 2], _TABLE, _OFFSETS), {}, AttributeError, TypeError),
}

# One more class that catches the error: torch raises RuntimeError for a wrong index, Python raises IndexError.
BROADER = {"an index out of range": ((torch.tensor([[6]]), _TABLE), RuntimeError, IndexError)}


def _outcome(function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> Any:
    """The values of a call, or the class of its error."""
    try:
        return function(*args, **kwargs).tolist()
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("name", DEVIATIONS)
def test_deviations_are_these(implementation: str, name: str) -> None:
    args, kwargs, torchs, ours = DEVIATIONS[name]
    assert _outcome(torch.nn.functional.embedding_bag, *args, **kwargs) == torchs
    assert _outcome(rk.functional.embedding_bag, *args, **kwargs) == ours


@pytest.mark.parametrize("name", BROADER)
def test_errors_that_more_classes_catch(implementation: str, name: str) -> None:
    args, torchs, more = BROADER[name]
    assert _outcome(torch.nn.functional.embedding_bag, *args) is torchs
    got = _outcome(rk.functional.embedding_bag, *args)
    assert issubclass(got, torchs)
    assert issubclass(got, more)


def _functional_cases(dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]]:
    (info,) = (info for info in common_methods_invocations.op_db if info.name == "nn.functional.embedding_bag")
    for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
        yield sample.input, sample.args, sample.kwargs


def _gradients(function: Callable[..., torch.Tensor], weight: torch.Tensor, *args: Any, **kwargs: Any) -> list[Any]:
    """Result of a call, and the gradients of its table and of its per-sample weights."""
    leaf = weight.detach().clone().requires_grad_()
    samples = kwargs.get("per_sample_weights")
    leaves = [leaf]
    if samples is not None:
        leaves.append(samples.detach().clone().requires_grad_())
        kwargs = {**kwargs, "per_sample_weights": leaves[1]}
    out = function(args[0], leaf, *args[1:], **kwargs)
    upstream = (torch.arange(out.numel()) % 7 - 3).to(out.dtype).reshape(out.shape)  # the same in every type
    grads = torch.autograd.grad(out, leaves, upstream)
    return [out, *(grad.to_dense() if grad.is_sparse else grad for grad in grads)]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_calls_of_the_function(implementation: str, dtype: torch.dtype) -> None:
    number = 0
    for weight, args, kwargs in _functional_cases(dtype):
        with named((number, kwargs)):
            # In float64: torch sums 16-bit rows in 16 bits.
            exact = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in kwargs.items()}
            wanted = _gradients(torch.nn.functional.embedding_bag, weight.double(), *args, **exact)
            got = _gradients(rk.functional.embedding_bag, weight, *args, **kwargs)
            for one, two in zip(got, wanted, strict=True):
                assert one.dtype == dtype
                assert_matches(one, two)
        number += 1
    assert number == 32


def _module_cases() -> dict[str, dict[str, Any]]:
    """The cases of ``nn.EmbeddingBag``: a constructor with its arguments, and a function that gives an input."""
    found = {}
    for case in common_nn.get_new_module_tests():
        name = case.get("fullname") or f"{case.get('module_name')}_{case.get('desc')}"
        if name.startswith("EmbeddingBag_"):
            found[name] = case
    return found


def _as_ours(module: torch.nn.EmbeddingBag) -> rk.EmbeddingBag:
    """The same module with our class in place of torch's."""
    new = rk.EmbeddingBag(
        module.num_embeddings,
        module.embedding_dim,
        module.max_norm,
        module.norm_type,
        module.scale_grad_by_freq,
        module.mode,
        module.sparse,
        include_last_offset=module.include_last_offset,
        padding_idx=module.padding_idx,
        dtype=module.weight.dtype,
    )
    new.load_state_dict(module.state_dict())
    return new


@pytest.mark.parametrize("name", _module_cases())
def test_calls_of_the_module(implementation: str, name: str) -> None:
    case = _module_cases()[name]
    build = case.get("constructor", torch.nn.EmbeddingBag)
    theirs = build(*case.get("constructor_args", ())).to(case.get("default_dtype", torch.float32))
    given = case["input_fn"]()
    results = []
    for module in (_as_ours(theirs), copy.deepcopy(theirs)):
        out = module(given)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape))
        assert module.weight.grad.is_sparse == case.get("has_sparse_gradients", False)
        results.append((out, module.weight.grad.to_dense()))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


def test_torch_has_the_cases_that_this_file_is_about() -> None:
    assert len(_module_cases()) == 8
