"""Sparse layers that run one after the other, checked together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from ....backends import selection
from ..gradients import check_tensor, is_traced, is_transformed
from ..prepared import Prepared
from ..sequence import LinearSequence, check_widths
from .crossover import FEW_ROWS
from .layer import PACKED, RUN_DENSE, RUN_PACKED, SparseLinear
from .packs import Packs, runs_packed
from .spec import SparseLayer

# What runs a member, and what else than the input it takes: a pack, a width and a number for a type.
_Step = tuple[Callable[..., torch.Tensor], Any, int, Any]


class _Known(NamedTuple):
    """Members as they were when they ran one by one, and how the sparse ones ran.

    Attributes:
        members: each with the packs of a sparse one, else None.
        steps: how all members run, for few and for many rows of input, where these have run.
    """

    members: list[tuple[Any, Prepared[Any] | None]]
    steps: list[list[_Step] | None]


class SparseMLP(LinearSequence):
    """A ``torch.nn.Sequential`` whose :class:`SparseLinear` layers need less time between them.

    On the CPU, where no gradient is needed, their packed copies run straight after one check that every copy is
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
        check_widths(members, SparseLinear)
        self._forget()

    def _forget(self) -> None:
        self._known: _Known | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features of the first layer] to [..., out_features of the last]; errors as in :class:`SparseLinear`.

        Hooks of the layers are called.
        """
        check_tensor(input)
        if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
            return super().forward(input)
        known = self._known
        if (
            known is not None
            and input.dim() == 2
            and (steps := known.steps[input.shape[0] > FEW_ROWS]) is not None
            and self._is_fresh(known)
            and selection.implementation("sparse_packed", input) is PACKED
            and not (torch.is_grad_enabled() and self._has_grad(input))
        ):
            for run, pack, width, dtype in steps:
                input = run(input, pack, width, dtype)
            return input
        if is_transformed() or is_traced() or torch.is_autocast_enabled("cpu"):
            return super().forward(input)  # what runs then is no example for other calls
        if input.dim() == 2 and self._runs_packed() and not (torch.is_grad_enabled() and self._has_grad(input)):
            return self._run_and_note(input)
        return super().forward(input)

    def _has_grad(self, input: torch.Tensor) -> bool:
        return input.requires_grad or any(map(_is_trained, self._modules.values()))

    def _runs_packed(self) -> bool:
        return all(runs_packed(m.values) for m in self._modules.values() if isinstance(m, SparseLinear))

    def _is_fresh(self, known: _Known) -> bool:
        """Whether the members are the ones that ran, and the sparse ones are as they were then."""
        members: dict[str, Any] = self._modules
        if len(members) != len(known.members):
            return False
        for member, (one, prepared) in zip(members.values(), known.members):  # noqa: B905 (strict=True takes time)
            if member is not one:
                return False
            if prepared is not None and (
                member._prepared is not prepared  # a new one once the layer was moved or loaded
                or member._forward_pre_hooks
                or member._forward_hooks
                or not member.is_fresh(prepared)
            ):
                return False
        return True

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
        if old is not None and self._is_fresh(old):
            old.steps[many] = steps
            return
        both: list[list[_Step] | None] = [None, None]
        both[many] = steps
        known = [(member, member._prepared if isinstance(member, SparseLinear) else None) for member in members]
        self._known = _Known(known, both)

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
    if prepared is None or input.dim() != 2 or not member.is_fresh(prepared):
        return None
    packs = prepared.value
    is_dense, pack = packs.runs_dense[many], packs.pack(many, input)
    if pack is not None:
        number = selection.dtype_argument(member.dtype)
        return RUN_DENSE if is_dense else RUN_PACKED, pack, member.out_features, number
    if is_dense and member.activation is None:
        return _dense, (packs, member.operands()), member.out_features, member.dtype
    return None


def _dense(input: torch.Tensor, layer: tuple[Packs, SparseLayer], width: int, dtype: Any) -> torch.Tensor:
    """A layer of floats that is faster dense."""
    packs, operands = layer
    return packs.run(input, operands, dtype)


def _called(input: torch.Tensor, member: Callable[..., torch.Tensor], *rest: Any) -> torch.Tensor:
    return member(input)
