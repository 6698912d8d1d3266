"""What several test files use."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from recsys_kernels.backends import registry
from recsys_kernels.backends.registry import ISA_LEVELS, native


def isa_levels() -> tuple[str, ...]:
    """The instruction-set levels of this machine and build, lowest first."""
    highest = native.isa_supported()
    return () if highest is None else ISA_LEVELS[: ISA_LEVELS.index(highest) + 1]


@contextmanager
def named(sample: object) -> Iterator[None]:
    """Says in which sample an assertion failed: thousands of tests of a millisecond each would take minutes."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{sample}: {type(error).__name__}: {error}") from error


def hear_interrupts() -> None:
    """To run in a child process before its program: a shell lets what it starts in the background ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Calls(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class FlatOperators:
    """The functions of one implementation as the dispatcher calls them: with flat arguments."""

    def __init__(self, implementation: str) -> None:
        self._implementation = implementation

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return getattr(registry.operators[name], self._implementation)  # type: ignore[no-any-return]


REFERENCE, TRITON = FlatOperators("reference"), FlatOperators("triton")
