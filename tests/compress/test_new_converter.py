"""A new kind of layer is one class: optimize() knows it as soon as it is registered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import recsys_kernels as rk
from recsys_kernels.compress.converters import converter as interface


class HalfConvolution(nn.Module):
    def __init__(self, old: nn.Conv1d) -> None:
        super().__init__()
        self.weight = nn.Parameter(old.weight.detach().half(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv1d(x, self.weight.float())


@pytest.fixture
def registered() -> Iterator[None]:
    before = list(interface.REGISTERED)

    @interface.register
    class HalfConvolutionConverter(interface.Converter):
        option = "linear"
        choices = ("half-convolution",)
        replaceable = (nn.Conv1d,)
        covered = (nn.Conv1d, HalfConvolution)
        parameters = frozenset({"weight", "bias"})

        @classmethod
        def check_options(cls, options: interface.Options) -> None:
            if options.choices.get("linear") in cls.choices and options.batch_size is not None:
                raise ValueError("batch_size is not for convolutions")

        @classmethod
        def from_options(cls, options: interface.Options) -> interface.Converter:
            return cls()

        def shape(self, module: Any) -> tuple[int, int]:
            return module.out_channels, module.in_channels

        def reason_to_keep(self, module: Any, choice: str, parents: Sequence[nn.Module]) -> str | None:
            return "wide" if module.kernel_size[0] > 3 else None

        def convert(self, layers: Sequence[interface.LayerDecision]) -> list[Any]:
            return [HalfConvolution(layer.module) for layer in layers]

        def max_error(self, module: Any, replacement: Any) -> float:
            return (module.weight - replacement.weight.float()).abs().max().item()

        def checks(self) -> Sequence[interface.Check]:
            def note(state: interface.RewriteState) -> None:
                for layer in state.replaced_by(self):
                    layer.notes.append("in half precision")

            return (note,)

    yield
    interface.REGISTERED[:] = before


@pytest.mark.usefixtures("registered")
def test_a_registered_converter_serves_its_choice() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 8, 3, bias=False), nn.Conv1d(8, 8, 5, bias=False), nn.Linear(4, 4))
    x = torch.randn(2, 4, 10)
    new, report = rk.optimize(model, None, linear="half-convolution", sample_inputs=x)
    assert [type(module) for module in new.children()] == [HalfConvolution, nn.Conv1d, nn.Linear]
    assert [(layer.action, layer.reason) for layer in report.layers] == [
        ("half-convolution", "in half precision"),
        ("kept", "wide"),
    ]
    assert report.output_error is not None
    assert 0 < report.output_error < 1e-2
    assert report.layers[0].bytes_after * 2 == report.layers[0].bytes_before
    with pytest.raises(ValueError, match="batch_size is not for convolutions"):
        rk.optimize(model, None, linear="half-convolution", batch_size=1)
    with pytest.raises(ValueError, match=r"linear must be 'int8', .*, 'half-convolution' or None"):
        rk.optimize(model, None, linear="int2")


def test_choices_end_with_their_registration() -> None:
    with pytest.raises(ValueError, match=r"linear must be 'int8', .* or None, but is 'half-convolution'"):
        rk.optimize(nn.Linear(2, 2), None, linear="half-convolution")
