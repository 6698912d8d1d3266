"""int8 linear layers and MLPs: the cases, and the workload (weights, activations) of a case."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from bench.core.cases import BenchCase, Target
from bench.core.sides import ONE_THREAD
from bench.ops.linear.layers import INT8_SNR, LayerWorkload

FP32 = "torch fp32"
MLP = (479, 1024, 1024, 512, 256, 1)  # the top of a DLRM


@dataclass(frozen=True)
class Int8LinearCase(BenchCase):
    """Layers of `widths` features with ReLU between them, over `batch` rows; activations are quantized as they come."""

    family: ClassVar[str] = "linear/int8"
    batch: int
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "widths", tuple(self.widths))  # JSON has no tuples

    @property
    def name_parts(self) -> list[str]:
        kind = "int8-linear" if len(self.widths) == 2 else "int8-mlp"
        shape = f"{self.batch}x" + ("x" if len(self.widths) == 2 else "-").join(map(str, self.widths))
        return [kind, *([] if self.level == "function" else [self.level]), shape]

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


def _cases() -> Iterator[Int8LinearCase]:
    case = Int8LinearCase
    request, mlp = case(1, (512, 512), targets=(Target(1.5),)), case(1, MLP, targets=(Target(2.0),))
    yield request
    yield replace(request, level="module")
    yield case(16, (512, 512), targets=(Target(1.2),))
    yield case(7, (415, 333), targets=(Target(1.5),))
    yield case(1, (4096, 4096))
    yield mlp
    yield replace(mlp, level="module")
    large = [case(128, (512, 512)), case(1024, (1024, 1024)), case(2048, (479, 1024))]
    large.append(case(512, MLP, targets=(Target(1.3), Target(4.0, FP32))))
    yield from large
    for one in large:
        yield replace(one, threads=2, targets=(Target(1.8, ONE_THREAD),))


CASES = tuple(_cases())


class Int8LinearWorkload(LayerWorkload):
    """A float network and a pool of batches of one case, both from a fixed seed.

    Weights and biases are uniform, as torch initializes them, but so wide that a layer's output has the power of its
    input: otherwise the biases of a later layer would drown a layer's noise.
    """

    def __init__(self, case: Int8LinearCase, quick: bool = False) -> None:
        generator = torch.Generator().manual_seed(17)
        self.layers: list[tuple[Tensor, Tensor]] = []
        for number, (ins, outs) in enumerate(case.layers):
            width = math.sqrt((6.0 if number else 3.0) / ins)  # a ReLU before a layer halves the power
            weight = torch.empty(outs, ins).uniform_(-width, width, generator=generator)
            self.layers.append((weight, torch.empty(outs).uniform_(-0.2, 0.2, generator=generator)))
        super().__init__(case, quick, case.widths[0], case.widths[-1], generator)
        self.least_snr = INT8_SNR - 10 * math.log10(len(self.layers))  # every layer adds its noise

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
