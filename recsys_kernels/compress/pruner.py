"""Pruning step by step while a model trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..ops.sparse_linear.patterns import check_sparsity, parse_pattern
from .pruning import (
    SCORES,
    check_finite,
    check_scope,
    choose_masks,
    gradient_scores,
    remove_masks,
    scores_of,
    shape_of,
    shares_of,
)
from .pruning_layers import Choice, PrunedLayer, PruneReport, find_layers


class Schedule(Protocol):
    """When masks move, and how sparse they are then. Steps count calls of :meth:`Pruner.step`, from 1; 0 is the start.

    Attributes:
        end: the last step at which masks move.
    """

    @property
    def end(self) -> int: ...

    def moves(self, step: int) -> bool:
        """Whether masks are chosen anew at a step."""

    def sparsity(self, step: int, target: float) -> float:
        """The sparsity at a step of a layer that ends with ``target``."""


@dataclass(frozen=True)
class CubicSchedule:
    """Sparsity that grows fast at first and slowly in the end (Zhu and Gupta, "To Prune, or Not to Prune", 2017).

    At step t it is target + (initial - target) * (1 - (t - begin) / (end - begin))^3; masks move at ``begin``, every
    ``every`` steps after it, and at ``end``.

    Attributes:
        begin, end: first and last step at which masks move, counted in calls of :meth:`Pruner.step`; begin < end.
        every: steps from one move to the next, at least 1.
        initial: sparsity at ``begin``, 0 <= initial < 1.

    Raises:
        ValueError, TypeError: numbers that are no schedule.
    """

    begin: int
    end: int
    every: int = 1
    initial: float = 0.0

    def __post_init__(self) -> None:
        for name in ("begin", "end", "every"):
            _check_step(name, getattr(self, name), 1 if name == "every" else 0)
        if self.end <= self.begin:
            raise ValueError(f"end must be after begin, but begin is {self.begin} and end {self.end}")
        check_sparsity(self.initial, parse_pattern("unstructured"), "initial")

    def moves(self, step: int) -> bool:
        return self.begin <= step <= self.end and ((step - self.begin) % self.every == 0 or step == self.end)

    def sparsity(self, step: int, target: float) -> float:
        if step < self.begin:
            return 0.0
        left = 1.0 - (step - self.begin) / (self.end - self.begin) if step < self.end else 0.0
        return target + (self.initial - target) * left**3


@dataclass(frozen=True)
class OneShot:
    """All at once.

    Attributes:
        at: the step, counted in calls of :meth:`Pruner.step`; 0 is when the Pruner is made.

    Raises:
        ValueError, TypeError: not a step.
    """

    at: int = 0

    def __post_init__(self) -> None:
        _check_step("at", self.at, 0)

    @property
    def end(self) -> int:
        return self.at

    def moves(self, step: int) -> bool:
        return step == self.at

    def sparsity(self, step: int, target: float) -> float:
        return target if step >= self.at else 0.0


def _check_step(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a number of steps (int), but is {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, but is {value}")


class Pruner:
    """Prunes a model's linear layers while it trains, with any optimizer.

    Making it puts a mask on each layer (see :func:`~recsys_kernels.prune`, whose arguments these are), which keeps
    everything at first; :meth:`step` moves the masks. A mask holds dropped weights at exactly zero and gives them no
    gradient. What momentum or weight decay does to the values behind it has no effect until a weight comes back, which
    it does when its score gets higher than that of one that is kept.

    With ``scores="movement"`` or ``"first_order"`` every step adds to the scores, from the start to the schedule's
    end: -w * gradient or |w * gradient|, with the weight after the optimizer's step and the gradient in ``.grad``
    (summed over processes by DistributedDataParallel, unscaled by a GradScaler's step; entries that are not finite
    count 0, as the optimizer skips such a step). The score of a weight that is dropped stays as it is: there is no
    gradient.

    Example:
        >>> pruner = rk.Pruner(model, 0.9, schedule=rk.CubicSchedule(begin=100, end=900, every=20))  # doctest: +SKIP
        >>> for x, y in loader:                                                    # doctest: +SKIP
        ...     optimizer.zero_grad()
        ...     loss(model(x), y).backward()
        ...     optimizer.step()
        ...     pruner.step()
        >>> pruner.finish()                                                        # doctest: +SKIP

    To resume: make model, optimizer and Pruner as before, then load the ``state_dict`` of each. The model's has the
    masks.

    Args:
        model: any model with ``torch.nn.Linear`` layers; it is changed in place.
        sparsity, pattern, scope, layers, amounts: see :func:`~recsys_kernels.prune`.
        schedule: when and how far: :class:`~recsys_kernels.CubicSchedule`, :class:`~recsys_kernels.OneShot`, or an
            object with the same methods.
        scores: ``"magnitude"``, ``"movement"`` or ``"first_order"``.

    Attributes:
        model: the model.
        steps: how often :meth:`step` was called.

    Raises:
        ValueError: as :func:`~recsys_kernels.prune`; a schedule that does not go with the pattern, the sparsity or the
            scores.
        TypeError: an argument of another type.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        sparsity: float | None = None,
        pattern: str = "unstructured",
        *,
        schedule: Schedule,
        scores: str = "magnitude",
        scope: str = "layer",
        layers: Choice | Iterable[Choice] | None = None,
        amounts: Mapping[str, float] | None = None,
    ) -> None:
        self.model, self.steps = model, 0
        self._pattern = parse_pattern(pattern)
        check_scope(scope, self._pattern)
        if scores not in SCORES:
            raise ValueError(f"scores must be one of {', '.join(map(repr, SCORES))}, but is {scores!r}")
        self._schedule, self._kind, self._scope = schedule, scores, scope
        found = find_layers(model, layers)
        self._shares = shares_of(found, sparsity, self._pattern, amounts)
        self._own = frozenset(amounts or ())
        self._targets = [target for target in found if target.name in self._shares]
        self._left = [target for target in found if target.name not in self._shares]
        self._check_schedule()
        self._before = {target.name: target.zeros for target in self._targets}
        self._scores: dict[str, torch.Tensor] = {}
        self._end: float | None = None  # the sparsity, once finished
        if scores != "magnitude":
            self._scores = {t.name: torch.zeros_like(scores_of(t, "magnitude")) for t in self._targets}
        if schedule.moves(0):
            self._move()
        for target in self._targets:
            if target.mask is None:
                target.put_mask(torch.ones_like(target.parameter, dtype=torch.bool))

    def _check_schedule(self) -> None:
        schedule = self._schedule
        if not all(hasattr(schedule, name) for name in ("end", "moves", "sparsity")):
            raise TypeError(f"schedule must be a CubicSchedule, a OneShot or the like, but is {schedule!r}")
        if (
            self._kind != "magnitude"
            and schedule.moves(0)
            and any(schedule.sparsity(0, s) for s in self._target_shares)
        ):
            raise ValueError(
                f"schedule prunes at step 0, when there are no gradients yet for scores={self._kind!r}: begin later"
            )
        if isinstance(schedule, CubicSchedule):
            if self._pattern.of:
                raise ValueError(
                    f"schedule must be a OneShot with the pattern {self._pattern.name!r}, which has one sparsity"
                )
            least = min(self._target_shares)
            if schedule.initial > least:
                raise ValueError(
                    f"initial of the schedule is {schedule.initial}, above the sparsity {least} at its end"
                )

    @property
    def _target_shares(self) -> list[float]:
        return [share for share in self._shares.values() if share] or [0.0]

    @property
    def sparsity(self) -> float:
        """The share of the weights of all pruned layers that are masked now."""
        if self._end is not None:
            return self._end
        masks = [target.mask for target in self._targets]
        kept = sum(int(torch.count_nonzero(mask)) for mask in masks if mask is not None)
        return 1.0 - kept / sum(target.parameter.numel() for target in self._targets)

    def step(self) -> bool:
        """To be called after every step of the optimizer, before its ``zero_grad``.

        Returns:
            Whether the masks were chosen anew.

        Raises:
            ValueError: NaN or infinity in a weight when masks move; the layer is named.
            RuntimeError: scores that need gradients, but no layer has one; :meth:`finish` was called.
        """
        if self._end is not None:
            raise RuntimeError("step() after finish(): the masks are gone")
        if self._scores and self.steps < self._schedule.end:
            self._add_scores()
        self.steps += 1
        moves = self._schedule.moves(self.steps)
        if moves:
            self._move()
        return moves

    @torch.no_grad()
    def _add_scores(self) -> None:
        seen = False
        for target in self._targets:
            gradient = target.parameter.grad
            if gradient is not None:
                seen = True
                # The model may have moved to another device.
                found = self._scores[target.name] = self._scores[target.name].to(target.parameter.device)
                new = gradient_scores(self._kind, target.parameter.to(found.dtype), gradient)
                found += new.nan_to_num_(0.0, 0.0, 0.0)
        if not seen:
            raise RuntimeError(f"no layer has a gradient for scores={self._kind!r}: call step() before zero_grad()")

    def _move(self) -> None:
        shares = {name: share and self._schedule.sparsity(self.steps, share) for name, share in self._shares.items()}
        for name, share in shares.items():
            if share:
                check_sparsity(share, self._pattern, f"the schedule's sparsity at step {self.steps} for {name!r}")
        values = {target.name: scores_of(target, "magnitude") for target in self._targets}
        for name, found in self._scores.items():
            check_finite(found, f"the score of {name!r}")
        masks = choose_masks(self._scores or values, shares, self._pattern, self._scope, self._own)
        for target in self._targets:
            target.put_mask(masks[target.name])

    def finish(self) -> PruneReport:
        """Makes the zeros permanent: takes the masks off, and leaves plain layers with the parameters that they had.

        Such a model is what ``SparseLinear.from_dense(linear, sparsity=None)`` packs. Without this call, masks stay.

        Returns:
            Sparsity of each layer when the Pruner was made and now.

        Raises:
            RuntimeError: called before.
        """
        if self._end is not None:
            raise RuntimeError("finish() was called before")
        self._end = self.sparsity
        for target in self._targets:
            remove_masks(target.module)
        layers = [PrunedLayer(t.name, shape_of(t), self._before[t.name], t.zeros) for t in self._targets]
        layers += [PrunedLayer(t.name, shape_of(t), t.zeros, t.zeros, t.reason or "not in amounts") for t in self._left]
        order = {name: number for number, (name, _) in enumerate(self.model.named_modules())}
        return PruneReport(tuple(sorted(layers, key=lambda layer: order[layer.name])), self._pattern.name)

    def state_dict(self) -> dict[str, Any]:
        """Steps and scores, for ``torch.save``; like an optimizer's, it refers to tensors that change."""
        settings = {"pattern": self._pattern.name, "scores": self._kind, "layers": [t.name for t in self._targets]}
        return {"steps": self.steps, "scores": dict(self._scores), "settings": settings}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where another Pruner of the same model was; the masks come with the model's ``state_dict``.

        Raises:
            ValueError: not a state of a Pruner with this pattern, these scores and layers. Nothing is changed then.
        """
        wanted = self.state_dict()
        if not isinstance(state_dict, Mapping) or state_dict.keys() != wanted.keys():
            raise ValueError(f"state_dict must have {', '.join(wanted)}, as Pruner.state_dict() gives them")
        for name, value in wanted["settings"].items():
            other = state_dict["settings"].get(name)
            if other != value:
                raise ValueError(f"state_dict is of a Pruner with {name}={other!r}, but this one has {value!r}")
        _check_step("state_dict['steps']", state_dict["steps"], 0)
        for name, found in self._scores.items():
            other = state_dict["scores"].get(name)
            shape = tuple(other.shape) if isinstance(other, torch.Tensor) else None
            if shape != tuple(found.shape):
                raise ValueError(f"the scores of {name!r} in state_dict must be {tuple(found.shape)}, but are {shape}")
        for name, found in self._scores.items():
            found.copy_(state_dict["scores"][name])
        self.steps = state_dict["steps"]

    def __repr__(self) -> str:
        layers = f"{len(self._targets)} layer{'s' if len(self._targets) > 1 else ''}"
        now = f"steps={self.steps}, sparsity={self.sparsity:.4f}"
        return f"Pruner({layers}, {self._pattern.name}, {self._schedule}, {now})"
