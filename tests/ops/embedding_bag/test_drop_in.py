"""What code written for torch.nn.EmbeddingBag sees when the class is swapped."""

from __future__ import annotations

import contextlib
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
from recsys_kernels.backends.registry import native
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
    assert got is not None
    assert issubclass(got, wanted), f"torch raises {wanted}, we {got}"


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
    with pytest.raises(
        ValueError, match=r"per_sample_weights must have the same shape as the input \(\(3,\)\).*\(2,\)"
    ):
        bag(_IDS, torch.tensor([0]), torch.ones(2))
    with pytest.raises(RuntimeError, match="include_last_offset needs at least one offset"):
        rk.functional.embedding_bag(_IDS, _TABLE, _OFFSETS[:0], include_last_offset=True)


def test_index_errors_are_caught_as_torchs_and_as_pythons(implementation: str) -> None:
    table = torch.randn(6, 4)
    quantized = rk.QuantizedEmbedding.from_float(torch.nn.Embedding.from_pretrained(table))
    collection = rk.EmbeddingBagCollection([rk.EmbeddingBagConfig("user", 6, 4)])
    bad = torch.tensor([1, 6])
    calls = [
        lambda: rk.functional.embedding_bag(bad, table, torch.tensor([0])),
        lambda: rk.functional.embedding_bag(bad, table.requires_grad_(), torch.tensor([0]), mode="max"),
        lambda: rk.EmbeddingBag(6, 4)(bad.reshape(1, 2)),
        lambda: quantized(bad),
        lambda: collection(bad, torch.tensor([0, 2])),
    ]
    for number, call in enumerate(calls):
        for kind in (IndexError, RuntimeError):
            with named(number), pytest.raises(kind, match="index 6 at position 1 of indices is out of range"):
                call()


def test_compiled_graphs_raise_a_plain_index_error() -> None:
    """A graph calls the native kernel without our Python, and C++ knows Python's own classes only."""
    bag = rk.EmbeddingBag(6, 4)
    compiled = torch.compile(bag, backend="aot_eager", fullgraph=True)
    bad = torch.tensor([[1, 6]])
    direct = functools.partial(torch.ops.recsys_kernels.embedding_bag, bag.weight, bad, None, None, 0, -1, False)
    for call in (lambda: compiled(bad), direct):
        with pytest.raises(IndexError, match="index 6 at position 1 of indices is out of range") as caught:
            call()
        assert isinstance(caught.value, RuntimeError) == (native.reason is not None)  # the reference is Python
    with pytest.raises(RuntimeError, match="index 6 at position 1"):
        bag(bad)


def test_errors_of_a_backward_are_caught_as_torchs(implementation: str) -> None:
    """Indices that were written to between forward and backward."""
    bag, ids = rk.EmbeddingBag(6, 4, mode="sum"), torch.tensor([[1, 2]])
    out = bag(ids)
    ids.numpy()[0, 1] = 6  # torch does not count this write
    with pytest.raises(RuntimeError, match="index 6 at position 1 of indices is out of range") as caught:
        out.sum().backward()
    assert isinstance(caught.value, IndexError)


_SMALL = (torch.int8, torch.uint8, torch.int16, torch.bool)


def test_small_integer_types_are_taken_as_torch_takes_them(implementation: str) -> None:
    """Beside int32 or int64 they are; alone they are not."""
    taken = refused = 0
    options = itertools.product((*_SMALL, torch.int32, torch.int64, torch.float16), repeat=2)
    for index_type, offset_type in options:
        args = (torch.tensor([1, 0, 1]).to(index_type), _TABLE, torch.tensor([0, 1]).to(offset_type))
        wanted, got = _error(F.embedding_bag, *args), _error(rk.functional.embedding_bag, *args)
        with named((index_type, offset_type)):
            if wanted is None:
                assert got is None
                assert_matches(rk.functional.embedding_bag(*args), F.embedding_bag(*args))
                taken += 1
            else:
                assert got is not None
                assert issubclass(got, RuntimeError)
                refused += 1
    for index_type in _SMALL:
        matrix = torch.tensor([[1, 0, 1]]).to(index_type)
        with pytest.raises(RuntimeError, match=r"indices must be int32 or int64, but is .*(int|bool)"):
            rk.functional.embedding_bag(matrix, _TABLE)
    assert (taken, refused) == (20, 29)


def test_small_integer_types_have_gradients() -> None:
    weights = [_TABLE.clone().requires_grad_() for _ in range(2)]
    for weight, f in zip(weights, (rk.functional.embedding_bag, F.embedding_bag), strict=True):
        f(_IDS.to(torch.uint8), weight, _OFFSETS).square().sum().backward()
    assert_matches(weights[0].grad, weights[1].grad)
    quantized = rk.QuantizedEmbeddingBag.from_float(torch.nn.EmbeddingBag.from_pretrained(_TABLE))
    assert torch.equal(quantized(_IDS.to(torch.int16), _OFFSETS), quantized(_IDS, _OFFSETS))


def test_arguments_in_the_old_order() -> None:
    for args in ((_IDS, _OFFSETS), (_IDS.reshape(1, 3), None)):
        ids, offsets = args
        with pytest.warns(UserWarning, match="deprecated"):
            wanted = F.embedding_bag(_TABLE, ids, offsets)
        with pytest.warns(UserWarning, match=r"\(input, weight, ...\)") as caught:
            got = rk.functional.embedding_bag(_TABLE, ids, offsets)
        assert caught[0].filename == __file__
        assert_matches(got, wanted)


def test_torchs_function_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options that torch serves must not come back to us for ever."""
    theirs = torch.nn.EmbeddingBag.from_pretrained(_TABLE.clone(), max_norm=0.5, mode="sum")
    wanted = theirs(_IDS, _OFFSETS)
    monkeypatch.setattr(F, "embedding_bag", rk.functional.embedding_bag)
    for bag in (theirs, rk.EmbeddingBag.from_pretrained(_TABLE.clone(), max_norm=0.5, mode="sum")):
        assert_matches(bag(_IDS, _OFFSETS), wanted)
    with pytest.raises(IndexError):
        torch.nn.EmbeddingBag(6, 4)(torch.tensor([[6]]))


def test_lists_and_missing_offsets_are_named() -> None:
    bag = rk.EmbeddingBag(6, 4)
    quantized = rk.QuantizedEmbeddingBag.from_float(bag)
    for call in (bag, quantized, functools.partial(rk.functional.embedding_bag, weight=bag.weight)):
        for args, name in (((_IDS.tolist(),), "input"), ((_IDS.numpy(),), "input"), ((_IDS, [0, 2]), "offsets")):
            kwargs = dict(zip(("input", "offsets"), args, strict=False))
            with pytest.raises(TypeError, match=rf"{name} must be a tensor.*torch.as_tensor\({name}\)"):
                call(**kwargs)
        with pytest.raises(
            ValueError, match=r"offsets has to be a 1D Tensor when input is 1D, but got None.*rows is a bag"
        ):
            call(input=_IDS)
    embedding = rk.QuantizedEmbedding.from_float(torch.nn.Embedding(6, 4))
    with pytest.raises(TypeError, match="input must be a tensor"):
        embedding([1, 2])
    with pytest.raises(TypeError, match="per_sample_weights must be a tensor"):
        rk.functional.embedding_bag(_IDS, bag.weight, _OFFSETS, mode="sum", per_sample_weights=[1.0, 1.0, 1.0])


@pytest.mark.parametrize("backend", [None, "reference"])
def test_the_meta_device_gives_no_values(backend: str | None) -> None:
    """torch hands out memory that nobody filled where ids or offsets are on meta."""
    meta = torch.device("meta")
    bag = rk.EmbeddingBag(6, 4)
    quantized = rk.QuantizedEmbeddingBag.from_float(bag)
    single = rk.QuantizedEmbedding.from_float(torch.nn.Embedding(6, 4))
    on_meta = [copy.deepcopy(m).to(meta) for m in (bag, quantized, single)]
    calls = {
        "ids": lambda: bag(_IDS.to(meta), _OFFSETS),
        "offsets": lambda: bag(_IDS, _OFFSETS.to(meta)),
        "without gradients": lambda: rk.functional.embedding_bag(_IDS.to(meta), _TABLE, _OFFSETS),
        "factors": lambda: rk.functional.embedding_bag(
            _IDS, _TABLE, _OFFSETS, mode="sum", per_sample_weights=torch.ones(3, device=meta)
        ),
        "max": lambda: rk.functional.embedding_bag(_IDS, _TABLE.to(meta).requires_grad_(), _OFFSETS, mode="max"),
        "table": lambda: on_meta[0](_IDS, _OFFSETS),
        "quantized ids": lambda: quantized(_IDS.to(meta), _OFFSETS),
        "quantized table": lambda: on_meta[1](_IDS, _OFFSETS),
        "embedding ids": lambda: single(_IDS.to(meta)),
        "embedding table": lambda: on_meta[2](_IDS),
    }
    for name, call in calls.items():
        with contextlib.ExitStack() as stack:
            stack.enter_context(named(name))
            if backend is not None:
                stack.enter_context(rk.backend(backend))
            stack.enter_context(pytest.raises(RuntimeError, match=r"is on the meta device, which holds no values"))
            call()
    assert on_meta[0](_IDS.to(meta), _OFFSETS.to(meta)).is_meta
    assert on_meta[0](_IDS.to(meta), _OFFSETS.to(meta)).shape == (2, 4)


def test_autocast_gives_what_torch_gives() -> None:
    for dtype, mode in itertools.product((torch.float32, torch.float16, torch.bfloat16), ("sum", "mean")):
        weight = _TABLE.to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results = []
            for f in (rk.functional.embedding_bag, F.embedding_bag):
                leaf = weight.clone().requires_grad_()
                out = f(_IDS, leaf, _OFFSETS, mode=mode)
                out.float().square().sum().backward()
                results.append((out, leaf.grad))
            for got, wanted in zip(*results, strict=True):
                assert got.dtype == wanted.dtype == dtype
                assert_matches(got, wanted)
            cast = {"per_sample_weights": torch.ones(3, dtype=torch.bfloat16), "mode": "sum"}
            errors = [_error(f, _IDS, weight, _OFFSETS, **cast) for f in (F.embedding_bag, rk.functional.embedding_bag)]
            assert errors[0] is errors[1]


def test_what_stands_behind_the_last_offset_belongs_to_no_bag(implementation: str) -> None:
    """As in CSR. torch's answer depends on its options: the last bag may end there or reach the end of the indices."""
    ids, offsets = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 3, 3])
    theirs = set()
    for mode, padding_idx in itertools.product(MODES, (None, 5)):
        options = {"mode": mode, "include_last_offset": True, "padding_idx": padding_idx}
        got = rk.functional.embedding_bag(ids, _TABLE, offsets, **options)
        first = rk.functional.embedding_bag(ids[:3], _TABLE, offsets[:1], mode=mode)
        assert_matches(got, torch.cat([first, torch.zeros(1, 4)]))
        torchs = F.embedding_bag(ids, _TABLE, offsets, **options)
        assert_matches(torchs[:1], got[:1])
        theirs.add("ends" if not torchs[1].any() else "reaches" if torch.equal(torchs[1], _TABLE[3]) else "else")
    assert theirs == {"ends", "reaches"}


def test_weighted_means_go_beyond_torch(implementation: str) -> None:
    options = {"mode": "mean", "per_sample_weights": torch.tensor([0.5, 2.0, -1.0])}
    with pytest.raises(NotImplementedError, match="only supported for mode='sum'"):
        F.embedding_bag(_IDS, _TABLE, _OFFSETS, **options)
    got = rk.functional.embedding_bag(_IDS, _TABLE, _OFFSETS, **options)
    rows = _TABLE[_IDS] * options["per_sample_weights"].unsqueeze(1)
    assert_matches(got, torch.stack([rows[:2].sum(0) / 2, rows[2]]))


def test_messages_hold_torchs_words() -> None:
    """Code that looks for them finds them."""
    five = torch.zeros(2, 0, 0, 6, 6, dtype=torch.int64)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((five, _TABLE, five), {}, "input has to be 1D or 2D Tensor"),
        ((_IDS, _TABLE, five), {}, "offsets has to be a 1D Tensor"),
        ((_IDS, _TABLE.unsqueeze(0), _OFFSETS), {}, "weight has to be a 2D Tensor"),
        ((_IDS, _TABLE, _OFFSETS), {"padding_idx": 6}, "padding_idx must be within the number of embeddings"),
        ((_IDS, _TABLE, _OFFSETS), {"per_sample_weights": torch.ones(2)}, "same shape as the input"),
        (
            (_IDS, _TABLE, _OFFSETS),
            {"mode": "max", "per_sample_weights": torch.ones(3)},
            "only supported for mode='sum'",
        ),
    ]
    for args, kwargs, words in cases:
        for f in (F.embedding_bag, rk.functional.embedding_bag):
            with named(words), pytest.raises((RuntimeError, ValueError), match=words):
                f(*args, **kwargs)
    for module in (torch.nn.EmbeddingBag, rk.EmbeddingBag):
        with pytest.raises(AssertionError, match="padding_idx must be within num_embeddings"):
            module(6, 4, padding_idx=6)


def test_signatures_are_those_of_torch() -> None:
    for ours, theirs in (
        (rk.functional.embedding_bag, F.embedding_bag),
        (rk.EmbeddingBag.__init__, torch.nn.EmbeddingBag.__init__),
        (rk.EmbeddingBag.forward, torch.nn.EmbeddingBag.forward),
    ):
        got, wanted = (list(inspect.signature(f).parameters.values()) for f in (ours, theirs))
        assert [(p.name, p.default, p.kind) for p in got] == [(p.name, p.default, p.kind) for p in wanted]


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
