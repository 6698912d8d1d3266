"""The copy of a model with its new layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from ..converters.converter import FusedSequence
from .inspect.contents import MODULE_STATE
from .plan import RewritePlan

_FORWARD_HOOKS = tuple(n for n in sorted(MODULE_STATE) if n.startswith("_forward_") and "hooks" in n)


def build(plan: RewritePlan) -> torch.nn.Module:
    """The new model; the plan has the new layers (:meth:`RewritePlan.convert`)."""
    memo = plan.copy_memo()
    sequences = plan.fused_sequences()
    for step in (step for sequence in sequences for step in sequence.steps):
        if step.epilogue is not None:
            step.layer.replacement = step.layer.converter.with_epilogue(step.layer.replacement, step.epilogue)
    _note_unfused(plan, sequences)
    for layer in plan.replaced:
        weight = layer.module.weight
        memo[id(layer.module)] = layer.replacement
        # Not a meta tensor: torch's matmul of a CPU and a meta tensor gives random numbers, without an error.
        memo[id(weight)] = weight.new_full((), float("nan")).expand_as(weight)
        layer.notes += [f"{path} is NaN now" for path, value in plan.contents.held if value is weight]
    for layer in plan.replaced:
        _carry_over(layer.module, layer.replacement, memo)
    _keep_masks(plan, memo)
    # Inner Sequentials first: outer ones take them as they are.
    for module in reversed(plan.contents.modules.values()):
        inside = [sequence for sequence in sequences if sequence.sequential is module]
        if inside:
            _rebuild_sequential(module, inside, memo)
    new = copy.deepcopy(plan.model, memo)
    for converter in dict.fromkeys(layer.converter for layer in plan.decisions.values()):
        for module in new.modules():
            if isinstance(module, converter.informed_readers):
                converter.refresh_reader(module)
    return new


def _note_unfused(plan: RewritePlan, sequences: Sequence[FusedSequence]) -> None:
    """Says why layers of a Sequential are in no fused sequence, where the model's code is the reason."""
    fused = {id(step.layer) for sequence in sequences for step in sequence.steps}
    for layer in plan.replaced:
        if id(layer) in fused or not layer.converter.fuses(layer.module):
            continue
        for parent in plan.contents.parents.get(id(layer.module), ()):
            if id(parent) in plan.taken_apart:
                reason = plan.taken_apart[id(parent)]
                layer.notes.append(f"by itself, as its Sequential is not only called: {reason}")


def _keep_masks(plan: RewritePlan, memo: dict[int, Any]) -> None:
    """Puts copies of the masked layers into the memo for kept layers whose masks were taken off."""
    for key, masked in plan.masked.items():
        if key in memo or (key in plan.decisions and plan.decisions[key].drops_mask):
            continue
        computed = [v for v in vars(masked).values() if isinstance(v, torch.Tensor) and v.grad_fn is not None]
        memo.update((id(value), value.detach().clone()) for value in computed)  # deepcopy refuses these
        memo[key] = copy.deepcopy(masked, memo)


def _carry_over(old: torch.nn.Module, new: torch.nn.Module, memo: dict[int, Any]) -> None:
    """Gives a new module the hooks around ``forward`` and the attributes that the user put on the old one."""
    for name in _FORWARD_HOOKS:
        setattr(new, name, copy.deepcopy(getattr(old, name), memo))
    known = {*MODULE_STATE, *vars(new), *getattr(old, "__constants__", ())}
    for name, value in vars(old).items():
        if name not in known:
            setattr(new, name, copy.deepcopy(value, memo))


def _rebuild_sequential(sequential: torch.nn.Module, sequences: Sequence[FusedSequence], memo: dict[int, Any]) -> None:
    """Puts the new form of a Sequential into the memo: one call for each fused sequence in it."""
    places = {key: module for sequence in sequences for key, module in _places(sequence).items()}
    inside = {key for sequence in sequences for key in sequence.keys}
    if len(sequences) == 1 and inside == sequential._modules.keys():
        only = sequences[0]
        calls = [[step.layer.replacement for step in call] for call in only.calls()]
        new: torch.nn.Module = only.converter.whole(calls)
        memo[id(sequential)] = new
    else:
        memo[id(sequential)] = new = torch.nn.Sequential()
        for key, child in sequential._modules.items():
            if key in places:
                new.add_module(key, places[key])
            elif key not in inside:
                new.add_module(key, copy.deepcopy(child, memo))
    new.training = sequential.training
    _carry_over(sequential, new, memo)


def _places(sequence: FusedSequence) -> dict[str, torch.nn.Module]:
    """The new modules of a sequence by the key at which each stands: a call stands where it begins."""
    children = sequence.sequential._modules
    keys = {id(module): key for key in sequence.keys for module in children[key].modules()}  # type: ignore[union-attr]
    places: dict[str, list[torch.nn.Module]] = {}
    for call in sequence.calls():
        joined = sequence.converter.joined([step.layer.replacement for step in call])
        places.setdefault(keys[id(call[0].layer.module)], []).append(joined)
    return {key: new[0] if len(new) == 1 else torch.nn.Sequential(*new) for key, new in places.items()}
