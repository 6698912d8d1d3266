"""Every public module: compiled, exported, traced, saved, copied, in workers and threads, on meta, cast, misused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance_support import ERRORS, MODULES, ModuleResults, in_threads, public_modules, same

import recsys_kernels as rk
from recsys_kernels import testing

pytestmark = pytest.mark.usefixtures("one_thread")
LINEAR = [name for name, sample in MODULES.items() if sample.inputs(7)[0].is_floating_point()]
TABLES = [name for name in MODULES if name not in LINEAR]


def made(name: str, seed: int = 1) -> torch.nn.Module:
    torch.manual_seed(seed)
    return MODULES[name].make()


def inputs(name: str, count: int = 12) -> tuple[Any, ...]:
    return MODULES[name].inputs(count)


def result(module: torch.nn.Module, name: str, count: int = 12) -> torch.Tensor:
    with torch.no_grad():
        return module(*inputs(name, count))


def parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: parameter.detach() for key, parameter in module.named_parameters() if parameter.requires_grad}


TRAINED = [name for name in LINEAR if parameters(made(name))]


def assert_same(name: str, one: torch.Tensor, two: torch.Tensor) -> None:
    """The same bits; of sparse layers, which have several kernels for one product, about the same."""
    tolerance = {"rtol": 2e-5, "atol": 2e-6} if name.startswith("sparse") else {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(one, two, **tolerance)


def test_every_module_has_samples() -> None:
    classes = {type(made(name)) for name in MODULES}
    assert classes == public_modules(), "a module without samples is not tested"
    public = {value for name in rk.__all__ if isinstance(value := getattr(rk, name), type)}
    assert {kind for kind in public if issubclass(kind, torch.nn.Module)} <= classes
    assert {module.activation for name in MODULES if isinstance(module := made(name), rk.Int8Linear)} == {
        "dynamic",
        "static",
        "weight_only",
    }
    sparse = [module for name in MODULES if isinstance(module := made(name), rk.SparseLinear)]
    for floats in (True, False):
        patterns = {module.pattern for module in sparse if (module.activation is None) == floats}
        assert patterns == set(testing.SPARSE_PATTERNS)
    assert len(LINEAR) >= 20
    assert len(TABLES) >= 9


# ---- compiled, exported and traced ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_compiled(name: str) -> None:
    """Whole graphs, any number of rows, gradients; of a module that was used before and of one that was not."""
    for used in (False, True):
        torch.compiler.reset()
        module = made(name)
        if used:
            module(*inputs(name, 10))
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
        for count in (12, 15):
            wanted, out = module(*inputs(name, count)), compiled(*inputs(name, count))
            assert_same(name, out, wanted)
            if not out.requires_grad:
                continue
            grads = []
            for value in (wanted, out):
                module.zero_grad()
                value.square().sum().backward()
                grads.append([parameter.grad for parameter in module.parameters()])
            for one, two in zip(*grads, strict=True):
                assert_same(name, one, two)


@pytest.mark.parametrize("name", MODULES)
def test_exported(name: str, tmp_path: Path) -> None:
    """With a dynamic number of rows, also from a file."""
    module = made(name).eval()
    args = inputs(name)
    dynamic = ({0: torch.export.Dim("count", min=7)}, *[None] * (len(args) - 1))
    program = torch.export.export(module, args, dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "module.pt2")
    loaded = torch.export.load(tmp_path / "module.pt2")
    for count in (12, 15):
        wanted = module(*inputs(name, count))
        for run in (program.module(), loaded.module()):
            assert_same(name, run(*inputs(name, count)), wanted)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", LINEAR)
def test_traced(name: str, tmp_path: Path) -> None:
    """By ``torch.jit.trace``, checked by torch, from a file; with a gradient where the layer is traced in training."""
    module = made(name)
    for training in (True, False):
        module.train(training)
        result(module, name)  # what was made of the layer must not become a constant
        traced = torch.jit.trace(module, inputs(name))
        torch.jit.save(traced, tmp_path / "module.pt")
        loaded = torch.jit.load(tmp_path / "module.pt")
        for run in (traced, loaded):
            wanted = result(module, name, 15)
            torch.testing.assert_close(run(*inputs(name, 15)).detach(), wanted, rtol=2e-5, atol=2e-6)
        if training and name in TRAINED:
            module(*inputs(name)).square().sum().backward()
            traced_grads = torch.autograd.grad(loaded(*inputs(name)).square().sum(), list(loaded.parameters()))
            sizes = [sorted(float(grad.norm()) for grad in traced_grads)]
            sizes.append(sorted(float(parameter.grad.norm()) for parameter in module.parameters()))
            torch.testing.assert_close(*sizes, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TABLES)
def test_traced_tables(name: str) -> None:
    module = made(name)
    with torch.no_grad():
        traced = torch.jit.trace(module, inputs(name), check_trace=False)
        for count in (12, 15):
            assert same(traced(*inputs(name, count)), result(module, name, count))


# ---- state and copies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_state_dict(name: str, assign: bool, tmp_path: Path) -> None:
    """The state is all that a module is: another one that loads it, also from a file, gives the same bits."""
    module, other = made(name), made(name, seed=2)
    wanted = result(module, name)
    assert not same(result(other, name), wanted)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert other.load_state_dict(state, strict=True, assign=assign) == ([], [])
    assert same(result(other, name), wanted)
    assert all(same(tensor, module.state_dict()[key]) for key, tensor in other.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})
    assert same(result(other, name), wanted)


@pytest.mark.parametrize("name", MODULES)
def test_copies(name: str) -> None:
    """Copies hold no packed layers, and share nothing with the original."""
    module = made(name)
    unused = len(pickle.dumps(module))
    wanted = result(module, name)
    assert len(pickle.dumps(module)) == unused
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.deepcopy(module.eval())):
        assert same(result(other, name), wanted)
        other.load_state_dict(made(name, seed=2).state_dict())
        assert not same(result(other, name), wanted)
        assert same(result(module, name), wanted)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_loader_workers(start: str) -> None:
    """Modules that were used before give the same in the worker processes of a DataLoader."""
    modules = [made(name) for name in MODULES]
    wanted = [result(module, name) for module, name in zip(modules, MODULES, strict=True)]
    data = ModuleResults(modules, [inputs(name) for name in MODULES])
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context=start)
    results = list(loader)
    assert len(results) == len(MODULES)
    for name, one, two in zip(MODULES, results, wanted, strict=True):
        assert same(one, two), name


@pytest.mark.parametrize("name", MODULES)
def test_threads(name: str) -> None:
    """The first calls of a module come from several threads at once."""
    wanted = [result(made(name), name, count) for count in (12, 9, 30)]
    module = made(name)

    def calls() -> list[torch.Tensor]:
        return [result(module, name, count) for count in (12, 9, 30)]

    assert all(same(results, wanted) for results in in_threads(calls))


# ---- devices and types ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_meta_device(name: str) -> None:
    module = made(name)
    wanted = result(module, name)
    meta = copy.deepcopy(module).to("meta")
    for _ in range(2):  # what was made of the module before must not be used
        on_meta = tuple(arg.to("meta") for arg in inputs(name))
        out = meta(*on_meta)
        assert out.is_meta
        assert (out.shape, out.dtype) == (wanted.shape, wanted.dtype)
        for grad in (True, False):
            # The memory of such a result would be whatever was there.
            with torch.set_grad_enabled(grad), pytest.raises(ERRORS, match="meta"):
                meta(*inputs(name))
            with torch.set_grad_enabled(grad), pytest.raises(ERRORS, match="meta"):
                module(*on_meta)
    meta.load_state_dict(module.state_dict(), assign=True)
    assert same(result(meta, name), wanted)


@pytest.mark.parametrize("name", MODULES)
def test_autocast(name: str) -> None:
    """As torch's counterparts: layers give the type of autocast, look-ups that of their table."""
    module = made(name)
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            out = module(*inputs(name))
        assert out.dtype == (torch.bfloat16 if name in LINEAR else torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with_grad = module(*inputs(name))
        assert with_grad.dtype == out.dtype
        wanted = result(module, name)
        torch.testing.assert_close(out.float(), wanted, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(with_grad.detach().float(), wanted, rtol=2e-2, atol=2e-2)
    if out.requires_grad:
        with_grad.float().sum().backward()
        assert all(parameter.grad.dtype == parameter.dtype for parameter in module.parameters())


@pytest.mark.parametrize("name", MODULES)
def test_float64(name: str) -> None:
    """A module either has float64, as torch's, or says no before it changes anything."""
    module = made(name)
    wanted = result(module, name)
    if name in TABLES:
        try:
            module.double()
        except (ValueError, TypeError) as error:
            reason = str(error)
        else:
            assert result(module, name).dtype == torch.float64
            return
    else:
        with pytest.raises(ValueError, match="float64") as raised:
            module.double()
        reason = str(raised.value)
    assert "float64" in reason
    assert same(result(module, name), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_half_types(name: str, dtype: torch.dtype) -> None:
    module = made(name)
    wanted = result(module, name)
    module.to(dtype)
    out = result(module, name)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), wanted, rtol=2e-2, atol=2e-2)


# ---- wrong input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_wrong_input(name: str) -> None:
    """Refused with a reason, by a module that was used before and by one that was not."""
    args = inputs(name)
    first = args[0]
    wrong: dict[str, Any] = {
        "list": first.tolist(),
        "complex": first.to(torch.complex64),
    }
    if name in LINEAR:
        wrong |= {
            "0-d": first.flatten()[0],
            "None": None,
            "integers": torch.zeros(12, 40, dtype=torch.int64),
            "float64": first.double(),
            "too wide": torch.zeros(12, 41),
            "too narrow": torch.zeros(3, 12, 39),
        }
    else:
        wrong |= {"floats": first.float(), "out of range": first + 1000, "negative": first - 1000}
    for used in (False, True):
        module = made(name)
        if used:
            result(module, name), result(module, name)
        for what, bad in wrong.items():
            for grad in (True, False):
                with torch.set_grad_enabled(grad), pytest.raises(ERRORS) as raised:
                    module(bad, *args[1:])
                assert str(raised.value), what
                if what in ("list", "None"):
                    assert isinstance(raised.value, TypeError), (what, raised.value)
                    assert ("list" if what == "list" else "None") in str(raised.value)
                elif what in ("too wide", "too narrow"):
                    assert "40" in str(raised.value)
                    assert str(bad.shape[-1]) in str(raised.value)


# ---- functorch ------------------------------------------------------------------------------------------------------


def test_most_modules_are_trained() -> None:
    assert len(TRAINED) >= 20


@pytest.mark.parametrize("name", TRAINED)
def test_functional_gradients(name: str) -> None:
    """``torch.func.grad`` and ``vjp`` give what ``backward`` gives."""
    module = made(name)
    trained, (x,) = parameters(module), inputs(name)

    def loss(given: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, given, (rows,)).square().sum()

    x_grad = x.clone().requires_grad_()
    module(x_grad).square().sum().backward()
    of_parameters, of_input = torch.func.grad(loss, argnums=(0, 1))(trained, x)
    testing.assert_matches(of_input, x_grad.grad)
    for key, value in of_parameters.items():
        testing.assert_matches(value, module.get_parameter(key).grad)
    _, pull = torch.func.vjp(lambda rows: loss(trained, rows), x)
    testing.assert_matches(pull(torch.tensor(1.0))[0], x_grad.grad)


@pytest.mark.parametrize("name", LINEAR)
def test_tangents(name: str) -> None:
    """Forward mode agrees with reverse mode: <J v, u> = <v, J' u>."""
    module = made(name)
    (x,), (v,) = inputs(name), inputs(name, 13)
    v = v[:12]
    out, tangent = torch.func.jvp(module, (x,), (v,))
    torch.testing.assert_close(out, module(x))
    assert tangent.abs().max() > 0
    u = torch.randn_like(tangent)
    _, pull = torch.func.vjp(module, x)
    torch.testing.assert_close((tangent * u).sum(), (pull(u)[0] * v).sum(), rtol=1e-4, atol=1e-4)
    with torch.autograd.forward_ad.dual_level():
        dual = module(torch.autograd.forward_ad.make_dual(x, v))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)


@pytest.mark.parametrize("name", TRAINED)
def test_tangents_of_parameters(name: str) -> None:
    module = made(name)
    trained, (x,) = parameters(module), inputs(name)
    torch.manual_seed(5)
    v = {key: torch.randn_like(value) for key, value in trained.items()}

    def call(given: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(module, given, (x,))

    _, tangent = torch.func.jvp(call, (trained,), (v,))
    u = torch.randn_like(tangent)
    _, pull = torch.func.vjp(call, trained)
    (pulled,) = pull(u)
    expected = sum((pulled[key] * v[key]).sum() for key in v)
    torch.testing.assert_close((tangent * u).sum(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LINEAR)
def test_jacobians(name: str) -> None:
    module = made(name)
    row = inputs(name)[0][0]
    forward, reverse = torch.func.jacfwd(module)(row), torch.func.jacrev(module)(row)
    assert forward.shape == (9, 40)
    torch.testing.assert_close(forward, reverse, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LINEAR)
def test_vmap(name: str) -> None:
    """Over the input; of one row a call, and of several."""
    module = made(name)
    x = inputs(name)[0]
    wanted = module(x)
    torch.testing.assert_close(torch.func.vmap(module)(x), wanted)
    torch.testing.assert_close(torch.func.vmap(module)(x.reshape(3, 4, 40)), wanted.reshape(3, 4, 9))
    torch.testing.assert_close(torch.func.vmap(module, in_dims=1)(x.t()), wanted)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(module)(x), wanted)


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_of_every_example(name: str) -> None:
    module = made(name)
    trained, (x,) = parameters(module), inputs(name, 7)

    def loss(given: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, given, (row,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, x)
    for number, row in enumerate(x):
        module.zero_grad()
        module(row).square().sum().backward()
        for key, value in found.items():
            testing.assert_matches(value[number], module.get_parameter(key).grad)


@pytest.mark.parametrize("name", TRAINED)
def test_second_derivatives(name: str) -> None:
    """A gradient's own gradient agrees with differences of the gradient, through a straight-through layer as well."""
    module = made(name)
    x = inputs(name)[0].requires_grad_()
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    (grad,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    again = torch.autograd.grad((grad * v).sum(), [x, *module.parameters()])
    assert all(torch.isfinite(tensor).all() for tensor in again)
    assert again[0].abs().max() > 0
    # The Hessian is symmetric: <H v, w> = <H w, v>.
    w = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    (other,) = torch.autograd.grad(
        (torch.autograd.grad(module(x).square().sum(), x, create_graph=True)[0] * w).sum(), x
    )
    torch.testing.assert_close((again[0] * w).sum(), (other * v).sum(), rtol=1e-3, atol=1e-3)
