"""int8 linear layers and MLPs: the cases and the `Workload` (weights, activations) that belongs to each."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from bench.sides import ONE_THREAD, Target

FP32 = "torch fp32"
MLP = (479, 1024, 1024, 512, 256, 1)  # the top of a DLRM
POOL_BYTES = 32 << 20
CHECKED_OUTPUTS = 256
# The coarsest side, torch, rounds activations to 7 bits over the range of the whole batch, some 11 standard deviations:
# noise of (11 / 127)^2 / 12 of the signal's power, 32 dB. Seen for one layer: 34 to 36 dB for torch, 40 to 42 dB else.
LAYER_SNR = 30.0
# No single output may be off by more than this many standard deviations of the noise allowed.
WORST = 8.0


@dataclass(frozen=True)
class LinearCase:
    """Layers of `widths` features with ReLU between them, over `batch` rows; activations are quantized as they come.

    level: "function" (operators in a row) or "module", which adds what modules do in Python.
    targets: to be reached besides being no slower than every peer.
    """

    batch: int
    widths: tuple[int, ...]
    threads: int = 1
    targets: tuple[Target, ...] = (Target(1.0),)
    level: str = "function"
    near_limit: ClassVar[bool] = False

    def __post_init__(self) -> None:
        # As read from JSON, which has neither tuples nor classes.
        object.__setattr__(self, "widths", tuple(self.widths))
        object.__setattr__(self, "targets", tuple(Target(*target) for target in self.targets))

    @property
    def name(self) -> str:
        """Unique among the cases of all operators, with no blanks: what `--case` is matched against."""
        kind = "int8-linear" if len(self.widths) == 2 else "int8-mlp"
        parts = [kind] if self.level == "function" else [kind, self.level]
        parts.append(f"{self.batch}x" + ("x" if len(self.widths) == 2 else "-").join(map(str, self.widths)))
        return "-".join(parts) + (f"-{self.threads}threads" if self.threads > 1 else "")

    @property
    def size(self) -> int:
        """Bytes of the weights as int8."""
        return sum(ins * outs for ins, outs in self.layers)

    @property
    def amount(self) -> int:
        """Operations of a call: a multiplication and an addition for each weight and row."""
        return 2 * self.batch * self.size

    @property
    def layers(self) -> list[tuple[int, int]]:
        """Features in and out of each layer."""
        return list(zip(self.widths, self.widths[1:], strict=False))

    def resized(self, rows: int | None, quick: bool) -> LinearCase:
        """The same case: it has no table."""
        return self


def _cases() -> Iterator[LinearCase]:
    request, mlp = LinearCase(1, (512, 512), targets=(Target(1.5),)), LinearCase(1, MLP, targets=(Target(2.0),))
    yield request
    yield replace(request, level="module")
    yield LinearCase(16, (512, 512), targets=(Target(1.2),))
    yield LinearCase(7, (415, 333), targets=(Target(1.5),))
    yield LinearCase(1, (4096, 4096))
    yield mlp
    yield replace(mlp, level="module")
    large = [LinearCase(128, (512, 512)), LinearCase(1024, (1024, 1024)), LinearCase(2048, (479, 1024))]
    large.append(LinearCase(512, MLP, targets=(Target(1.3), Target(4.0, FP32))))
    yield from large
    for case in large:
        yield replace(case, threads=2, targets=(Target(1.8, ONE_THREAD),))


CASES = tuple(_cases())


class LinearWorkload:
    """A float network and a pool of batches of one case, both from a fixed seed.

    Weights and biases are uniform, as torch initializes them, but wide enough that a layer's output has the power of
    its input: then no layer's noise is drowned by the biases of a later one. Inputs change from call to call; weights
    stay where a server's are, in the cache if they fit. `checked`: the number of batches that the gate runs.
    """

    def __init__(self, case: LinearCase, quick: bool = False) -> None:
        self.case, self.quick = case, quick
        generator = torch.Generator().manual_seed(17)
        self.layers: list[tuple[Tensor, Tensor]] = []
        for number, (ins, outs) in enumerate(case.layers):
            width = math.sqrt((6.0 if number else 3.0) / ins)  # a ReLU before a layer halves the power
            weight = torch.empty(outs, ins).uniform_(-width, width, generator=generator)
            self.layers.append((weight, torch.empty(outs).uniform_(-0.2, 0.2, generator=generator)))
        count = max(8, min(64, POOL_BYTES // (4 * case.batch * case.widths[0])))
        self.inputs = torch.randn(count, case.batch, case.widths[0], generator=generator)
        self.checked = min(count, max(2, -(-CHECKED_OUTPUTS // (case.batch * case.widths[-1]))))

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, number: int) -> Tensor:
        """[batch, features], fp32."""
        return self.inputs[number % len(self)]

    @functools.cached_property
    def net(self) -> nn.Sequential:
        """The network in float, for inference."""
        modules: list[nn.Module] = []
        for weight, bias in self.layers:
            linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            linear.bias = nn.Parameter(bias, requires_grad=False)
            modules += [linear, nn.ReLU()]
        return nn.Sequential(*modules[:-1]).eval()

    def expected(self, batch: Tensor) -> Tensor:
        """The network's output in float64."""
        out = batch.double()
        for number, (weight, bias) in enumerate(self.layers):
            out = (out.relu() if number else out) @ weight.double().T + bias.double()
        return out

    @property
    def least_snr(self) -> float:
        """Signal to noise that the gate asks for, in dB: every layer adds its noise."""
        return LAYER_SNR - 10 * math.log10(len(self.layers))

    def check(self, outputs: Sequence[Tensor]) -> None:
        """Raises AssertionError unless `outputs`, in float64, are right for batches 0, 1, 2 and so on."""
        judge(outputs, [self.expected(self.batch(number)) for number in range(len(outputs))], self.least_snr)


def judge(outputs: Sequence[Tensor], expected: Sequence[Tensor], least_snr: float) -> None:
    """Raises AssertionError unless `outputs` are `expected` but for noise of which `least_snr` (dB) is the most."""
    given, right = torch.stack(list(outputs)), torch.stack(list(expected))
    assert given.shape == right.shape, f"its output is {list(given.shape[1:])}, not {list(right.shape[1:])}"
    power, error = right.square().mean(), (given - right).abs()
    snr = 10 * math.log10(power / max(float(error.square().mean()), 1e-300))
    # A NaN fails both comparisons.
    assert snr >= least_snr, f"its signal-to-noise ratio is {snr:.1f} dB, not {least_snr:.1f}"
    worst = float(error.max() / power.sqrt())
    most = WORST * 10 ** (-least_snr / 20)
    assert worst <= most, f"an output is off by {worst:.2g} times the outputs' root mean square, not {most:.2g}"
