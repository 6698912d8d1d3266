"""SparseMLP: what its layers give one by one, whatever happens to them in between."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sparse_support import DTYPES, RANGE, SCHEMES, float_layer, rows, sparse

import recsys_kernels as rk
from recsys_kernels.ops.linear.sparse import crossover
from recsys_kernels.ops.linear.sparse import layer as linear_module
from recsys_kernels.ops.linear.sparse import mlp as mlp_module
from recsys_kernels.ops.linear.sparse.crossover import FEW_ROWS

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTHS = (41, 24, 17, 1)
KINDS = (None, *SCHEMES)


def layers(kind: str | None = None, pattern: str = "unstructured", dtype: torch.dtype = torch.float32) -> list[Any]:
    new = []
    for number, (k, n, epilogue) in enumerate(zip(WIDTHS, WIDTHS[1:], ("relu", "silu", None), strict=False)):
        layer = sparse(pattern, float_layer(k, n, bias=number != 1), 0.7, epilogue=epilogue)
        if kind is not None:
            layer = layer.quantize(kind, input_range=RANGE if kind == "static" else None)
        new.append(layer.to(dtype))
    return new


def mlp(kind: str | None = None, **options: Any) -> rk.SparseMLP:
    return rk.SparseMLP(*layers(kind, **options)).eval()


def one_by_one(module: rk.SparseMLP, input: torch.Tensor) -> torch.Tensor:
    """A copy of the layers, which nothing was seen of, in a plain Sequential."""
    with torch.no_grad():
        return torch.nn.Sequential(*copy.deepcopy(list(module)))(input)


def assert_as_one_by_one(module: rk.SparseMLP, width: int = WIDTHS[0]) -> None:
    with torch.no_grad():
        for count in (1, 9, 1, 9):
            assert torch.equal(module(rows(count, width)), one_by_one(module, rows(count, width)))


@pytest.fixture
def layer_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[rk.SparseLinear]]:
    """Layers that are called by themselves."""
    calls: list[rk.SparseLinear] = []
    forward = rk.SparseLinear.forward

    def counted(self: rk.SparseLinear, input: torch.Tensor) -> torch.Tensor:
        calls.append(self)
        return forward(self, input)

    monkeypatch.setattr(rk.SparseLinear, "forward", counted)
    return iter([calls])  # type: ignore[return-value]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", ["unstructured", "block4x1", "2:4"])
def test_it_gives_what_its_layers_give(implementation: str, kind: str | None, pattern: str) -> None:
    module = mlp(kind, pattern=pattern)
    for shape in ((1,), (4,), (5,), (64,), (0,), (), (2, 3), (2, 0)):
        x = torch.randn(*shape, WIDTHS[0], generator=torch.Generator().manual_seed(3))
        wanted = one_by_one(module, x)
        with torch.no_grad():
            for _ in range(3):
                out = module(x)
                assert out.shape == (*shape, 1)
                assert torch.equal(out, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types(implementation: str, dtype: torch.dtype) -> None:
    for kind in KINDS:
        module = mlp(kind, dtype=dtype)
        for given in DTYPES:
            with torch.no_grad():
                for _ in range(2):
                    out = module(rows(3).to(given))
            assert out.dtype == dtype
            assert torch.equal(out, one_by_one(module, rows(3).to(given)))


def test_layers_are_called_once_for_few_and_once_for_many_rows(layer_calls: Any) -> None:
    calls = next(layer_calls)
    module = mlp()
    with torch.no_grad():
        for count, seen in ((1, 3), (2, 3), (FEW_ROWS, 3), (FEW_ROWS + 1, 6), (64, 6), (1, 6), (0, 6)):
            module(rows(count))
            assert len(calls) == seen
        module(rows(6).reshape(2, 3, 41))
        assert len(calls) == 9
    module(rows(1))  # recorded for the gradients of the layers
    assert len(calls) == 12
    module.requires_grad_(False)
    for _ in range(3):  # trained layers are packed once more
        module(rows(1))
        assert len(calls) == 15
    module(rows(1).requires_grad_())
    assert len(calls) == 18
    with torch.no_grad(), rk.backend("reference"):
        module(rows(1))
    assert len(calls) == 21


def load(module: Any) -> None:
    other = sparse(linear=float_layer(24, 17, bias=False), sparsity=0.5)
    module[1].load_state_dict({name: value * 1 for name, value in other.state_dict().items()})


def move(module: Any) -> None:
    crow, col = module[1].crow_indices, module[1].col_indices
    col[(crow[1:] - 1).long()] = 23  # the last one of every row


def replace(module: Any) -> None:
    module[2].bias = torch.nn.Parameter(torch.ones(1))


def train(module: Any) -> None:
    optimizer = torch.optim.Adam(module.parameters(), 0.1, fused=True)
    module(rows(9)).square().sum().backward()
    optimizer.step()


CHANGES: dict[str, Any] = {
    "values": lambda module: module[1].values.detach().mul_(2),
    "bias": lambda module: module[0].bias.detach().add_(1),
    "a column": move,
    "another bias": replace,
    "no bias": lambda module: setattr(module[0], "bias", None),
    "a state": load,
    "the whole state": lambda module: module.load_state_dict(mlp().state_dict()),
    "a fused optimizer": train,
    "half": lambda module: module.half(),
    "half a layer": lambda module: module[1].half(),
    "to and back": lambda module: module.to("meta").to_empty(device="cpu").load_state_dict(mlp().state_dict()),
    "another layer": lambda module: module.__setitem__(1, sparse(linear=float_layer(24, 17))),
    "a function": lambda module: module.__setitem__(1, torch.nn.Linear(24, 17)),
    "one more": lambda module: module.append(torch.nn.Sigmoid()),
    "one less": lambda module: module.__delitem__(2),
    "another place": lambda module: setattr(module, "2", torch.nn.Flatten()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_sees_what_changes(change: str) -> None:
    module = mlp()
    assert_as_one_by_one(module)
    before = module(rows(9)).detach()
    CHANGES[change](module)
    if change != "to and back":  # the same numbers, perhaps
        after = module(rows(9)).detach()
        assert not torch.equal(after, before) or after.dtype != before.dtype or change == "the whole state"
    assert_as_one_by_one(module)


@pytest.mark.parametrize("kind", SCHEMES)
def test_it_sees_what_changes_in_int8_layers(kind: str) -> None:
    module = mlp(kind)
    assert_as_one_by_one(module)
    changes = [
        lambda: module[0].values.neg_(),
        lambda: module[1].weight_scale.mul_(2),
        lambda: setattr(module[2], "weight_scale", module[2].weight_scale * 3),
        lambda: module.bfloat16(),
    ]
    if kind == "static":
        changes += [
            lambda: module[0].input_qparams[0].mul_(1.5),
            lambda: setattr(module[2], "input_qparams", module[2].input_qparams * 2),
        ]
    for change in changes:
        before = module(rows(9)).detach()
        with torch.no_grad():
            change()
        assert_as_one_by_one(module)
        after = module(rows(9)).detach()
        assert after.dtype != before.dtype or not torch.equal(before, after)
        assert_as_one_by_one(module)


def test_gradients_are_those_of_the_layers() -> None:
    module = mlp()
    assert_as_one_by_one(module)
    twin = torch.nn.Sequential(*copy.deepcopy(list(module)))
    x, y = rows(9).requires_grad_(), rows(9).requires_grad_()
    module(x).square().sum().backward()
    twin(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)  # type: ignore[arg-type]
    for one, two in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)  # type: ignore[arg-type]
    module.requires_grad_(False)
    assert module(x).requires_grad
    assert not module(rows(9)).requires_grad


def test_a_parameter_between_frozen_layers_gets_its_gradient() -> None:
    first, second, third = (layer.requires_grad_(False) for layer in layers())
    between = torch.nn.PReLU()
    module = rk.SparseMLP(first, second, between, third)
    assert_as_one_by_one(module)
    module(rows(3)).sum().backward()
    assert between.weight.grad is not None
    assert between.weight.grad.abs() > 0


def test_hooks_of_the_layers_are_called() -> None:
    module = mlp()
    with torch.no_grad():
        plain = module(rows(2))
        seen: list[Any] = []
        for kind, hook in (
            ("register_forward_hook", lambda layer, args, out: seen.append(out) or out + 1),
            ("register_forward_pre_hook", lambda layer, args: seen.append(args) or (args[0] + 1,)),
        ):
            handle = getattr(module[1], kind)(hook)
            for _ in range(3):
                assert not torch.equal(module(rows(2)), plain)
            assert len(seen) == 3
            seen.clear()
            handle.remove()
            for _ in range(2):
                assert torch.equal(module(rows(2)), plain)
        assert not seen


def test_other_modules_are_called() -> None:
    torch.manual_seed(0)
    dense = rk.Int8MLP.from_float(
        torch.nn.Sequential(torch.nn.Linear(24, 30), torch.nn.ReLU(), torch.nn.Linear(30, 24))
    )
    first, second, third = layers()
    module = rk.SparseMLP(first, dense, second, torch.nn.LayerNorm(17), third).eval()
    assert_as_one_by_one(module)
    with torch.no_grad():
        before = module(rows(3))
        dense[0].weight.neg_()
        assert not torch.equal(module(rows(3)), before)
    assert_as_one_by_one(module)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_run_dense(monkeypatch: pytest.MonkeyPatch, layer_calls: Any, kind: str | None) -> None:
    monkeypatch.setattr(crossover, "limits", lambda *args: (0.0, 1.0))  # few rows
    calls = next(layer_calls)
    module = mlp(kind)
    assert_as_one_by_one(module)
    calls.clear()
    with torch.no_grad():
        module(rows(2)), module(rows(9))
    assert not calls
    for bad in (rows(2, 40), rows(2).double()):
        with pytest.raises(RuntimeError), torch.no_grad():
            module(bad)


def test_wrong_inputs_raise_what_the_layers_raise(implementation: str) -> None:
    module = mlp()
    assert_as_one_by_one(module)
    for bad in (rows(2, 40), rows(9, 42), rows(2).double(), rows(2).long(), torch.tensor(1.0)):
        with torch.no_grad():
            with pytest.raises(RuntimeError) as wanted:
                module[0](bad)
            with pytest.raises(RuntimeError) as found:
                module(bad)
        assert str(found.value) == str(wanted.value)


def test_copies_and_state() -> None:
    module = mlp("static")
    plain = torch.nn.Sequential(*layers("static"))
    assert list(module.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        wanted = module(rows())
        module(rows())
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert type(other) is rk.SparseMLP
            assert other._known is None
            assert torch.equal(other(rows()), wanted)
        plain[0].values.zero_()
        plain.load_state_dict(module.state_dict())
        assert torch.equal(plain(rows()), wanted)
        part = module[:2]
        assert type(part) is rk.SparseMLP
        assert part(rows()).shape == (7, 17)


def test_inference_tensors(layer_calls: Any) -> None:
    calls = next(layer_calls)
    with torch.inference_mode():
        module = mlp()
        first = module(rows())
        assert torch.equal(module(rows()), first)
        assert len(calls) == 3
        module[0].values.mul_(2)
        assert not torch.equal(module(rows()), first)
    assert_as_one_by_one(module)


@pytest.mark.parametrize("kind", [None, "dynamic"])
def test_compiled_and_exported(kind: str | None) -> None:
    torch.compiler.reset()
    module = mlp(kind)
    with torch.no_grad():
        module(rows()), module(rows())
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            assert torch.equal(compiled(rows()), module(rows()))
        module[0].values.neg_()
        assert torch.equal(compiled(rows()), module(rows()))
        program = torch.export.export(module, (rows(),), dynamic_shapes=({0: torch.export.Dim("count", min=2)},))
        assert set(program.state_dict) == set(module.state_dict())
        torch.testing.assert_close(program.module()(rows(30)), module(rows(30)))


def test_what_is_refused() -> None:
    first, second, _ = layers()
    with pytest.raises(ValueError, match="at least one SparseLinear"):
        rk.SparseMLP()
    with pytest.raises(ValueError, match="at least one SparseLinear"):
        rk.SparseMLP(torch.nn.Linear(3, 4))
    with pytest.raises(ValueError, match="layer 1 takes 41 features, but the one before it gives 17"):
        rk.SparseMLP(second, first)
    with pytest.raises(TypeError):
        rk.SparseMLP(first, torch.relu)  # type: ignore[arg-type]


def test_names() -> None:
    assert mlp_module.PACKED is linear_module.PACKED
    assert rk.ops.linear.sparse.SparseMLP is rk.SparseMLP is mlp_module.SparseMLP
