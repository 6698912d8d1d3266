"""What the embedding-bag operators raise about wrong indices."""

from __future__ import annotations


class IndexOutOfRangeError(IndexError, RuntimeError):
    """An index that is not a row of its table.

    torch raises ``RuntimeError`` for such an index and Python's sequences raise ``IndexError``: code that catches
    either one catches this error.
    """


def index_out_of_range(error: IndexError) -> IndexOutOfRangeError:
    """An ``IndexError`` of a native kernel as the class that every implementation raises."""
    return error if isinstance(error, IndexOutOfRangeError) else IndexOutOfRangeError(*error.args)


def index_error(value: int, position: int, table: str, num_rows: int) -> IndexOutOfRangeError:
    """The error for ``indices[position] == value``; the words are those of the native kernels."""
    return IndexOutOfRangeError(
        f"index {value} at position {position} of indices is out of range for {table} with {num_rows} rows"
    )
