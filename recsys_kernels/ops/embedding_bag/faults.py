"""What the embedding-bag operators raise about wrong indices and offsets."""

from __future__ import annotations

from typing import NamedTuple

from ...backends import selection


class IndexOutOfRangeError(IndexError, RuntimeError):
    """An index that is not a row of its table.

    torch raises ``RuntimeError`` for such an index and Python's sequences raise ``IndexError``. Code that catches
    either one catches this error. Modules, functions and their backward raise this class. A native kernel that is
    called without this package's Python raises a plain ``IndexError`` with the same message: in a compiled or exported
    graph, and through ``torch.ops.recsys_kernels``.
    """


def index_out_of_range(error: IndexError) -> IndexOutOfRangeError:
    """An ``IndexError`` of a native kernel as the class that every implementation raises."""
    return error if isinstance(error, IndexOutOfRangeError) else IndexOutOfRangeError(*error.args)


def index_error(value: int, position: int, table: str, num_rows: int) -> IndexOutOfRangeError:
    """The error for ``indices[position] == value``; the words are those of the native kernels."""
    return IndexOutOfRangeError(
        f"index {value} at position {position} of indices is out of range for {table} with {num_rows} rows"
    )


def offsets_error(position: int, value: int, num_indices: int) -> RuntimeError:
    """The error for ``offsets[position] == value``, which must not stand there."""
    return RuntimeError(
        f"offsets must start at 0, never decrease and not exceed the number of indices ({num_indices}), "
        f"but offsets[{position}] is {value}"
    )


class Fault(NamedTuple):
    """A wrong index or offset that a CUDA kernel met.

    Attributes:
        kind: 1 for an index, 2 for an offset, 3 for a row of a collection's plan.
        feature: the feature of a collection, or -1 for a single table.
        position: where it stands in ``indices``, ``offsets`` or the plan.
        value: what stands there.
        bound: the table's rows, or the number of indices.
        table: the number of the table in a collection.
    """

    kind: int
    feature: int
    position: int
    value: int
    bound: int
    table: int


def fault_error(record: tuple[int, ...]) -> Exception:
    """What a CUDA kernel wrote down, as the exception that the CPU's operators raise."""
    fault = Fault(*record)
    if fault.kind == 2:
        return offsets_error(fault.position, fault.value, fault.bound)
    if fault.kind == 3:
        return RuntimeError(f"plan row {fault.position} does not fit the tables or total_dim")
    table = "a table" if fault.feature < 0 else f"the table of feature #{fault.feature}"
    return index_error(fault.value, fault.position, table, fault.bound)


selection.register_faults(fault_error)
