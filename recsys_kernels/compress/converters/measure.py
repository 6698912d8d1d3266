"""Measurements of layers: the time of two calls, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

# A measurement ends after this many rounds or seconds, whichever comes first.
_ROUNDS, _SECONDS = 50, 0.1


@torch.no_grad()
def median_microseconds(
    first: Callable[[], Any], second: Callable[[], Any], *, on_gpu: bool = False, warm_up: int = 2, fewest: int = 6
) -> tuple[float, float]:
    """The median time of a call of each, in microseconds; the calls alternate.

    Args:
        first, second: the functions to time.
        on_gpu: whether the calls start kernels on a GPU, whose end is waited for.
        warm_up: rounds that do not count.
        fewest: rounds that are always made beside these.
    """
    times: tuple[list[float], list[float]] = ([], [])
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    end = time.perf_counter() + _SECONDS
    for number in range(-warm_up, _ROUNDS):
        for call, seconds in zip((first, second), times, strict=True):
            wait()
            start = time.perf_counter()
            call()
            wait()
            if number >= 0:
                seconds.append(time.perf_counter() - start)
        if number + 1 >= fewest and time.perf_counter() > end:
            break
    one, other = (1e6 * sorted(seconds)[len(seconds) // 2] for seconds in times)
    return one, other


def microseconds_text(value: float) -> str:
    """A time with the digits that mean something."""
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def times_text(float_us: float, new_us: float) -> str:
    """Both times, and which is slower."""
    text = f"{microseconds_text(new_us)} us instead of {microseconds_text(float_us)}"
    return f"slower: {text}" if new_us > float_us else text
