"""optimize(linear=...): noise and speed of layers, measured on sample inputs, and the report of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_support import WIDTH, by_name, kinds, mlp, only_linear, rows, without_timing
from torch import nn

import recsys_kernels as rk
from recsys_kernels.compress.converters import linear as linear_module
from recsys_kernels.compress.rewrite.optimize import optimize

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def no_timing(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    return without_timing(monkeypatch)


def test_noise_is_measured_layer_by_layer(no_timing: Any) -> None:
    model = mlp().eval()
    _, report = only_linear(model, sample_inputs=rows(200))
    x = rows(200)
    steps: list[tuple[str, int, Any]] = [("0", 0, F.relu), ("3", 3, F.gelu), ("6", 6, lambda y: y)]
    with torch.no_grad():
        for name, number, function in steps:
            linear = model[number]
            wanted = function(linear(x))
            out = function(rk.Int8Linear.from_float(linear)(x))
            ratio = wanted.double().square().sum() / (out.double() - wanted.double()).square().sum()
            layer = by_name(report)[name]
            assert layer.sqnr == pytest.approx(10 * torch.log10(ratio).item(), abs=0.05)
            assert layer.sqnr > 30
            assert f"SQNR {layer.sqnr:.1f} dB" in layer.reason
            x = wanted
    assert report.output_error is not None
    assert 0 < report.output_error < 0.1


def test_a_noisy_layer_stays_in_float(no_timing: Any) -> None:
    model = mlp().eval()
    with torch.no_grad():
        model[3].weight[:, 0] = 1e4  # nothing of the others is left in a row with one scale
        model[0].weight[0] = 0.0
        model[0].bias[0] = 0.0
    new, report = only_linear(model, sample_inputs=rows(50))
    layers = by_name(report)
    assert [layer.action for layer in report.layers] == ["int8", "kept", "int8"]
    assert layers["3"].sqnr is not None
    assert layers["3"].sqnr < 20
    assert layers["3"].reason == f"SQNR {layers['3'].sqnr:.1f} dB, less than min_sqnr=20"
    assert kinds(new) == {"0": "Int8Linear", "3": "Linear", "4": "Dropout", "5": "GELU", "6": "Int8Linear"}
    _, strict = only_linear(model, sample_inputs=rows(50), min_sqnr=1000.0)
    assert not strict.swapped
    _, lax = only_linear(model, sample_inputs=rows(50), min_sqnr=-1000.0)
    assert len(lax.swapped) == 3


def test_float_stays_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.top, self.wide = mlp(), nn.Linear(6, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.wide(self.top(x))

    timed = []

    def microseconds(first: Any, second: Any, rows: torch.Tensor) -> tuple[float, float]:
        torch.testing.assert_close(second(rows), first(rows), rtol=0.1, atol=0.1)
        timed.append((type(first).__name__, type(second).__name__, tuple(rows.shape)))
        return (10.0, 12.5) if len(rows) < 100 else (80.0, 20.0)

    monkeypatch.setattr(linear_module, "_microseconds", microseconds)
    model = Model().eval()
    new, report = only_linear(model, sample_inputs=rows(50))
    assert timed == [("Sequential", "Int8MLP", (50, WIDTH)), ("Linear", "Int8Linear", (50, 6))]
    assert not report.swapped
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons["wide"] == "float is faster for 50 rows: 10.0 us, int8 12.5 us"
    assert reasons["top.3"] == "float is faster for 50 rows: 10.0 us, int8 12.5 us (one call of 'top.0' to 'top.6')"
    assert kinds(new) == kinds(model)
    timed.clear()
    new, report = only_linear(model, sample_inputs=rows(50), batch_size=600)
    assert timed == [("Sequential", "Int8MLP", (600, WIDTH)), ("Linear", "Int8Linear", (600, 6))]
    assert all(layer.action == "int8" for layer in report.layers)
    assert {(layer.float_us, layer.int8_us) for layer in report.layers} == {(80.0, 20.0)}
    assert "20.0 us instead of 80.0 for 600 rows (one call of 'top.0' to 'top.6')" in str(report)
    assert by_name(report)["top.6"].reason.endswith("in the call of 'top.0'")
    timed.clear()
    _, report = only_linear(model, batch_size=1)  # without inputs: random rows
    assert [shape for *_, shape in timed] == [(1, WIDTH), (1, 6)]
    assert not report.swapped
    assert "for 1 row:" in report.layers[0].reason


def test_rows_of_a_sequence_follow_the_batch_size(no_timing: list[torch.Tensor]) -> None:
    only_linear(nn.Linear(WIDTH, 16), sample_inputs=torch.randn(4, 10, WIDTH), batch_size=30)
    assert [tuple(rows.shape) for rows in no_timing] == [(300, WIDTH)]


def test_a_real_measurement() -> None:
    torch.manual_seed(0)
    _, report = only_linear(nn.Linear(512, 512), sample_inputs=rows(64, 512))
    (layer,) = report.layers
    assert layer.float_us is not None
    assert layer.int8_us is not None
    assert 1 < layer.float_us < 1e5
    assert 1 < layer.int8_us < 1e5
    assert (layer.action == "kept") == (layer.float_us < layer.int8_us)


def test_layers_that_the_inputs_do_not_reach(no_timing: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(input=x)

    _, report = only_linear(Model(), sample_inputs=rows())
    layers = by_name(report)
    assert layers["used"].sqnr is not None
    assert (layers["unused"].sqnr, layers["unused"].int8_us) == (None, None)
    assert layers["unused"].action == "int8"
    assert "not called on the sample inputs" in layers["unused"].reason


def test_report_as_json_and_text() -> None:
    _, report = only_linear(mlp())
    text = json.loads(json.dumps(report.to_dict()))
    assert [layer["sqnr"] for layer in text["layers"]] == [None, None, None]
    assert report.bytes_after < report.bytes_before / 2
    assert report.bytes_after == sum(layer.bytes_after for layer in report.layers)
    for word in ("40 x 24", "Linear", "int8", f"{report.bytes_after:,}"):
        assert word in str(report)
    for layer in report.layers:
        assert layer.relative_error is not None
        assert 0 < layer.relative_error <= 0.5 / 127 * 1.001


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"linear": "int4"}, ValueError, "linear must be 'int8', 'int8-static', 'int8-weight-only', 'sparse', "),
        ({"linear": "int8-static"}, ValueError, r"needs ranges=rk\.calibrate\(model, batches\)"),
        ({"linear": "int8", "ranges": {}}, ValueError, "ranges is for linear='int8-static', but linear is 'int8'"),
        ({"linear": "int8-static", "ranges": {"9": (0, 1)}}, ValueError, "ranges: '9' names no module"),
        ({"linear": "int8", "min_sqnr": 3.0}, ValueError, "min_sqnr needs linear and sample_inputs"),
        ({"min_sqnr": 3.0, "sample_inputs": rows()}, ValueError, "min_sqnr needs linear and sample_inputs"),
        ({"linear": "int8", "batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"batch_size": -3}, ValueError, "batch_size must be at least 1, but is -3"),
        ({"linear": "int8-static", "ranges": {"0": (1.0, 1.0)}, "skip": ["3", "6"]}, None, "input_range must be"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception] | None, message: str) -> None:
    if error is None:  # of one layer: that one stays
        _, report = optimize(mlp(), **options)
        assert message in report.layers[0].reason
        return
    with pytest.raises(error, match=message):
        optimize(mlp(), **options)


def test_layers_without_a_range_stay() -> None:
    _, report = only_linear(mlp(), "int8-static", ranges={"0": (-1.0, 1.0), "6": (0.0, 1.0)})
    assert [layer.action for layer in report.layers] == ["int8-static", "kept", "int8-static"]
    assert report.layers[1].reason == "no range of its input in ranges"
