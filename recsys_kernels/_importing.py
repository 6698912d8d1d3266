"""How an import of the package ends early: by an interruption, a wrong environment variable, or a second copy.

Importing torch takes seconds, so people do interrupt it. The exceptions are ordinary ones, which a program can catch.
Where nobody catches an interruption or a wrong environment variable, Python prints one line and no traceback: the
traceback would show nothing but the files of the package and of torch.
"""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

WRONG_ENVIRONMENT, INTERRUPTED = 2, 130


@contextmanager
def explained() -> Iterator[None]:
    """Around the imports of the package: what ends them is raised as what it is.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed meanwhile, also if code below has caught that (as torch's import did 5
            times in 60).
        ImportError: another copy of the package is loaded already.
    """
    pressed: list[int] = []

    def interrupt(signum: int, frame: FrameType | None) -> None:
        pressed.append(signum)
        raise KeyboardInterrupt

    # Somebody else's handler stays, and so does one that ignores (nohup).
    ours = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or pressed:
            raise _interruption() from None
        if isinstance(error, RuntimeError) and (copy := _other_copy(error)):
            raise copy from None
        raise
    else:
        if pressed:
            raise _interruption()
    finally:
        if ours and signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def print_in_one_line(error: BaseException, line: str, status: int) -> None:
    """If nobody catches an exception, Python prints this line for its traceback, and exits with this status."""
    before = sys.excepthook

    def hook(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
        if value is not error:
            before(kind, value, traceback)
            return
        print(f"recsys_kernels: {line}", file=sys.stderr)
        raise SystemExit(status)

    sys.excepthook = hook


def _interruption() -> KeyboardInterrupt:
    error = KeyboardInterrupt()
    print_in_one_line(error, "interrupted while it was imported; nothing was done", INTERRUPTED)
    return error


def _other_copy(error: RuntimeError) -> ImportError | None:
    """What torch's refusal to define the operators twice means, or None for another error."""
    found = re.search(r"Previous registration of TORCH_LIBRARY was registered at (.+?)/backends/\w+\.py", str(error))
    if found is None:
        return None
    return ImportError(
        f"this process has loaded another copy of recsys_kernels already, {found[1]}, and torch takes the operators of "
        f"one only; this copy is {Path(__file__).parent}. Keep one of the two on sys.path, and start Python again"
    )
