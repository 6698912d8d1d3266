"""Runs of linear layers and activation functions in a ``torch.nn.Sequential``, which become one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, TypeAlias

import torch

from ...ops.linear.int8 import Int8Linear, Int8MLP
from ...ops.linear.int8.mlp import EPILOGUES
from ...ops.linear.sparse import SparseLinear, SparseMLP

if TYPE_CHECKING:
    from .plan import Layer, Plan

Step: TypeAlias = "tuple[Layer, str | None]"

_HOOKS = tuple(n for n in sorted(vars(torch.nn.Module())) if n.endswith(("hooks", "hooks_with_kwargs")))
# Those that a new module does not get.
_OTHER_HOOKS = tuple(name for name in _HOOKS if not name.startswith("_forward_"))


@dataclass(eq=False)
class Run:
    """Neighbours in a Sequential: int8 layers that become one call, and sparse layers.

    Attributes:
        sequential: where they are.
        keys: the children of it whose place is taken.
        steps: the linear layers, each with the function that follows it.
    """

    sequential: torch.nn.Module
    keys: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def fold(self) -> None:
        """Puts the functions into the new layers."""
        for layer, epilogue in self.steps:
            if epilogue is not None:
                layer.new = folded(layer.new, epilogue)

    def calls(self) -> list[list[Step]]:
        """The steps, those together that one kernel runs."""
        calls: list[list[Step]] = []
        for is_int8, group in groupby(self.steps, lambda step: isinstance(step[0].new, Int8Linear)):
            together = list(group)
            calls += [together] if is_int8 else [[step] for step in together]
        return calls

    def module(self) -> torch.nn.Module:
        """What takes the place of the Sequential, from layers into which the functions are folded."""
        calls = [[layer.new for layer, _ in call] for call in self.calls()]
        if len(calls) == 1 and isinstance(calls[0][0], Int8Linear):
            return Int8MLP(*calls[0])
        return SparseMLP(*map(joined, calls))

    def places(self) -> dict[str, torch.nn.Module]:
        """The same for a run that is a part of the Sequential: what stands at which key, each call where it begins."""
        keys = {id(m): key for key in self.keys for m in self.sequential._modules[key].modules()}  # type: ignore[union-attr]
        places: dict[str, list[torch.nn.Module]] = {}
        for call in self.calls():
            places.setdefault(keys[id(call[0][0].module)], []).append(joined([layer.new for layer, _ in call]))
        return {key: new[0] if len(new) == 1 else torch.nn.Sequential(*new) for key, new in places.items()}


def folded(new: torch.nn.Module, epilogue: str | None) -> torch.nn.Module:
    """A new layer with the same tensors (no copies) that applies a function to its result."""
    if isinstance(new, Int8Linear):
        return new.with_epilogue(epilogue)
    assert isinstance(new, SparseLinear)
    options = {"pattern": new.pattern, "epilogue": epilogue, "activation": new.activation}
    other = SparseLinear(
        new.in_features,
        new.out_features,
        new.bias is not None,
        **options,  # type: ignore[arg-type]
        dtype=new.dtype,
        device="meta",
    )
    for name in (*new._parameters, *new._buffers):
        setattr(other, name, getattr(new, name))
    return other.train(new.training)


def joined(layers: Sequence[torch.nn.Module]) -> torch.nn.Module:
    """Layers that one kernel runs as one module; a single one as it is."""
    return Int8MLP(*layers) if len(layers) > 1 else layers[0]  # type: ignore[arg-type]


def find_runs(plan: Plan) -> list[Run]:
    """The runs of a model whose layers are swapped as the plan says.

    A run starts with a linear layer, and each may be followed by one function. Dropout and Identity inside are left
    out. A module that the model uses elsewhere as well, or that has hooks, is in no run, nor is a Sequential out of
    which something takes modules.
    """
    runs: list[Run] = []
    inside: set[int] = set()
    for module in plan.modules.values():
        if id(module) in inside or type(module) is not torch.nn.Sequential or not _is_called_whole(module, plan):
            continue
        for run in _in_sequential(module, plan):
            runs.append(run)
            inside |= {id(m) for key in run.keys for m in module._modules[key].modules()}
    return runs


def _is_called_whole(module: torch.nn.Module, plan: Plan) -> bool:
    free = id(module) not in plan.taken and "forward" not in vars(module)
    return free and not any(getattr(module, name) for name in _OTHER_HOOKS)


def _in_sequential(sequential: torch.nn.Module, plan: Plan) -> Iterator[Run]:
    run = Run(sequential)
    for key, child in sequential._modules.items():
        steps = _extended(run.steps, child, plan)
        if steps is None:
            if _gains(run):
                yield run
            run = Run(sequential)
            steps = _extended([], child, plan)
        if steps is not None:
            run.keys.append(key)
            run.steps = steps
    if _gains(run):
        yield run


def _gains(run: Run) -> bool:
    """Whether one call takes the place of two or more that do something."""
    return len(run.steps) > 1 or (len(run.steps) == 1 and run.steps[0][1] is not None)


def _extended(steps: list[Step], child: torch.nn.Module | None, plan: Plan) -> list[Step] | None:
    """The steps of a run with one more module; None if it can't be part of the run."""
    if child is None or any(getattr(child, name) for name in _HOOKS) or id(child) in plan.aliased:
        return None
    layer = plan.layers.get(id(child))
    if layer is not None:
        if layer.keep is None and isinstance(child, torch.nn.Linear) and len(plan.parents[id(child)]) == 1:
            return [*steps, (layer, None)]
        return None
    if type(child) is torch.nn.Sequential:
        if len(plan.parents[id(child)]) > 1 or not _is_called_whole(child, plan):
            return None
        extended: list[Step] | None = steps
        for inner in child._modules.values():
            extended = None if extended is None else _extended(extended, inner, plan)
        return extended
    if not steps or "forward" in vars(child):
        return None
    if type(child) in (torch.nn.Dropout, torch.nn.Identity):
        return steps
    last, epilogue = steps[-1]
    if type(child) not in EPILOGUES or epilogue is not None:
        return None
    if isinstance(child, torch.nn.GELU) and child.approximate != "none":
        return None
    return [*steps[:-1], (last, EPILOGUES[type(child)])]
