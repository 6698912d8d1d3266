"""The interface of a converter, which makes one kind of layer smaller for ``optimize``.

A new kind of layer is one file with a class that :func:`register` lists, and an import line in ``__init__.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch

InputRange = tuple[float, float]


@dataclass(frozen=True)
class Options:
    """The arguments of ``optimize`` that converters read; see there.

    Attributes:
        model: the model, without the pruning masks that the chosen converters take off.
        choices: the value of each option that names a new form, by the option: ``{"embedding": "int8"}``.
        sparsity, pattern, ranges, min_sqnr, batch_size: see ``optimize``.
        sampled: whether there are inputs to run the model on.
    """

    model: torch.nn.Module
    choices: Mapping[str, str | None]
    sparsity: float | None = None
    pattern: str | None = None
    ranges: Mapping[str, InputRange] | None = None
    min_sqnr: float | None = None
    batch_size: int | None = None
    sampled: bool = False


@dataclass(eq=False)
class LayerDecision:
    """The decision about one layer: the layer is replaced unless there is a reason to keep it.

    Attributes:
        module: the layer.
        names: every place in the model where the layer is.
        converter: the converter of this kind of layer.
        choice: the name of the new form.
        reason_to_keep: why the layer stays as it is; None if it is replaced.
        notes: remarks for the report.
        reads_weight: whether other code than the layer reads, or may read, ``layer.weight``.
        replacement: the new layer, as soon as it is made.
        sqnr: signal-to-quantization-noise ratio of the new layer, dB.
        float_us, replacement_us: microseconds of a call of the layer and of the new one.
        drops_mask: whether a kept layer loses its pruning mask, with the zeros in place.
    """

    module: Any
    names: list[str]
    converter: Converter
    choice: str
    reason_to_keep: str | None
    notes: list[str] = field(default_factory=list)
    reads_weight: bool = False
    replacement: Any = None
    sqnr: float | None = None
    float_us: float | None = None
    replacement_us: float | None = None
    drops_mask: bool = False

    def keep(self, reason: str, drops_mask: bool = False) -> None:
        """Keeps the layer as it is; see ``drops_mask``."""
        self.reason_to_keep, self.notes, self.replacement, self.drops_mask = reason, [], None, drops_mask


class FusedStep(NamedTuple):
    """A layer, and the name of the function that the new layer applies to its result."""

    layer: LayerDecision
    epilogue: str | None


@dataclass(eq=False)
class FusedSequence:
    """Neighbours in a Sequential that are replaced together.

    Attributes:
        sequential: the Sequential.
        keys: the children of it whose places are taken.
        steps: the layers, each with the function that follows it.
    """

    sequential: torch.nn.Module
    keys: list[str] = field(default_factory=list)
    steps: list[FusedStep] = field(default_factory=list)

    @property
    def converter(self) -> Converter:
        """The converter of all layers in it."""
        return self.steps[0].layer.converter

    def calls(self) -> list[list[FusedStep]]:
        """The steps, those together that one kernel runs."""
        return self.converter.group_calls(self.steps)


class ObservedCall(NamedTuple):
    """The first call of a layer in a run on sample inputs.

    Attributes:
        input: the arguments, as far as the converter keeps them.
        rows: the number of rows or indices of the call.
    """

    input: Any
    rows: int


class RewriteState(Protocol):
    """The questions that a converter may ask when it decides which new layers pay."""

    @property
    def observed_calls(self) -> Mapping[int, ObservedCall] | None:
        """The calls of layers by id of the layer; None if the model was not run."""

    @property
    def sample_batch_size(self) -> int | None:
        """Examples in the sample inputs; None if unknown."""

    def replaced_by(self, converter: Converter) -> list[LayerDecision]:
        """The layers of a converter that are replaced."""

    def fused_sequences(self) -> list[FusedSequence]:
        """The layers that are replaced together."""


Check = Callable[[RewriteState], None]


class Converter:
    """One kind of layer, whose values are in a parameter ``weight``.

    Attributes:
        option: the argument of ``optimize`` that chooses the new form.
        choices: the values of that argument which this converter serves.
        replaceable: the classes of layers that can be replaced.
        covered: the classes of layers of this kind, replaceable or not: the report has a line for each such layer.
        parameters: the names of the parameters of a replaceable layer.
        takes_off_masks: whether pruning masks come off before the converter sees a layer.
        informed_readers: the classes of modules that read the weights of such layers and know the new ones.
        serves_weight_reads: whether a new layer can serve other code that reads ``layer.weight``; see
            :attr:`LayerDecision.reads_weight`.
    """

    option: ClassVar[str]
    choices: ClassVar[tuple[str, ...]]
    replaceable: ClassVar[tuple[type[torch.nn.Module], ...]]
    covered: ClassVar[tuple[type[torch.nn.Module], ...]]
    parameters: ClassVar[frozenset[str]]
    takes_off_masks: ClassVar[bool] = False
    informed_readers: ClassVar[tuple[type[torch.nn.Module], ...]] = ()
    serves_weight_reads: ClassVar[bool] = False

    @classmethod
    def check_options(cls, options: Options) -> None:
        """Raises ValueError for options that do not fit together, whether or not the converter was chosen."""

    @classmethod
    def from_options(cls, options: Options) -> Converter:
        """The converter for a call of ``optimize`` that chose it."""
        raise NotImplementedError

    def shape(self, module: Any) -> tuple[int, int]:
        """Rows and columns of a layer's weight."""
        raise NotImplementedError

    def reason_to_keep(self, module: Any, choice: str, parents: Sequence[torch.nn.Module]) -> str | None:
        """Why a replaceable layer cannot be replaced or would gain nothing; None if it can be replaced.

        ``parents`` are the modules that hold the layer.
        """
        raise NotImplementedError

    def convert(self, layers: Sequence[LayerDecision]) -> list[Any]:
        """The new forms of layers that share one weight; the new layers share the new weight.

        Raises:
            ValueError: the values of the weight forbid it.
        """
        raise NotImplementedError

    def max_error(self, module: Any, replacement: Any) -> float:
        """The largest absolute error of a value of the weight."""
        raise NotImplementedError

    def observe(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> ObservedCall | None:
        """The part of a call of a layer that is kept for measurements; None keeps nothing."""
        return None

    def refresh_reader(self, reader: torch.nn.Module) -> None:
        """Tells a module of ``informed_readers`` in the new model that its layers were replaced."""

    def checks(self) -> Sequence[Check]:
        """The decisions about new layers, in order: each may keep layers that would not pay."""
        return ()

    def report_fields(self, layer: LayerDecision) -> dict[str, Any]:
        """Further fields of the report's line of a replaced layer."""
        return {}

    # ---- fusion ----

    def fuses(self, module: torch.nn.Module) -> bool:
        """Whether a layer may become a part of a fused sequence."""
        return False

    def epilogue(self, module: torch.nn.Module) -> str | None:
        """The name of the function that a module is, if a new layer can apply it to its result."""
        return None

    def with_epilogue(self, replacement: Any, epilogue: str) -> Any:
        """A new layer with the same tensors that applies a function to its result."""
        raise NotImplementedError

    def group_calls(self, steps: Sequence[FusedStep]) -> list[list[FusedStep]]:
        """The steps of a fused sequence, those together that one kernel runs."""
        return [[step] for step in steps]

    def joined(self, replacements: Sequence[Any]) -> torch.nn.Module:
        """New layers that one kernel runs, as one module."""
        (replacement,) = replacements
        return replacement

    def whole(self, calls: Sequence[Sequence[Any]]) -> torch.nn.Module:
        """The module that takes the place of a whole Sequential, from the new layers of each call."""
        raise NotImplementedError


REGISTERED: list[type[Converter]] = []


def register(converter: type[Converter]) -> type[Converter]:
    """Lists a converter, so that ``optimize`` knows its choices."""
    REGISTERED.append(converter)
    return converter


def converter_class(option: str, choice: str) -> type[Converter]:
    """The class that serves a value of an option.

    Raises:
        ValueError: no registered converter serves it.
    """
    serving = [converter for converter in REGISTERED if converter.option == option]
    for converter in serving:
        if choice in converter.choices:
            return converter
    known = ", ".join(repr(name) for converter in serving for name in converter.choices)
    raise ValueError(f"{option} must be {known} or None, but is {choice!r}")


def check_options(options: Options) -> None:
    """Raises ValueError for options that do not fit together, or a value that no converter serves."""
    for converter in REGISTERED:
        converter.check_options(options)
    for option, choice in options.choices.items():
        if choice is not None:
            converter_class(option, choice)


def chosen_converters(options: Options) -> list[tuple[Converter, str]]:
    """The converter and the choice of each option that is not None."""
    chosen = [(option, choice) for option, choice in options.choices.items() if choice is not None]
    return [(converter_class(option, choice).from_options(options), choice) for option, choice in chosen]
