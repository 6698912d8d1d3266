"""Imported before all else: an interruption of the command line while it imports torch is no traceback."""

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130

_PROGRAM = os.path.basename((sys.argv or [""])[0])
IS_COMMAND_LINE = _PROGRAM.removesuffix(".exe") == "recsys-kernels" or (
    _PROGRAM == "-m" and "recsys_kernels" in sys.orig_argv
)


def _stop(signum: int, frame: FrameType | None) -> None:
    # Not an exception: imports catch those, and there is nothing yet to clean up.
    os.write(2, b"recsys-kernels: interrupted; nothing was written\n")
    os._exit(INTERRUPTED)


def leave_interrupts_to_python() -> None:
    """From here on they are KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Somebody else's handler stays, and so does one that ignores (nohup).
if IS_COMMAND_LINE and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _stop)
