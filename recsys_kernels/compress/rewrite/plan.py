"""The plan of ``optimize``: a decision about each layer of a model."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils import parametrize

from ...ops.linear.sparse.torch_masks import masking_hooks
from .. import converters as converters  # lists the kinds of layers
from ..converters.converter import (
    Converter,
    FusedSequence,
    LayerDecision,
    ObservedCall,
    Options,
    converter_class,
)
from ..sizes import dtype_name
from .fuse import find_fused_sequences
from .inspect.contents import MODULE_STATE, ModelContents, TensorUser, overlap
from .inspect.model_calls import ModelCall
from .inspect.sample_run import SampleRun
from .inspect.source_code import SourceReads, find_weight_reads

Skip = str | type[torch.nn.Module]

_FORWARD_HOOKS = tuple(n for n in sorted(MODULE_STATE) if n.startswith("_forward_") and "hooks" in n)
_STATE_HOOKS = tuple(n for n in sorted(MODULE_STATE) if "state_dict" in n and "hooks" in n)
# A subclass may define these and still do the same as its base when it is called.
_HARMLESS_MEMBERS = frozenset(
    (
        *("__init__", "reset_parameters", "extra_repr", "__repr__", "__module__", "__doc__", "__constants__"),
        *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__"),
        *("__firstlineno__", "__static_attributes__"),
    )
)
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class RewritePlan:
    """A decision about each layer of a model.

    Args:
        model: the model, which is not changed.
        converters: the kinds of layers to replace, and the new form of each.
        masked: id of a layer -> the layer with a pruning mask that the model has in its place.

    Attributes:
        contents: modules and tensors of the model, and where they are.
        decisions: the decision about each layer of these kinds, by id of the layer.
        taken_apart: id of a Sequential -> the code that takes modules out of it instead of calling it.
        sample_run: the run of the calls that must work, if any were given.
        notes: differences of the new model that concern no single layer.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        converters: Sequence[tuple[Converter, str]],
        masked: Mapping[int, torch.nn.Module] | None = None,
    ) -> None:
        self.model, self.masked = model, masked or {}
        self.contents = ModelContents(model)
        self.notes: list[str] = list(self.contents.notes)
        self.taken_apart: dict[int, str] = {}
        self.sample_run: SampleRun | None = None
        self.decisions: dict[int, LayerDecision] = {}
        self.informed_readers = tuple(kind for converter, _ in converters for kind in converter.informed_readers)
        for converter, choice in converters:
            self._add(converter, choice)

    def _add(self, converter: Converter, choice: str) -> None:
        contents = self.contents
        for key, module in contents.modules.items():
            if isinstance(module, converter.covered):
                reason = _reason_to_keep(module, converter) or converter.reason_to_keep(
                    module, choice, contents.parents.get(key, ())
                )
                self.decisions[key] = LayerDecision(module, contents.names[key], converter, choice, reason)
        for key, (path, module) in contents.unregistered.items():
            if isinstance(module, converter.covered):
                reason = "not a registered submodule: .to() and state_dict() do not reach it either"
                self.decisions[key] = LayerDecision(module, [path], converter, choice, reason)

    # ---- the questions of converters ----

    @property
    def observed_calls(self) -> Mapping[int, ObservedCall] | None:
        return None if self.sample_run is None else self.sample_run.observed

    @property
    def sample_batch_size(self) -> int | None:
        return None if self.sample_run is None else self.sample_run.batch_size

    def replaced_by(self, converter: Converter) -> list[LayerDecision]:
        return [layer for layer in self.replaced if layer.converter is converter]

    def fused_sequences(self) -> list[FusedSequence]:
        return find_fused_sequences(self.contents, self.decisions, self.taken_apart)

    # ---- decisions ----

    @property
    def replaced(self) -> list[LayerDecision]:
        """The layers that are replaced, as far as it is decided."""
        return [layer for layer in self.decisions.values() if layer.reason_to_keep is None]

    def keep_skipped(self, skip: Skip | Iterable[Skip]) -> None:
        """Keeps what the user names."""
        for entry in [skip] if isinstance(skip, (str, type)) else list(skip):
            text = repr(entry) if isinstance(entry, str) else getattr(entry, "__name__", repr(entry))
            roots = self._matches(entry)
            if not roots:
                raise ValueError(f"skip: {text} names no module of the model")
            for module in (module for root in roots for module in root.modules()):
                if id(module) in self.decisions:
                    self.decisions[id(module)].reason_to_keep = f"skip={text}"

    def _matches(self, entry: Any) -> list[torch.nn.Module]:
        modules = self.contents.modules
        if isinstance(entry, str):
            names = self.contents.names.items()
            return [modules[key] for key, known in names if any(fnmatch.fnmatchcase(name, entry) for name in known)]
        if isinstance(entry, type) and issubclass(entry, torch.nn.Module):
            return [module for module in modules.values() if isinstance(module, entry)]
        raise TypeError(f"skip takes names, patterns and module classes, not {entry!r}")

    def keep_read(self, calls: Sequence[ModelCall], other_methods: bool = True) -> list[Any]:
        """Keeps layers whose weight other code reads, where the new layer cannot serve such reads.

        Args:
            calls: the calls of the model that must work; they show reads that the source does not.
            other_methods: whether methods that these calls do not reach must work, too.

        Returns:
            The outputs of each call.
        """
        layers = self.replaced
        modules = self.contents.modules.values()
        readers = [module for module in modules if not isinstance(module, self.informed_readers)]
        sequentials = [module for module in modules if type(module) is torch.nn.Sequential]
        reads = find_weight_reads(readers, [layer.module for layer in layers], sequentials)
        self.taken_apart.update(reads.taken_apart)
        outputs: list[Any] = []
        if calls:
            self.sample_run = SampleRun(self.contents, layers, sequentials, self.informed_readers)
            outputs = self.sample_run.run(calls, self.copy_memo())
            self.taken_apart.update(self.sample_run.taken_apart)
        elif layers and reads.unknown:
            methods = ", ".join(sorted(reads.unknown))
            self.notes.append(f"no source of {methods}: give sample_inputs to see whether it reads weights directly")
            self.taken_apart.update({id(module): methods for module in sequentials})  # the methods may do that
        informed = {id(m) for reader in modules if isinstance(reader, self.informed_readers) for m in reader.modules()}
        for layer in layers:
            if layer.converter.serves_weight_reads and id(layer.module) not in informed:
                self._serve_reads(layer, reads)
            else:
                self._keep_if_read(layer, reads, other_methods)
        return outputs

    def _serve_reads(self, layer: LayerDecision, reads: SourceReads) -> None:
        """Decides about a layer whose new form can serve reads of ``layer.weight``."""
        key, run = id(layer.module), self.sample_run
        if run is not None and key in run.other_reads:
            layer.keep(f"its weight is read by {run.other_reads[key]}, which does not take it from the layer")
            return
        seen = {} if run is None else run.attribute_reads
        found = next((places[key] for places in (seen, reads.places, reads.training) if key in places), None)
        maybe = None if run is not None else reads.maybe.get(key)
        hooked = any(getattr(layer.module, hooks) for hooks in _FORWARD_HOOKS)  # hooks get the layer and may read it
        layer.reads_weight = hooked or found is not None or key in reads.maybe or bool(reads.unknown)
        if found is not None or maybe is not None:
            verb = "reads" if found is not None else "may read"
            nbytes = layer.module.weight.nbytes
            layer.notes.append(f"{found or maybe} {verb} its weight: up to {nbytes:,} bytes of floats for each read")

    def _keep_if_read(self, layer: LayerDecision, reads: SourceReads, other_methods: bool) -> None:
        """Keeps a layer whose new form cannot serve reads of its weight, if there may be such reads."""
        key, run = id(layer.module), self.sample_run
        place = reads.places.get(key, reads.training.get(key))
        if run is None:
            if place is not None:
                layer.keep(f"its weight is read by {place}")
            elif key in reads.maybe:
                layer.keep(f"its weight may be read by {reads.maybe[key]}; sample_inputs would tell")
            return
        seen = run.attribute_reads.get(key, run.other_reads.get(key))
        if seen is not None:
            layer.keep(f"its weight is read by {seen}")
        elif other_methods and key in reads.places:
            layer.keep(f"its weight is read by {place}, which did not run; methods= names what must work")
        elif place is not None:
            layer.notes.append(f"{place} reads its weight, which is not float any more")

    def keep_tied(self) -> None:
        """Keeps layers whose weight is also used by something that is not replaced along with them."""
        users = self.contents.tensor_users()
        changed = True
        while changed:  # keeping one may keep another
            changed = sum(self._keep_one_tied(layer, users) for layer in self.replaced) > 0

    def _keep_one_tied(self, layer: LayerDecision, users: Mapping[int, list[TensorUser]]) -> bool:
        for name in sorted(layer.converter.parameters, reverse=True):  # the weight first
            own = getattr(layer.module, name)
            for user in () if own is None else users[own.untyped_storage()._cdata]:
                if user.owner is layer.module or not overlap(user.tensor, own):
                    continue
                other = self.decisions.get(id(user.owner))
                along = other is not None and other.reason_to_keep is None and other.converter is layer.converter
                if not (along and user.tensor is own and name == "weight"):
                    layer.keep(f"its {name} is shared with {user.name!r}")
                    return True
        return False

    def convert(self) -> None:
        """Makes the new form of every layer that is replaced. A layer whose values forbid it is kept."""
        groups: dict[int, list[LayerDecision]] = {}
        for layer in self.replaced:
            groups.setdefault(id(layer.module.weight), []).append(layer)
        for group in groups.values():
            try:
                new = group[0].converter.convert(group)
            except ValueError as refusal:
                for layer in group:
                    layer.keep(str(refusal))
                continue
            for layer, module in zip(group, new, strict=True):
                layer.replacement = module
                layer.notes += [f"one table with {other.names[0]!r}" for other in group if other is not layer]

    def keep_unprofitable(self) -> None:
        """Lets the converters keep layers whose new form is not good or fast enough."""
        for converter in dict.fromkeys(layer.converter for layer in self.decisions.values()):
            for check in converter.checks():
                check(self)
                self.keep_tied()

    def copy_memo(self) -> dict[int, Any]:
        """The memo of a deep copy of the model, without layers and weights."""
        memo, notes = self.contents.copy_memo()
        self.notes += notes
        return memo


def plan_replacements(model: torch.nn.Module, option: str, choice: str, skip: Skip | Iterable[Skip]) -> RewritePlan:
    """The plan of ``optimize`` with one option, before anything is converted or measured."""
    converter = converter_class(option, choice).from_options(Options(model, {option: choice}))
    plan = RewritePlan(model, [(converter, choice)])
    plan.keep_skipped(skip)
    plan.keep_tied()
    plan.keep_read([])
    plan.keep_tied()
    return plan


def _reason_to_keep(module: Any, converter: Converter) -> str | None:
    """Why no converter could replace a layer."""
    if parametrize.is_parametrized(module):
        return f"parametrized: {', '.join(module.parametrizations)}"
    base = next((c for c in type(module).__mro__ if c in converter.replaceable), None)
    if base is None:
        return f"{_with_article(type(module).__name__)} already"
    if members := _own_members(type(module), base):
        return f"its class has its own {', '.join(members)}"
    if "forward" in vars(module):
        return "its forward was replaced"
    if hooks := masking_hooks(module):
        calls = ", ".join(f"torch.nn.utils.prune.remove(layer, {name!r})" for name in sorted(hooks))
        return f"has masks of torch.nn.utils.prune: {calls} leaves a plain layer"
    if (own := {*module._parameters, *module._buffers, *module._modules}) != converter.parameters:
        return f"has {', '.join(sorted(own)) or 'nothing'} instead of {', '.join(sorted(converter.parameters))}"
    if any(getattr(module, hooks) for hooks in _STATE_HOOKS):
        return "has hooks on its state_dict"
    weight = module.weight
    if type(weight) is not torch.nn.Parameter or weight.layout != torch.strided:
        return f"its weight is a {type(weight).__name__} ({weight.layout})"
    if weight.device.type == "meta":
        return "on the meta device: there are no values yet"
    if weight.numel() == 0:
        return "empty"
    return None if weight.dtype in _FLOATS else f"its weight is {dtype_name(weight)}"


def _own_members(cls: type, base: type) -> list[str]:
    """Members of a subclass that may change what a call does, or that the model may use."""
    classes = cls.__mro__[: cls.__mro__.index(base)]
    return sorted({name for c in classes for name in vars(c)} - _HARMLESS_MEMBERS)


def _with_article(name: str) -> str:
    return f"an {name}" if name[0] in "AEIOU" else f"a {name}"
