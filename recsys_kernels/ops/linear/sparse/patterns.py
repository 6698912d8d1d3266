"""Which weights of a matrix may be dropped together, and which ones a given sparsity keeps."""

from __future__ import annotations

import math
import re
from numbers import Real
from typing import NamedTuple

import torch

BLOCK_SIZES = (1, 4, 16)
MAX_GROUP = 32
# How far a sparsity may be from that of an n:m pattern: people give rounded numbers, as 0.667.
_CLOSE = 1e-3


class Pattern(NamedTuple):
    """A sparsity pattern.

    Attributes:
        name: what users call it.
        rows, columns: the weights of a block of this many output rows and input columns are kept or dropped together;
            1 and 1 unless the pattern is a block pattern.
        kept, of: of every group of ``of`` neighbouring weights of a row ``kept`` are kept; 0 and 0 unless the pattern
            is n:m.
    """

    name: str
    rows: int
    columns: int
    kept: int
    of: int

    @property
    def sparsity(self) -> float | None:
        """The share of weights that an n:m pattern drops; None where any share can be dropped."""
        return 1.0 - self.kept / self.of if self.of else None


def parse_pattern(name: str) -> Pattern:
    """The pattern of a name: ``"unstructured"``, ``"block4x1"`` (4 output rows, 1 column), ``"2:4"`` (keeps 2 of 4).

    Blocks have 1, 4 or 16 rows and columns, but not 1 x 1; n:m goes up to 32.

    Raises:
        ValueError: no such pattern.
        TypeError: not a string.
    """
    if not isinstance(name, str):
        raise TypeError(f"pattern must be a string, but is {type(name).__name__}")
    if name == "unstructured":
        return Pattern(name, 1, 1, 0, 0)
    if found := re.fullmatch(r"block(\d{1,2})x(\d{1,2})", name):
        rows, columns = map(int, found.groups())
        if rows in BLOCK_SIZES and columns in BLOCK_SIZES and rows * columns > 1:
            return Pattern(f"block{rows}x{columns}", rows, columns, 0, 0)
    if found := re.fullmatch(r"(\d{1,2}):(\d{1,2})", name):
        kept, of = map(int, found.groups())
        if 1 <= kept < of <= MAX_GROUP:
            return Pattern(f"{kept}:{of}", 1, 1, kept, of)
    blocks = [f"'block{r}x{c}'" for r in BLOCK_SIZES for c in BLOCK_SIZES if r * c > 1]
    raise ValueError(
        f"pattern must be 'unstructured', {', '.join(blocks)} or 'n:m' with 1 <= n < m <= {MAX_GROUP} (such as '2:4'), "
        f"but is {name!r}"
    )


def keep_mask(scores: torch.Tensor, sparsity: float | None, pattern: str | Pattern) -> torch.Tensor:
    """Which weights are kept when those with the lowest scores are dropped.

    The units that are dropped are single weights or whole blocks; a block's score is the mean of its members' (those at
    the end of a matrix that has no whole number of blocks are smaller). Exactly ``round(sparsity * units)`` are
    dropped; of equal scores the first in the matrix goes first. With n:m, the n highest of every m are kept (Mishra et
    al., "Accelerating Sparse Deep Neural Networks", 2021), and of a last group that is smaller n as well.

    Args:
        scores: float [N, K]: magnitudes, or anything of which more is better.
        sparsity: share to drop, 0 <= sparsity < 1; with n:m None, or 1 - n/m.
        pattern: see :func:`parse_pattern`.

    Returns:
        bool [N, K] on the same device, True where a weight is kept.

    Raises:
        ValueError: no such pattern or sparsity; scores that are not a matrix, or hold NaN or infinity (the first
            position is named).
        TypeError: scores that are not floating-point.
    """
    pattern = parse_pattern(pattern) if isinstance(pattern, str) else pattern
    share = check_sparsity(sparsity, pattern)
    _check_scores(scores)
    if pattern.of:
        return _best_of_groups(scores, pattern)
    units = unit_scores(scores, pattern)
    kept = ~lowest(units.reshape(-1), round(share * units.numel())).reshape(units.shape)
    return expand_units(kept, scores.shape, pattern)


def check_sparsity(sparsity: float | None, pattern: Pattern, argument: str = "sparsity") -> float:
    """The share to drop.

    Raises:
        ValueError, TypeError: no share that the pattern can have.
    """
    fixed = pattern.sparsity
    if sparsity is None:
        if fixed is None:
            raise ValueError(f"{argument} must be given with the pattern {pattern.name!r}, but is None")
        return fixed
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real):
        raise TypeError(f"{argument} must be a number, but is {type(sparsity).__name__}")
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"{argument} must be at least 0 and below 1, but is {sparsity}")
    share = float(sparsity)
    if fixed is not None and not math.isclose(share, fixed, abs_tol=_CLOSE):
        raise ValueError(
            f"{argument} must be None or {fixed:g} with the pattern {pattern.name!r}, which keeps {pattern.kept} of "
            f"every {pattern.of} weights, but is {sparsity}"
        )
    return share


def unit_scores(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The scores [ceil(N / rows), ceil(K / columns)] of blocks: means; float32, or float64 if the scores are."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if pattern.rows == pattern.columns == 1:
        return scores
    n, k = scores.shape
    padded = torch.nn.functional.pad(scores, (0, -k % pattern.columns, 0, -n % pattern.rows))
    sums = padded.unflatten(1, (-1, pattern.columns)).sum(2).unflatten(0, (-1, pattern.rows)).sum(1)
    heights = _sizes(n, pattern.rows, scores.device)
    return sums / (heights.unsqueeze(1) * _sizes(k, pattern.columns, scores.device))


def expand_units(units: torch.Tensor, shape: torch.Size | tuple[int, ...], pattern: Pattern) -> torch.Tensor:
    """Gives every weight of a matrix of this shape what its block has."""
    for dim, size in enumerate((pattern.rows, pattern.columns)):
        if size > 1:
            units = units.repeat_interleave(size, dim)
    return units[: shape[0], : shape[1]].contiguous()


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """bool like scores [n], True at the ``count`` lowest; of equal ones at the first."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # Selection: a stable sort of 1M scores takes several times as long.
    threshold = scores.kthvalue(count).values
    found = scores < threshold
    ties = (scores == threshold).nonzero().squeeze(1)
    found[ties[: count - int(found.sum())]] = True
    return found


def _sizes(length: int, size: int, device: torch.device) -> torch.Tensor:
    """How much of each of the parts of a length there is: the last may be shorter."""
    return (length - torch.arange(0, length, size, device=device)).clamp(max=size)


def _best_of_groups(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    k = scores.shape[1]
    filled = torch.nn.functional.pad(scores, (0, -k % pattern.of), value=-math.inf)
    groups = filled.unflatten(1, (-1, pattern.of))
    best = groups.sort(dim=2, stable=True).indices[..., pattern.of - pattern.kept :]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, best, True).flatten(1)[:, :k].contiguous()


def _check_scores(scores: torch.Tensor) -> None:
    if not scores.is_floating_point():
        raise TypeError(f"scores must be floating-point, but are {str(scores.dtype).removeprefix('torch.')}")
    if scores.ndim != 2:
        raise ValueError(f"scores must be a matrix [N, K], but have the shape {tuple(scores.shape)}")
    if not torch.isfinite(scores).all():
        row, column = (~torch.isfinite(scores)).nonzero()[0].tolist()
        raise ValueError(f"scores[{row}, {column}] is {scores[row, column].item()}, but must be finite")
