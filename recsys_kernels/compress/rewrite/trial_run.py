"""A run of a model on sample inputs, and what it shows of its layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .weight_reads import WeightReads

# Rows of a layer's input that are kept: enough for a ratio of two sums of squares.
_KEPT_ROWS = 512


def call(model: torch.nn.Module, sample_inputs: Any) -> Any:
    """Outputs in eval mode. The random state and the inputs stay as they are; the model may change."""
    arguments = sample_inputs if isinstance(sample_inputs, tuple) else (sample_inputs,)
    arguments = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), arguments)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
        return model.eval()(*arguments)


class Trial:
    """What a run on sample inputs shows.

    Args:
        model: the model.
        layers: the layers to watch.
        sequentials: the Sequentials of the model.
        parents: id of a module -> the modules that it is in.
        readers: classes of modules that read weights of the layers and may.

    Attributes:
        reads: id of a layer -> where its weight is read from outside of it.
        taken: id of a Sequential -> that its modules were called without it.
        inputs: id of a linear layer -> up to 512 rows of its input at the first call, [rows, in_features].
        rows: id of a linear layer -> how many rows that call had.
        batch_size: the first dimension of the first tensor of the inputs; None without any.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layers: Sequence[torch.nn.Module],
        sequentials: Sequence[torch.nn.Module],
        parents: Mapping[int, Sequence[torch.nn.Module]],
        readers: tuple[type[torch.nn.Module], ...],
    ) -> None:
        self._model, self._layers, self._sequentials, self._readers = model, layers, sequentials, readers
        self._parents = parents
        self.reads: dict[int, str] = {}
        self.taken: dict[int, str] = {}
        self.inputs: dict[int, torch.Tensor] = {}
        self.rows: dict[int, int] = {}
        self.batch_size: int | None = None
        self._running: list[int] = []

    def run(self, sample_inputs: Any, memo: dict[int, Any]) -> Any:
        """Runs the model once and returns its outputs.

        Args:
            sample_inputs: see ``optimize``.
            memo: of a copy of the model, with what is not copied.
        """
        tensors = [leaf for leaf in pytree.tree_leaves(sample_inputs) if isinstance(leaf, torch.Tensor) and leaf.dim()]
        self.batch_size = len(tensors[0]) if tensors else None
        weights = [layer.weight for layer in self._layers]
        memo.update((id(weight), weight) for weight in weights)
        # A run may change the model's state, so it runs a twin; the tables are the same ones.
        twin = copy.deepcopy(self._model, memo)
        for layer in self._layers:
            if isinstance(layer, torch.nn.Linear):
                self._watch_input(memo[id(layer)], id(layer))
        self._watch_calls(memo)
        readers = [module for module in twin.modules() if isinstance(module, self._readers)]
        with WeightReads([memo[id(layer)] for layer in self._layers], readers) as reads:
            outputs = call(twin, sample_inputs)
        found = [(id(layer), reads.found.get(id(weight))) for layer, weight in zip(self._layers, weights, strict=True)]
        self.reads = {key: place for key, place in found if place is not None}
        return outputs

    def _watch_input(self, twin: torch.nn.Module, key: int) -> None:
        def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            input = args[0] if args else kwargs.get("input")
            if key not in self.inputs and isinstance(input, torch.Tensor) and input.dim() and input.numel():
                rows = input.detach().reshape(-1, input.shape[-1])
                self.inputs[key], self.rows[key] = rows[:_KEPT_ROWS].clone(), len(rows)

        twin.register_forward_pre_hook(note, with_kwargs=True)

    def _watch_calls(self, memo: dict[int, Any]) -> None:
        """Notes calls of a Sequential's modules that it does not make itself."""
        owners: dict[int, list[int]] = {}  # of a module: the Sequentials that it is in
        children: dict[int, torch.nn.Module] = {}
        for sequential in self._sequentials:
            self._watch_calls_of(memo[id(sequential)], id(sequential))
            for child in sequential._modules.values():
                if child is not None and not isinstance(child, torch.jit.ScriptModule):
                    children[id(child)] = memo[id(child)]
                    owners.setdefault(id(child), []).append(id(sequential))
        for key, child in children.items():
            if len(owners[key]) == len(self._parents[key]):  # else it is meant to be called from elsewhere, too
                # First of all: before a Sequential counts as running itself.
                child.register_forward_pre_hook(partial(self._note_call, owners[key]), prepend=True)

    def _watch_calls_of(self, twin: torch.nn.Module, key: int) -> None:
        twin.register_forward_pre_hook(lambda module, args: self._running.append(key))
        twin.register_forward_hook(lambda module, args, output: self._running.pop() and None)

    def _note_call(self, owners: list[int], module: torch.nn.Module, args: Any) -> None:
        if not self._running or self._running[-1] not in owners:
            self.taken.update(dict.fromkeys(owners, "the trial run calls its modules one by one"))
