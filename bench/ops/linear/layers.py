"""What the benchmarks of int8 and sparse layers share: the pool of inputs, the gate, torch's engines, the limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.core import probe
from recsys_kernels.backends.registry import native

POOL_BYTES = 32 << 20
CHECKED_OUTPUTS = 256
# The coarsest int8 side, torch, rounds activations to 7 bits over the range of the whole batch, some 11 standard
# deviations: noise of (11 / 127)^2 / 12 of the signal's power, 32 dB. Seen for one layer: 34 to 36 dB for torch, 40 to
# 42 dB for all others.
INT8_SNR = 30.0
# No single output may be off by more than this many standard deviations of the noise that is allowed.
WORST = 8.0


class LayerWorkload:
    """A pool of batches of one case. A family adds the weights, `expected` and `least_snr`.

    Inputs change from call to call; weights stay where a server's weights are, in the cache if they fit there.
    `checked`: the number of batches that the gate runs.
    """

    least_snr: float

    def __init__(self, case: Any, quick: bool, ins: int, outs: int, generator: torch.Generator) -> None:
        self.case, self.quick = case, quick
        count = max(8, min(64, POOL_BYTES // (4 * case.batch * ins)))
        self.inputs = torch.randn(count, case.batch, ins, generator=generator)
        self.checked = min(count, max(2, -(-CHECKED_OUTPUTS // (case.batch * outs))))

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, number: int) -> Tensor:
        """[batch, features], fp32: batch `number` modulo the size of the pool."""
        return self.inputs[number % len(self)]

    def expected(self, batch: Tensor) -> Tensor:
        """The right result in float64."""
        raise NotImplementedError

    def check(self, outputs: Sequence[Tensor]) -> None:
        """Raises AssertionError unless `outputs`, in float64, are right for batches 0, 1, 2 and so on."""
        self.check_against(self.expected, outputs)

    def check_against(self, expected: Callable[[Tensor], Tensor], outputs: Sequence[Tensor]) -> None:
        """The same with another function that gives the right results."""
        check_noise(outputs, [expected(self.batch(number)) for number in range(len(outputs))], self.least_snr)


def check_noise(outputs: Sequence[Tensor], expected: Sequence[Tensor], least_snr: float) -> None:
    """Raises AssertionError unless `outputs` are `expected` with a signal-to-noise ratio of `least_snr` dB or more."""
    given, right = torch.stack(list(outputs)), torch.stack(list(expected))
    assert given.shape == right.shape, f"its output is {list(given.shape[1:])}, not {list(right.shape[1:])}"
    power, error = right.square().mean(), (given - right).abs()
    snr = 10 * math.log10(power / max(float(error.square().mean()), 1e-300))
    # A NaN fails both comparisons.
    assert snr >= least_snr, f"its signal-to-noise ratio is {snr:.1f} dB, not {least_snr:.1f}"
    worst = float(error.max() / power.sqrt())
    most = WORST * 10 ** (-least_snr / 20)
    assert worst <= most, f"an output is off by {worst:.2g} times the outputs' root mean square, not {most:.2g}"


@contextmanager
def quantized_engine(name: str) -> Iterator[None]:
    """Inference mode with torch's quantized engine `name`; a process has a single engine at a time."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.backends.quantized.engine = before


def numpy_copy(batch: Tensor) -> Any:
    """A batch as a request brings it to a library that takes numpy arrays."""
    return batch.numpy().copy()


def product_limit(run: Callable[[str, int], probe.ProductLimit], threads: int) -> probe.ProductLimit:
    """What a probe of products gives at our instruction-set level. Raises ProbeUnavailableError without a level."""
    level = native.isa()
    if level is None:
        raise probe.ProbeUnavailableError(f"no native library, hence no level to probe: {native.reason}")
    return run(level, threads)
