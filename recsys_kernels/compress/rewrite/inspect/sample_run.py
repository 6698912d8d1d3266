"""A run of a model on sample inputs, and what it shows of the model's layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ...converters.converter import LayerDecision, ObservedCall
from .contents import ModelContents
from .weight_watch import WeightWatch


def call_model(model: torch.nn.Module, sample_inputs: Any) -> Any:
    """Outputs in eval mode. The random state and the inputs stay as they are; the model may change."""
    arguments = sample_inputs if isinstance(sample_inputs, tuple) else (sample_inputs,)
    arguments = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), arguments)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
        return model.eval()(*arguments)


class SampleRun:
    """What a run on sample inputs shows.

    Args:
        contents: what the model holds.
        layers: the layers to watch.
        sequentials: the Sequentials of the model.
        informed_readers: the classes of modules that read weights of the layers and may do so.

    Attributes:
        reads: id of a layer -> the code that reads its weight from outside of the layer.
        taken_apart: id of a Sequential -> that its modules were called without it.
        calls: id of a layer -> the first call of the layer, as its converter observes it.
        batch_size: the first dimension of the first tensor of the inputs; None without any.
    """

    def __init__(
        self,
        contents: ModelContents,
        layers: Sequence[LayerDecision],
        sequentials: Sequence[torch.nn.Module],
        informed_readers: tuple[type[torch.nn.Module], ...],
    ) -> None:
        self._contents, self._layers, self._sequentials = contents, layers, sequentials
        self._informed_readers = informed_readers
        self.reads: dict[int, str] = {}
        self.taken_apart: dict[int, str] = {}
        self.calls: dict[int, ObservedCall] = {}
        self.batch_size: int | None = None
        self._running: list[int] = []

    def run(self, sample_inputs: Any, memo: dict[int, Any]) -> Any:
        """Runs the model once and returns its outputs.

        Args:
            sample_inputs: see ``optimize``.
            memo: the memo of a deep copy of the model, with what is not copied.
        """
        tensors = [leaf for leaf in pytree.tree_leaves(sample_inputs) if isinstance(leaf, torch.Tensor) and leaf.dim()]
        self.batch_size = len(tensors[0]) if tensors else None
        modules = [layer.module for layer in self._layers]
        weights = [module.weight for module in modules]
        memo.update((id(weight), weight) for weight in weights)
        # A run may change the model's state, so a twin runs, which shares the tables.
        twin = copy.deepcopy(self._contents.model, memo)
        for layer in self._layers:
            self._watch_calls_of_layer(memo[id(layer.module)], layer)
        self._watch_sequentials(memo)
        readers = [module for module in twin.modules() if isinstance(module, self._informed_readers)]
        with WeightWatch([memo[id(module)] for module in modules], readers) as watch:
            outputs = call_model(twin, sample_inputs)
        found = [(id(module), watch.found.get(id(weight))) for module, weight in zip(modules, weights, strict=True)]
        self.reads = {key: place for key, place in found if place is not None}
        return outputs

    def _watch_calls_of_layer(self, twin: torch.nn.Module, layer: LayerDecision) -> None:
        key = id(layer.module)

        def note(module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            if key not in self.calls:
                call = layer.converter.observe(arguments, keywords)
                if call is not None:
                    self.calls[key] = call

        twin.register_forward_pre_hook(note, with_kwargs=True)

    def _watch_sequentials(self, memo: dict[int, Any]) -> None:
        """Notes calls of a Sequential's modules that the Sequential does not make itself."""
        owners: dict[int, list[int]] = {}  # id of a module -> the Sequentials that hold it
        children: dict[int, torch.nn.Module] = {}
        for sequential in self._sequentials:
            self._note_running(memo[id(sequential)], id(sequential))
            for child in sequential._modules.values():
                if child is not None and not isinstance(child, torch.jit.ScriptModule):
                    children[id(child)] = memo[id(child)]
                    owners.setdefault(id(child), []).append(id(sequential))
        for key, child in children.items():
            if len(owners[key]) == len(self._contents.parents[key]):  # else other modules are meant to call it, too
                # The first hook: it runs before a Sequential counts as running.
                child.register_forward_pre_hook(partial(self._note_call, owners[key]), prepend=True)

    def _note_running(self, twin: torch.nn.Module, key: int) -> None:
        twin.register_forward_pre_hook(lambda module, args: self._running.append(key))
        twin.register_forward_hook(lambda module, args, output: self._running.pop() and None)

    def _note_call(self, owners: list[int], module: torch.nn.Module, args: Any) -> None:
        if not self._running or self._running[-1] not in owners:
            self.taken_apart.update(dict.fromkeys(owners, "the trial run calls its modules one by one"))
