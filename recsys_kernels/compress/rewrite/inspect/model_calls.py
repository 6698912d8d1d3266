"""The calls of a model that must work after a rewrite."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

Methods = str | Callable[..., Any] | Iterable[str | Callable[..., Any]] | Mapping[str, Any]


class ModelCall(NamedTuple):
    """One call of a model.

    Attributes:
        name: the name of the method, ``"forward"`` for a call of the model itself, or the name of a function.
        call: a model and the arguments -> outputs.
        arguments: the arguments beside the model.
        given_as: the arguments before they were made a tuple.
    """

    name: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    given_as: Any = ()

    def fresh_arguments(self) -> tuple[Any, ...]:
        """The arguments with copies of their tensors, which the model may change."""
        fresh: tuple[Any, ...] = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), self.arguments)
        return fresh

    def run(self, model: torch.nn.Module) -> Any:
        """Outputs in eval mode. The random state and the arguments stay as they are; the model may change."""
        arguments = self.fresh_arguments()
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
            return self.call(model.eval(), *arguments)

    def run_first(self, model: torch.nn.Module) -> Any:
        """:meth:`run`, and an error of a wrong call names the arguments.

        Raises:
            TypeError: the method does not take such arguments.
        """
        self._check_signature(model)
        try:
            return self.run(model)
        except Exception as error:
            if hasattr(error, "add_note"):  # Python 3.11 and newer
                error.add_note(f"This is the model's own error on {self._arguments_text()}.")
            raise

    def _check_signature(self, model: torch.nn.Module) -> None:
        method = getattr(model, self.name, None)
        if method is None or isinstance(model, torch.jit.ScriptModule):
            return
        try:
            signature = inspect.signature(method)
        except (TypeError, ValueError):
            return
        try:
            signature.bind(*self.arguments)
        except TypeError as error:
            raise TypeError(
                f"{type(model).__name__}.{self.name}{signature} cannot be called with {self._arguments_text()}: {error}"
            ) from None

    def _arguments_text(self) -> str:
        given = "sample_inputs" if self.name == "forward" else f"the arguments for {self.name!r}"
        if isinstance(self.given_as, (list, dict)):
            kind = type(self.given_as).__name__
            return f"{given}, a {kind}, which is taken for the only argument: give several arguments as a tuple"
        kinds = ", ".join(type(argument).__name__ for argument in self.arguments)
        count = len(self.arguments)
        return f"{given}, taken for {count} argument{'' if count == 1 else 's'}: ({kinds})"


def model_calls(model: torch.nn.Module, sample_inputs: Any, methods: Methods | None) -> list[ModelCall]:
    """The calls that a user names: the model on ``sample_inputs`` and ``methods``; see ``optimize``.

    Raises:
        ValueError: a name that is no method of the model, or a method without arguments.
        TypeError: an entry of ``methods`` of another type.
    """
    calls = []
    if sample_inputs is not None:
        calls.append(ModelCall("forward", _call_itself, _as_arguments(sample_inputs), sample_inputs))
    if methods is None:
        return calls
    if isinstance(methods, Mapping):
        entries: list[tuple[Any, Any]] = list(methods.items())
    else:
        alone = isinstance(methods, str) or callable(methods)
        names: Iterable[Any] = [methods] if alone else methods  # type: ignore[assignment]
        entries = [(entry, sample_inputs) for entry in names]
    for entry, arguments in entries:
        if isinstance(entry, str):
            calls.append(_method_call(model, entry, arguments))
        elif callable(entry):
            calls.append(ModelCall(getattr(entry, "__name__", repr(entry)), entry, ()))
        else:
            raise TypeError(f"methods takes names of methods and functions of a model, not {entry!r}")
    return calls


def _method_call(model: torch.nn.Module, name: str, arguments: Any) -> ModelCall:
    if not callable(getattr(model, name, None)):
        raise ValueError(f"methods: {type(model).__name__} has no method {name!r}")
    if arguments is None:
        raise ValueError(f"methods: {name!r} needs arguments: give sample_inputs, or methods={{{name!r}: arguments}}")

    def call(model: torch.nn.Module, *arguments: Any) -> Any:
        return getattr(model, name)(*arguments)

    return ModelCall(name, call, _as_arguments(arguments), arguments)


def _call_itself(model: torch.nn.Module, *arguments: Any) -> Any:
    return model(*arguments)


def _as_arguments(given: Any) -> tuple[Any, ...]:
    return given if isinstance(given, tuple) else (given,)
