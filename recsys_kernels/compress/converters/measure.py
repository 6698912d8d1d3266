"""Measurements of layers: the time of two calls, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

# A measurement ends after this many rounds or seconds, whichever comes first, but not before 5 rounds.
_ROUNDS, _SECONDS, _FEWEST_ROUNDS = 50, 0.1, 5


@torch.inference_mode()
def median_microseconds(
    first: Callable[[], Any], second: Callable[[], Any], on_gpu: bool = False, fewest: int = _FEWEST_ROUNDS
) -> tuple[float, float]:
    """The median time of a call of each, in microseconds; the calls alternate.

    Args:
        first, second: what is timed.
        on_gpu: whether the calls start kernels on a GPU, whose end is waited for.
        fewest: rounds that are always made, beside two for warming up.
    """
    times: tuple[list[float], list[float]] = ([], [])
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    end = time.perf_counter() + _SECONDS
    for number in range(-2, _ROUNDS):
        for call, seconds in zip((first, second), times, strict=True):
            wait()
            start = time.perf_counter()
            call()
            wait()
            if number >= 0:
                seconds.append(time.perf_counter() - start)
        if number >= fewest and time.perf_counter() > end:
            break
    one, other = (1e6 * sorted(seconds)[len(seconds) // 2] for seconds in times)
    return one, other


def microseconds_text(value: float) -> str:
    """A time with the digits that mean something."""
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
