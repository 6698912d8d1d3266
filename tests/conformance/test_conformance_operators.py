"""Every operator of every family: what torch asks of it, threads, the meta device, autocast and wrong arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance_support import ERRORS, OPERATORS, calls, copied, in_threads, operator, run, same

from recsys_kernels.backends import registry, selection

pytestmark = pytest.mark.usefixtures("one_thread")

# The length of a pack depends on where the weights are.
SIZED_BY_VALUES = ("sparse_pack", "sparse_repack")
# Modules call these directly, so that the operators themselves give the type of autocast.
HEED_AUTOCAST = ("int8_chain", "sparse_packed")
# Arguments of the samples that an operator does not read: scales of float tables, and places of no value.
NOT_READ = {("embedding_bag_collection", "scale_bias"), ("sparse_repack", "values")}
# Operators whose references take numbers of any type. Their kernels do not.
ANY_NUMBERS = ("embedding_bag_weights_backward", "quantized_embedding_bag", "quantize_rowwise")


def tensors_of(args: tuple[Any, ...]) -> list[int]:
    """Where the tensors, and lists of tensors, are among the arguments."""
    return [
        number
        for number, arg in enumerate(args)
        if isinstance(arg, torch.Tensor) or (isinstance(arg, list) and any(isinstance(t, torch.Tensor) for t in arg))
    ]


def with_tensor(args: tuple[Any, ...], number: int, change: Any) -> tuple[Any, ...]:
    """The arguments with one tensor, or the tensors of one list, changed."""
    changed = torch.utils._pytree.tree_map_only(torch.Tensor, change, args[number])
    return (*args[:number], changed, *args[number + 1 :])


def largest(name: str) -> tuple[Any, ...]:
    """The sample whose tensors hold the most."""

    def elements(args: tuple[Any, ...]) -> int:
        leaves = torch.utils._pytree.tree_leaves(args)
        return sum(leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor))

    return max(calls()[name], key=elements)


def test_every_operator_has_samples() -> None:
    defined = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("recsys_kernels::")}
    assert {name.removeprefix("recsys_kernels::") for name in defined} == set(OPERATORS)
    assert set(calls()) == set(OPERATORS), "an operator without samples is not tested"


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    """torch's own checks of schemas, aliasing, fake kernels and tracing."""
    found = calls()[name]
    some = found[:: -(-len(found) // 10)]
    assert len(some) >= 2
    for args in some:
        torch.library.opcheck(operator(name), copied(args))


@pytest.mark.parametrize("name", OPERATORS)
def test_fake_kernels_give_the_shape_and_type_of_the_real_ones(implementation: str, name: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    for args in calls()[name]:
        real = selection.implementation(name, torch.empty(0))(*copied(args))
        with FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True) as mode:
            fake_args = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args)
            fake = operator(name)(*fake_args)
        results = (real, fake) if isinstance(real, tuple) else ((real,), (fake,))
        for one, two in zip(*results, strict=True):
            assert (one is None) == (two is None)
            if name in SIZED_BY_VALUES:
                assert (one.dim(), one.dtype, one.stride()) == (two.dim(), two.dtype, two.stride())
            elif one is not None:
                assert (one.shape, one.dtype, one.stride()) == (two.shape, two.dtype, two.stride())


class Call(torch.nn.Module):
    """A call of an operator whose tensors are the inputs of a module."""

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.run, self.args, self.places = operator(name), args, tensors_of(args)

    def tensors(self) -> tuple[Any, ...]:
        return tuple(copied(self.args[number]) for number in self.places)

    def forward(self, *tensors: Any) -> Any:
        args = list(self.args)
        for number, tensor in zip(self.places, tensors, strict=True):
            args[number] = tensor
        out = self.run(*args)
        return [args[number] for number in self.places] if out is None else out


@pytest.mark.parametrize("name", OPERATORS)
def test_compiled_and_exported(name: str) -> None:
    torch.compiler.reset()
    call = Call(name, largest(name))
    wanted = call(*call.tensors())
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert same(compiled(*call.tensors()), wanted)
    program = torch.export.export(call, call.tensors())
    assert same(program.module()(*call.tensors()), wanted)


def test_threads() -> None:
    """Calls from several threads at once give what they give one after the other."""
    wanted = {name: [run(name, args) for args in calls()[name][:6]] for name in OPERATORS}

    def all_again() -> dict[str, Any]:
        return {name: [run(name, args) for args in calls()[name][:6]] for name in OPERATORS}

    for results in in_threads(all_again):
        for name in OPERATORS:
            assert all(same(one, two) for one, two in zip(results[name], wanted[name], strict=True)), name


@pytest.mark.parametrize("name", OPERATORS)
def test_meta_device(name: str) -> None:
    args = largest(name)
    on_meta = torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), args)
    if name in SIZED_BY_VALUES:
        with pytest.raises(ERRORS):
            operator(name)(*on_meta)
    else:
        out = operator(name)(*on_meta)
        results = [out] if isinstance(out, torch.Tensor) else out or ()
        wanted = run(name, args)
        for one, two in zip(results, wanted, strict=False):
            assert one.is_meta
            assert (one.shape, one.dtype) == (two.shape, two.dtype)
    # Where some tensors hold values and others do not, no result could.
    places = tensors_of(args)
    assert len(places) >= 2
    for number in places:
        mixed = with_tensor(copied(args), number, lambda tensor: tensor.to("meta"))
        with pytest.raises(ERRORS, match="meta"):
            operator(name)(*mixed)


@pytest.mark.parametrize("name", OPERATORS)
def test_autocast(name: str) -> None:
    """An operator gives the type that it is asked for, but for those that modules call directly."""
    args = largest(name)
    if name in HEED_AUTOCAST:
        args = (*args[:-1], torch.float32)
    wanted = run(name, args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(name, args)
    if name not in HEED_AUTOCAST:
        assert same(out, wanted)
        return
    assert out[0].dtype == torch.bfloat16
    assert same(out, [wanted[0].to(torch.bfloat16)])


@pytest.mark.parametrize("name", OPERATORS)
def test_wrong_arguments_are_refused(implementation: str, name: str) -> None:
    """Tensors of types that no operator takes, of no dimension, and no tensors at all."""
    args = largest(name)
    kernel = selection.implementation(name, torch.empty(0))
    changes = {
        "complex": lambda tensor: tensor.to(torch.complex64),
        "0-d": lambda tensor: tensor.new_zeros(()),
    }
    for number in tensors_of(args):
        for change, make in changes.items():
            if (name, registry.operators[name].names[number]) in NOT_READ:
                continue
            if change == "complex" and implementation == "reference" and name in ANY_NUMBERS:
                continue
            with pytest.raises(ERRORS) as raised:
                kernel(*with_tensor(copied(args), number, make))
            assert str(raised.value), f"{change} argument {number}: an error without a message"
        with pytest.raises(ERRORS):
            operator(name)(*args[:number], "a string", *args[number + 1 :])
    with pytest.raises(ERRORS):
        operator(name)(*args, 1, 2)
