"""The operators against float64 results in plain loops: the tests of Triton's interpreter, on the device."""

from __future__ import annotations

from typing import Any

import pytest
import test_bad_input
import test_bounds_check
import test_kernels
from test_bounds_check import (  # noqa: F401
    test_quantized_tables_and_collections,
    test_single_tables,
    test_table_without_rows,
    test_wrong_offsets,
)
from test_kernels import (  # noqa: F401
    test_backward,
    test_backward_keeps_infinities_in_their_rows,
    test_backward_of_a_part_of_the_offsets,
    test_collection,
    test_collection_of_every_type,
    test_expanded_gradient,
    test_forward,
    test_max,
    test_max_of_equal_and_odd_values,
    test_more_columns_than_a_block,
    test_plan_that_does_not_fit,
    test_quantized,
    test_quantized_output_types,
    test_quantized_rows_with_their_scales_behind_them,
    test_tables_may_change_between_calls,
    test_weights_backward,
)


@pytest.fixture(autouse=True)
def _kernels(backend: str, on_device: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    of_gpus = request.function.__module__ == test_bounds_check.__name__
    if backend == "cpu" and (of_gpus or request.function is test_plan_that_does_not_fit):
        pytest.skip("the CPU's kernels always raise, and have more to say of a plan")
    for module in (test_bad_input, test_bounds_check, test_kernels):
        monkeypatch.setattr(module, "TRITON", on_device)
