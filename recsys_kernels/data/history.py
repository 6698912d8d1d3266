"""Facts known before a moment: running statistics and previous items, never values from the future.

"Before" is strict: events with the same timestamp do not see each other, since MovieLens users rate a
page of films at once and the order inside a second is arbitrary.
"""

from __future__ import annotations

import numpy as np


def past_counts(
    keys: np.ndarray, times: np.ndarray, weights: np.ndarray, longest: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Number of earlier events with the same key, and the sum of their weights.

    Args:
        keys: int64 [N], for example user numbers.
        times: int64 [N].
        weights: float [N].
        longest: only so many of the earlier events count, the latest; None for all.

    Returns:
        (counts float64 [N], sums float64 [N]) over events with the same key and a smaller time.
    """
    order = np.lexsort((times, keys))
    group, before = _groups(keys[order], times[order])
    totals = np.concatenate(([0.0], np.cumsum(weights[order], dtype=np.float64)))
    counts, sums = np.empty(len(keys)), np.empty(len(keys))
    first = group if longest is None else np.maximum(group, before - longest)
    counts[order] = before - first
    sums[order] = totals[before] - totals[first]
    return counts, sums


def first_time(keys: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Time of the first event with the same key, int64 [N]."""
    order = np.lexsort((times, keys))
    group, _ = _groups(keys[order], times[order])
    out = np.empty_like(times)
    out[order] = times[order][group]
    return out


def previous(
    keys: np.ndarray, times: np.ndarray, values: np.ndarray, chosen: np.ndarray, longest: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The last `longest` chosen values of the same key before each event, as overlapping windows.

    Args:
        keys, times: int64 [N].
        values: integers [N], for example item numbers.
        chosen: bool [N]: only these events enter a window.
        longest: length of the longest window.

    Returns:
        (values [number of chosen] in the type given, starts int64 [N], lengths int32 [N]).
    """
    order = np.lexsort((times, keys))
    group, before = _groups(keys[order], times[order])
    picked = chosen[order]
    rank = np.concatenate(([0], np.cumsum(picked)))
    end = rank[before]
    start = np.maximum(rank[group], end - longest)
    starts, lengths = np.empty(len(keys), np.int64), np.empty(len(keys), np.int32)
    starts[order] = start
    lengths[order] = end - start
    return values[order][picked], starts, lengths


def _groups(keys: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For events sorted by (key, time): position of the key's first event, and of the first of this time."""
    place = np.arange(len(keys))
    if not len(keys):
        return place, place
    new_key = np.concatenate(([True], keys[1:] != keys[:-1]))
    new_time = new_key | np.concatenate(([True], times[1:] != times[:-1]))
    return np.maximum.accumulate(np.where(new_key, place, 0)), np.maximum.accumulate(np.where(new_time, place, 0))
