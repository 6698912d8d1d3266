"""Sparse layers that run one after the other, checked together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ....backends import selection
from . import prepared as kept
from .crossover import FEW_ROWS
from .layer import DENSE, PACKED, Seen, SparseLinear
from .prepared import runs_packed
from .spec import SparseLayer

# What runs a member, and what else than the input it takes: a pack, a width and a number for a type.
_Step = tuple[Callable[..., torch.Tensor], Any, int, Any]


class _Known(NamedTuple):
    """Members as they were when they ran one by one, and how the sparse ones ran.

    Attributes:
        members: with what the sparse ones were packed from, and into.
        tensors, versions: of the sparse ones, and how often each had been written to.
        steps: of all members, for few and for many rows of input, where these have run.
    """

    members: list[tuple[Any, kept.Prepared | None, Seen | None]]
    tensors: list[torch.Tensor]
    versions: list[int]
    steps: list[list[_Step] | None]


class SparseMLP(torch.nn.Sequential):
    """A ``torch.nn.Sequential`` whose :class:`SparseLinear` layers need less time between them.

    On the CPU, where no gradient is needed, their packed copies run straight after one check that all of them are
    fresh; other modules among them are called. Results, gradients, compiled code and state (``state_dict``) are those
    of the Sequential.

    Args:
        layers: :class:`SparseLinear` layers, each as wide as the one before it gives, and any modules between them.

    Raises:
        TypeError: not a module.
        ValueError: no sparse layer, or widths that do not fit.
    """

    def __init__(self, *layers: torch.nn.Module) -> None:
        super().__init__(*layers)
        members = list(self._modules.values())
        if not any(isinstance(member, SparseLinear) for member in members):
            raise ValueError("a SparseMLP needs at least one SparseLinear")
        for number in range(1, len(members)):
            first, second = members[number - 1], members[number]
            if isinstance(first, SparseLinear) and isinstance(second, SparseLinear):
                given, taken = first.out_features, second.in_features
                if given != taken:
                    raise ValueError(f"layer {number} takes {taken} features, but the one before it gives {given}")
        self._known: _Known | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features of the first layer] to [..., out_features of the last]; errors as in :class:`SparseLinear`.

        Hooks of the layers are called.
        """
        if torch.compiler.is_compiling():
            return super().forward(input)
        known = self._known
        if (
            known is not None
            and input.dim() == 2
            and (steps := known.steps[input.shape[0] > FEW_ROWS]) is not None
            and self._is_current(known)
            and selection.implementation("sparse_packed", input) is PACKED
            and not (torch.is_grad_enabled() and self._has_grad(input))
        ):
            for run, pack, width, dtype in steps:
                input = run(input, pack, width, dtype)
            return input
        if input.dim() == 2 and self._runs_packed() and not (torch.is_grad_enabled() and self._has_grad(input)):
            return self._run_and_note(input)
        return super().forward(input)

    def _has_grad(self, input: torch.Tensor) -> bool:
        return input.requires_grad or any(map(_is_trained, self._modules.values()))

    def _runs_packed(self) -> bool:
        return all(runs_packed(m.values) for m in self._modules.values() if isinstance(m, SparseLinear))

    def _is_current(self, known: _Known) -> bool:
        """Whether the members are the ones that were seen, and :meth:`SparseLinear.is_as` holds for the sparse ones."""
        members: dict[str, Any] = self._modules
        if len(members) != len(known.members):
            return False
        # Without a call for each layer, and versions in a row.
        for member, (one, prepared, seen) in zip(members.values(), known.members):  # noqa: B905 (strict=True takes time)
            if member is not one:
                return False
            if seen is None:
                continue
            values, _, crow, _, col, _, scale, _, bias, _, qparams, _, trained, addresses = seen
            buffers, parameters = member._buffers, member._parameters
            if (
                member._prepared is not prepared  # a new one once the layer was moved or loaded
                or (parameters if "values" in parameters else buffers)["values"] is not values
                or buffers["crow_indices"] is not crow
                or buffers["col_indices"] is not col
                or buffers["weight_scale"] is not scale
                or parameters["bias"] is not bias
                or buffers["input_qparams"] is not qparams
                or member._forward_pre_hooks
                or member._forward_hooks
                or values.data_ptr() != addresses[0]
                or (bias is not None and bias.data_ptr() != addresses[1])
                or (member._trains and not member._have_values(trained))
            ):
                return False
        # Those that were seen are those that are there.
        return [tensor._version for tensor in known.tensors] == known.versions

    def _run_and_note(self, input: torch.Tensor) -> torch.Tensor:
        """Runs the members one by one, and notes how, for the next call."""
        members = list(self._modules.values())
        many = input.shape[0] > FEW_ROWS
        steps: list[_Step] = []
        for member in members:
            given, input = input, member(input)
            step = _step(member, given, many)
            if step is not None:
                steps.append(step)
        if len(steps) == len(members):
            self._note(members, many, steps)
        return input

    def _note(self, members: list[torch.nn.Module], many: bool, steps: list[_Step]) -> None:
        old = self._known
        if old is not None and self._is_current(old):
            old.steps[many] = steps
            return
        noted = [(m, m._prepared, m._seen) if isinstance(m, SparseLinear) else (m, None, None) for m in members]
        # Every other entry of what was seen is a version, but for the last two.
        pairs = [pair for *_, seen in noted if seen for pair in zip(seen[:-2:2], seen[1:-2:2], strict=True)]
        pairs = [(tensor, version) for tensor, version in pairs if tensor is not None]
        tensors, versions = [tensor for tensor, _ in pairs], [version for _, version in pairs]
        both: list[list[_Step] | None] = [None, None]
        both[many] = steps
        self._known = _Known(noted, tensors, versions, both)  # type: ignore[arg-type]

    def _apply(self, fn: Any, recurse: bool = True) -> SparseMLP:
        super()._apply(fn, recurse)
        self._known = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Copies and files hold the canonical state only.
        return {**self.__dict__, "_known": None}


def _is_trained(member: Any) -> bool:
    if isinstance(member, SparseLinear):
        return member.is_trained()
    return any(parameter.requires_grad for parameter in member.parameters())


def _step(member: torch.nn.Module, input: torch.Tensor, many: bool) -> _Step | None:
    """How a member that has just run on an input runs again; None if that can't be told."""
    if not isinstance(member, SparseLinear):
        return _called, member, 0, None
    prepared = member._prepared
    if prepared is None or input.dim() != 2 or not member.is_as(member._seen):
        return None
    is_dense, pack = prepared.runs_dense[many], prepared.pack(many, input)
    if pack is not None:
        number = selection.dtype_argument(member.dtype)
        return DENSE if is_dense else PACKED, pack, member.out_features, number
    if is_dense and member.activation is None:
        return _dense, (prepared, member.operands()), member.out_features, member.dtype
    return None


def _dense(input: torch.Tensor, layer: tuple[kept.Prepared, SparseLayer], width: int, dtype: Any) -> torch.Tensor:
    """A layer of floats that is faster dense."""
    prepared, operands = layer
    return prepared.run(input, operands, dtype)


def _called(input: torch.Tensor, member: Callable[..., torch.Tensor], *rest: Any) -> torch.Tensor:
    return member(input)
