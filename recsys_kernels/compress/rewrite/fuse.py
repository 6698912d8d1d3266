"""Layers and functions of a ``torch.nn.Sequential`` that are replaced together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ..converters.converter import FusedSequence, FusedStep, LayerDecision
from .inspect.contents import MODULE_STATE, ModelContents

_HOOKS = tuple(n for n in sorted(MODULE_STATE) if n.endswith(("hooks", "hooks_with_kwargs")))
# A new module does not get these.
_LOST_HOOKS = tuple(name for name in _HOOKS if not name.startswith("_forward_"))


def find_fused_sequences(
    contents: ModelContents, decisions: Mapping[int, LayerDecision], taken_apart: Mapping[int, str]
) -> list[FusedSequence]:
    """The sequences of layers in a model that are replaced together.

    A sequence starts with a layer that its converter fuses, and one function may follow each layer. Dropout and
    Identity inside are left out. A module that the model uses elsewhere as well, or that has hooks, is in no sequence,
    nor is any module of a Sequential out of which something takes modules.

    Args:
        contents: modules of the model and where they are.
        decisions: the decision about each layer, by id of the layer.
        taken_apart: ids of the Sequentials out of which something takes modules.
    """
    return _Fusion(contents, decisions, taken_apart).find()


class _Fusion:
    """The search of :func:`find_fused_sequences`."""

    def __init__(
        self, contents: ModelContents, decisions: Mapping[int, LayerDecision], taken_apart: Mapping[int, str]
    ) -> None:
        self._contents, self._decisions, self._taken_apart = contents, decisions, taken_apart

    def find(self) -> list[FusedSequence]:
        found: list[FusedSequence] = []
        inside: set[int] = set()
        for module in self._contents.modules.values():
            if id(module) in inside or type(module) is not torch.nn.Sequential or not self._is_only_called(module):
                continue
            for sequence in self._in_sequential(module):
                found.append(sequence)
                inside |= {id(m) for key in sequence.keys for m in module._modules[key].modules()}
        return found

    def _is_only_called(self, sequential: torch.nn.Module) -> bool:
        free = id(sequential) not in self._taken_apart and "forward" not in vars(sequential)
        return free and not any(getattr(sequential, name) for name in _LOST_HOOKS)

    def _in_sequential(self, sequential: torch.nn.Module) -> Iterator[FusedSequence]:
        sequence = FusedSequence(sequential)
        for key, child in sequential._modules.items():
            steps = self._extended(sequence.steps, child)
            if steps is None:
                if _is_worth_fusing(sequence):
                    yield sequence
                sequence = FusedSequence(sequential)
                steps = self._extended([], child)
            if steps is not None:
                sequence.keys.append(key)
                sequence.steps = steps
        if _is_worth_fusing(sequence):
            yield sequence

    def _extended(self, steps: list[FusedStep], child: torch.nn.Module | None) -> list[FusedStep] | None:
        """The steps of a sequence with one more module; None if the module cannot be a part of the sequence."""
        if child is None or any(getattr(child, name) for name in _HOOKS) or id(child) in self._contents.held_twice:
            return None
        if id(child) in self._decisions:
            return self._with_layer(steps, self._decisions[id(child)])
        if type(child) is torch.nn.Sequential:
            return self._with_sequential(steps, child)
        if not steps or "forward" in vars(child):
            return None
        if type(child) in (torch.nn.Dropout, torch.nn.Identity):
            return steps
        last = steps[-1]
        epilogue = last.layer.converter.epilogue(child)
        if epilogue is None or last.epilogue is not None:
            return None
        return [*steps[:-1], FusedStep(last.layer, epilogue)]

    def _with_layer(self, steps: list[FusedStep], layer: LayerDecision) -> list[FusedStep] | None:
        used_once = len(self._contents.parents[id(layer.module)]) == 1
        same_converter = not steps or steps[0].layer.converter is layer.converter
        fuses = layer.reason_to_keep is None and layer.converter.fuses(layer.module)
        return [*steps, FusedStep(layer, None)] if fuses and used_once and same_converter else None

    def _with_sequential(self, steps: list[FusedStep], child: torch.nn.Module) -> list[FusedStep] | None:
        if len(self._contents.parents[id(child)]) > 1 or not self._is_only_called(child):
            return None
        extended: list[FusedStep] | None = steps
        for inner in child._modules.values():
            extended = None if extended is None else self._extended(extended, inner)
        return extended


def _is_worth_fusing(sequence: FusedSequence) -> bool:
    """Whether one call takes the place of two or more that do something."""
    return len(sequence.steps) > 1 or (len(sequence.steps) == 1 and sequence.steps[0].epilogue is not None)
