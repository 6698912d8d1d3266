"""What code written for torch.nn.EmbeddingBag sees when the class is swapped."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import named

import recsys_kernels as rk
from recsys_kernels.ops.embedding_bag.reference import MODES
from recsys_kernels.testing import assert_matches

pytestmark = pytest.mark.usefixtures("one_thread")

_OPTIONS = [
    dict(
        zip(("mode", "padding_idx", "include_last_offset", "max_norm", "scale_grad_by_freq", "sparse"), v, strict=True)
    )
    for v in itertools.product(MODES, (None, 3, -2), (False, True), (None, 0.7), (False, True), (False, True))
]


def _pair(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[rk.EmbeddingBag, torch.nn.EmbeddingBag]:
    torch.manual_seed(4)
    ours = rk.EmbeddingBag(20, 12, dtype=dtype, **options)
    torch.manual_seed(4)
    return ours, torch.nn.EmbeddingBag(20, 12, dtype=dtype, **options)


def _call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Result and gradients of a call, or the type of its error."""
    try:
        out = module(*args, **kwargs)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape))
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return type(error)
    grad = module.weight.grad
    return out, grad.to_dense() if grad.is_sparse else grad, module.weight


@pytest.mark.parametrize("dtypes", list(itertools.product((torch.int32, torch.int64), repeat=2)), ids=str)
def test_every_option_agrees_with_torch(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    rng = torch.Generator().manual_seed(5)
    indices = torch.randint(0, 20, (30,), generator=rng).to(dtypes[0])
    matrix = torch.randint(0, 20, (4, 6), generator=rng).to(dtypes[0])
    factors = torch.randn(30, generator=rng)
    served = refused = 0
    for options in _OPTIONS:
        last = [30] if options["include_last_offset"] else []
        offsets = torch.tensor([0, 0, 4, 17, 17, *last], dtype=dtypes[1])
        for args in ((indices, offsets), (matrix,), (indices, offsets, factors)):
            if len(args) == 3 and options["mode"] == "mean":
                continue  # ours goes beyond torch
            ours, theirs = _pair(options)
            assert torch.equal(ours.weight, theirs.weight)
            got, wanted = _call(ours, *args), _call(theirs, *args)
            with named((options, len(args))):
                if isinstance(wanted, type):
                    assert got is wanted
                    refused += 1
                    continue
                assert not isinstance(got, type), f"ours raised {got}"
                served += 1
                for one, two in zip(got, wanted, strict=True):
                    assert_matches(one, two)
    assert served > 200
    assert refused > 20


def test_same_seed_gives_the_same_table_and_the_same_next_random_number() -> None:
    for options in ({}, {"padding_idx": 0}, {"padding_idx": -1}, {"device": "cpu", "dtype": torch.float64}):
        torch.manual_seed(6)
        ours, after_ours = rk.EmbeddingBag(13, 5, **options), torch.rand(1)
        torch.manual_seed(6)
        theirs, after_theirs = torch.nn.EmbeddingBag(13, 5, **options), torch.rand(1)
        assert torch.equal(ours.weight, theirs.weight)
        assert torch.equal(after_ours, after_theirs)
        assert ours.padding_idx == theirs.padding_idx
        assert repr(ours) == repr(theirs)


def test_state_dict_loads_in_both_directions() -> None:
    ours, theirs = rk.EmbeddingBag(11, 6), torch.nn.EmbeddingBag(11, 6)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    fresh = torch.nn.EmbeddingBag(11, 6)
    ours.load_state_dict(fresh.state_dict())
    assert torch.equal(ours.weight, fresh.weight)


def test_from_pretrained() -> None:
    table = torch.randn(9, 4)
    bags = torch.randint(0, 9, (5, 3))
    for options in (
        {},
        {"mode": "max"},
        {"mode": "sum", "padding_idx": -3},
        {"include_last_offset": True, "sparse": True},
    ):
        ours, theirs = (
            c.from_pretrained(table, freeze=True, **options) for c in (rk.EmbeddingBag, torch.nn.EmbeddingBag)
        )
        assert isinstance(ours, rk.EmbeddingBag)
        assert ours.weight.data_ptr() == table.data_ptr()
        assert not ours.weight.requires_grad
        assert_matches(ours(bags), theirs(bags))
    assert rk.EmbeddingBag.from_pretrained(table, freeze=False).weight.requires_grad


def _error(f: Any, *args: Any, **kwargs: Any) -> type[BaseException] | None:
    try:
        f(*args, **kwargs)
    except Exception as error:
        return type(error)
    return None


_IDS, _OFFSETS, _TABLE = torch.tensor([1, 2, 3]), torch.tensor([0, 2]), torch.randn(6, 4)
_BAD_CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "no offsets": ((_IDS, _TABLE), {}),
    "offsets of a matrix": ((_IDS.reshape(1, 3), _TABLE, _OFFSETS), {}),
    "2-D offsets": ((_IDS, _TABLE, _OFFSETS.reshape(1, 2)), {}),
    "3-D input": ((_IDS.reshape(1, 1, 3), _TABLE), {}),
    "0-D input": ((_IDS[0], _TABLE), {}),
    "1-D weight": ((_IDS, _TABLE[0], _OFFSETS), {}),
    "unknown mode": ((_IDS, _TABLE, _OFFSETS), {"mode": "median"}),
    "sparse max": ((_IDS, _TABLE, _OFFSETS), {"mode": "max", "sparse": True}),
    "max scaled by frequency": ((_IDS, _TABLE, _OFFSETS), {"mode": "max", "scale_grad_by_freq": True}),
    "weights of another shape": ((_IDS, _TABLE, _OFFSETS), {"mode": "sum", "per_sample_weights": torch.ones(2)}),
    "weights of another type": (
        (_IDS, _TABLE, _OFFSETS),
        {"mode": "sum", "per_sample_weights": torch.ones(3, dtype=torch.float64)},
    ),
    "weights for max": ((_IDS, _TABLE, _OFFSETS), {"mode": "max", "per_sample_weights": torch.ones(3)}),
    "float input": ((_IDS.float(), _TABLE, _OFFSETS), {}),
    "float offsets": ((_IDS, _TABLE, _OFFSETS.float()), {}),
    "integer table": ((_IDS, _TABLE.int(), _OFFSETS), {}),
    "first offset not 0": ((_IDS, _TABLE, torch.tensor([1, 2])), {}),
    "offset past the end": ((_IDS, _TABLE, torch.tensor([0, 4])), {}),
    "padding_idx past the end": ((_IDS, _TABLE, _OFFSETS), {"padding_idx": 6}),
    "padding_idx before the start": ((_IDS, _TABLE, _OFFSETS), {"padding_idx": -7}),
}


@pytest.mark.parametrize("call", _BAD_CALLS)
def test_errors_are_those_of_torch(implementation: str, call: str) -> None:
    args, kwargs = _BAD_CALLS[call]
    wanted = _error(F.embedding_bag, *args, **kwargs)
    got = _error(rk.functional.embedding_bag, *args, **kwargs)
    assert wanted is not None
    # Where torch raises its general error we may raise the more precise ValueError.
    allowed = {wanted} | ({ValueError} if wanted is RuntimeError else set())
    assert got in allowed, f"torch raises {wanted}, we {got}"


def test_errors_say_what_was_wrong(implementation: str) -> None:
    bag = rk.EmbeddingBag(6, 4)
    with pytest.raises(IndexError, match="index 6 at position 1 of indices is out of range for a table with 6 rows"):
        bag(torch.tensor([1, 6]), torch.tensor([0]))
    with pytest.raises(IndexError, match="index -1 at position 2"):
        bag(torch.tensor([[1, 2], [-1, 9]]))
    with pytest.raises(RuntimeError, match=r"offsets .*\(3\), but offsets\[1\] is 4"):
        bag(_IDS, torch.tensor([0, 4]))
    with pytest.raises(RuntimeError, match=r"offsets .*but offsets\[2\] is 1"):
        bag(_IDS, torch.tensor([0, 2, 1]))
    with pytest.raises(RuntimeError, match=r"offsets .*but offsets\[0\] is 2"):
        bag(_IDS, torch.tensor([2, 2]))
    with pytest.raises(RuntimeError, match=r"indices must be int32 or int64, but is .*(float32|int16)"):
        bag(_IDS.float(), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"per_sample_weights must have the shape of input \(\(3,\)\).*\(2,\)"):
        bag(_IDS, torch.tensor([0]), torch.ones(2))
    with pytest.raises(RuntimeError, match="include_last_offset needs at least one offset"):
        rk.functional.embedding_bag(_IDS, _TABLE, _OFFSETS[:0], include_last_offset=True)


def test_signatures_are_those_of_torch() -> None:
    for ours, theirs in (
        (rk.functional.embedding_bag, F.embedding_bag),
        (rk.EmbeddingBag.__init__, torch.nn.EmbeddingBag.__init__),
        (rk.EmbeddingBag.forward, torch.nn.EmbeddingBag.forward),
    ):
        got, wanted = (list(inspect.signature(f).parameters.values()) for f in (ours, theirs))
        assert [(p.name, p.default, p.kind) for p in got] == [(p.name, p.default, p.kind) for p in wanted]


def test_second_derivatives_are_refused(implementation: str) -> None:
    """As torch refuses them; a silent zero would make a gradient penalty do nothing."""
    for mode in MODES:
        weight = torch.randn(6, 4, requires_grad=True)
        out = rk.functional.embedding_bag(torch.tensor([[1, 2]]), weight, mode=mode)
        (grad,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
        with pytest.raises(RuntimeError, match="twice"):
            grad.square().sum().backward()


# ---- as a module ------------------------------------------------------------------------------------------------


def test_casting_and_copying() -> None:
    bag = rk.EmbeddingBag(30, 8, mode="sum", padding_idx=1)
    bags = torch.randint(0, 30, (4, 5))
    for cast in (bag.half, bag.bfloat16, bag.double, bag.float):
        moved = cast()
        assert moved is bag
        assert moved(bags).dtype == bag.weight.dtype
    other = copy.deepcopy(bag)
    assert torch.equal(other(bags), bag(bags))
    with torch.no_grad():
        other.weight.zero_()
    assert bag(bags).any()
    assert rk.EmbeddingBag(3, 2, device="meta").weight.is_meta


def test_gradient_is_only_computed_where_asked() -> None:
    weight, factors = torch.randn(6, 4), torch.randn(3)
    bag = functools.partial(rk.functional.embedding_bag, _IDS, offsets=_OFFSETS, mode="sum")
    assert not bag(weight=weight, per_sample_weights=factors).requires_grad
    (grad,) = torch.autograd.grad(bag(weight=weight, per_sample_weights=factors.requires_grad_()).sum(), factors)
    assert_matches(grad, weight[_IDS].sum(1))
    with torch.no_grad():
        assert not bag(weight=weight.requires_grad_()).requires_grad
