"""A run of a model on sample inputs: the calls of its layers, and the readers of their weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from ...converters.converter import LayerDecision, ObservedCall
from .contents import ModelContents
from .model_calls import ModelCall
from .weight_watch import WeightWatch


class SampleRun:
    """A run of the calls that must work, in which layers and weights are watched.

    Args:
        contents: modules of the model and where they are.
        layers: the layers to watch.
        sequentials: the Sequentials of the model.
        informed_readers: the classes of modules that read weights of the layers and may do so.

    Attributes:
        attribute_reads: id of a layer -> the code that reads ``layer.weight`` from outside of the layer.
        other_reads: id of a layer -> the code that reads the weight in another way, such as from a list of parameters.
        taken_apart: id of a Sequential -> that its modules were called without it.
        observed: id of a layer -> the first call of the layer, as its converter observes it.
        batch_size: the first dimension of the first tensor of the arguments; None without any.
        twin: the model that ran, which shares its tables with the given one; nothing is watched any more.
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
        self.attribute_reads: dict[int, str] = {}
        self.other_reads: dict[int, str] = {}
        self.taken_apart: dict[int, str] = {}
        self.observed: dict[int, ObservedCall] = {}
        self.batch_size: int | None = None
        self._running: list[int] = []
        self._handles: list[RemovableHandle] = []

    def run(self, calls: Sequence[ModelCall], memo: dict[int, Any]) -> list[Any]:
        """Makes each call once and returns the outputs of each.

        Args:
            calls: the calls.
            memo: the memo of a deep copy of the model, with what is not copied.
        """
        leaves = pytree.tree_leaves([call.arguments for call in calls])
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()]
        self.batch_size = len(tensors[0]) if tensors else None
        modules = [layer.module for layer in self._layers]
        weights = [module.weight for module in modules]
        memo.update((id(weight), weight) for weight in weights)
        # A run may change the model's state, so a twin runs, which shares the tables.
        self.twin = copy.deepcopy(self._contents.model, memo)
        twins = [memo[id(module)] for module in modules]
        for twin, layer in zip(twins, self._layers, strict=True):
            self._watch_calls_of_layer(twin, layer)
        self._watch_sequentials(memo)
        # An attribute of the instance hides the parameter: a read of `layer.weight` gets another object than a read of
        # the parameter from a list.
        aliases = [torch.nn.Parameter(weight.detach(), weight.requires_grad) for weight in weights]
        for twin, alias in zip(twins, aliases, strict=True):
            twin.__dict__["weight"] = alias
        readers = [module for module in self.twin.modules() if isinstance(module, self._informed_readers)]
        with WeightWatch([*aliases, *weights], [*twins, *readers]) as watch:
            outputs = [call.run_first(self.twin) for call in calls]
        for twin in twins:
            twin.__dict__.pop("weight", None)  # gone if the model has set another weight
        for handle in self._handles:
            handle.remove()
        for module, alias, weight in zip(modules, aliases, weights, strict=True):
            if id(alias) in watch.found:
                self.attribute_reads[id(module)] = watch.found[id(alias)]
            if id(weight) in watch.found:
                self.other_reads[id(module)] = watch.found[id(weight)]
        return outputs

    def _watch_calls_of_layer(self, twin: torch.nn.Module, layer: LayerDecision) -> None:
        key = id(layer.module)

        def note(module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            if key not in self.observed:
                call = layer.converter.observe(arguments, keywords)
                if call is not None:
                    self.observed[key] = call

        self._handles.append(twin.register_forward_pre_hook(note, with_kwargs=True))

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
                hook = partial(self._note_call, owners[key])
                self._handles.append(child.register_forward_pre_hook(hook, prepend=True))

    def _note_running(self, twin: torch.nn.Module, key: int) -> None:
        self._handles.append(twin.register_forward_pre_hook(lambda module, args: self._running.append(key)))
        self._handles.append(twin.register_forward_hook(lambda module, args, output: self._running.pop() and None))

    def _note_call(self, owners: list[int], module: torch.nn.Module, args: Any) -> None:
        if not self._running or self._running[-1] not in owners:
            self.taken_apart.update(dict.fromkeys(owners, "the trial run calls its modules one by one"))
