"""Training of a ranking model on a `Dataset`: Adam on the log loss, averaged weights, best epoch by validation AUC."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from recsys_kernels.data.examples import Dataset

from .metrics import Quality, quality_of
from .plain import model_input

# The average of the weights: step i of n counts about (i / n) ** 8, so that the last ninth of all steps so far carries
# most of it, however many there are. Mean of three seeds on MovieLens 100k: validation AUC 0.7510, without it 0.7492.
AVERAGING = 8
LAST_RATE = 0.2  # learning rate at the end, as a share of that at the start: steps that are averaged must still differ


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        epochs: passes over the training rows, at most; the best one by validation AUC is kept.
        batch_size: rows a step; by default about 160 steps an epoch, within 512 to 8192 rows.
        learning_rate: Adam's, falling to a fifth along a half cosine.
        embedding_decay: decoupled weight decay of the tables, in powers of e an epoch (at the full learning
            rate) for a row that is never used: the more data, the weaker in each step.
        weight_decay: decoupled weight decay of the MLPs, as `torch.optim.AdamW` counts it.
        drop_ids: factor of the shares of ids that `Dataset.dropped` hides in training, for those that are new later.
        seed: of the weights, the order of the rows and the dropout.
    """

    epochs: int = 5
    batch_size: int | None = None
    learning_rate: float = 4e-3
    embedding_decay: float = 4.5
    weight_decay: float = 1e-4
    drop_ids: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Epoch:
    """The result of one pass: mean training loss, validation AUC and log loss."""

    loss: float
    auc: float
    log_loss: float


def train(
    model: nn.Module, data: Dataset, settings: TrainSettings, on_step: Callable[[int, int], None] | None = None
) -> list[Epoch]:
    """Trains `model` in place and leaves it in eval mode with the best epoch's averaged weights.

    Args:
        model: `forward(dense, indices, offsets)` -> logits [B].
        data: examples; only the training and validation parts are read.
        settings: see `TrainSettings`.
        on_step: called with (steps done, steps in all) after each step.

    Returns:
        One `Epoch` a pass, with the quality of the averaged weights. The same seed and thread count give the same
        result.
    """
    random = np.random.default_rng(settings.seed)
    torch.manual_seed(settings.seed)
    rows = data.rows("train")
    size = _batch_size(settings, len(rows))
    epoch_steps = -(-len(rows) // size)
    steps = epoch_steps * settings.epochs
    optimizer = torch.optim.AdamW(_groups(model, settings, epoch_steps), lr=settings.learning_rate)
    last = settings.learning_rate * LAST_RATE
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=last)
    average = _Average(model)
    history: list[Epoch] = []
    best: dict[str, torch.Tensor] = {}
    done = 0
    for _ in range(settings.epochs):
        model.train()
        total = 0.0
        order = random.permutation(rows)
        for start in range(0, len(order), size):
            batch = data.batch(order[start : start + size], settings.drop_ids, random)
            loss = nn.functional.binary_cross_entropy_with_logits(model(*batch[:3]), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            average.add()
            total += loss.item() * len(batch.labels)
            done += 1
            if on_step:
                on_step(done, steps)
        quality = evaluate(average.model, data, "validation")
        if not history or quality.auc > max(epoch.auc for epoch in history):
            best = copy.deepcopy(average.model.state_dict())
        history.append(Epoch(total / len(rows), quality.auc, quality.log_loss))
    model.load_state_dict(best)
    model.eval()
    return history


class _Average:
    """A copy of a model whose weights are the running average of the model's.

    Polynomial-decay averaging: Shamir and Zhang, "Stochastic Gradient Descent for Non-smooth Optimization", 2013.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        self._own = [parameter.detach() for parameter in self.model.parameters()]
        self._trained = [parameter.detach() for parameter in model.parameters()]
        self._count = 0

    def add(self) -> None:
        """Takes the model's weights after a step into the average; those of the first step are the average then."""
        self._count += 1
        torch._foreach_lerp_(self._own, self._trained, (AVERAGING + 1) / (AVERAGING + self._count))


def imitate(
    model: nn.Module,
    teacher: nn.Module,
    data: Dataset,
    settings: TrainSettings,
    on_step: Callable[[int, int], None] | None = None,
    after_update: Callable[[], object] | None = None,
) -> None:
    """Trains `model` in place, without its dropout, to predict what `teacher` predicts, and leaves it in eval mode.

    (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.) For a model that was trained already and then
    quantized or pruned: labels would go on with its training, and fit it to them more and more.

    Args:
        model: `forward(dense, indices, offsets)` -> logits [B].
        teacher: the same; it is left in eval mode.
        data: examples; only the training part is read, and no labels.
        settings: see `TrainSettings`; there is no decay.
        on_step: called with (steps done, steps in all) after each step.
        after_update: called after each update of the weights, as `Pruner.step` wants to be.
    """
    random = np.random.default_rng(settings.seed)
    rows = data.rows("train")
    size, steps = _batch_size(settings, len(rows)), imitation_steps(data, settings)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.eval()
    teacher.eval()
    order = np.concatenate([random.permutation(rows) for _ in range(settings.epochs)])
    for done, start in enumerate(range(0, len(order), size), 1):
        batch = data.batch(order[start : start + size], settings.drop_ids, random)
        with torch.no_grad():
            wanted = teacher(*batch[:3]).sigmoid()
        loss = nn.functional.binary_cross_entropy_with_logits(model(*batch[:3]), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if after_update:
            after_update()
        if on_step:
            on_step(done, steps)


def imitation_steps(data: Dataset, settings: TrainSettings) -> int:
    """How many updates `imitate` makes."""
    rows = len(data.rows("train"))
    return -(-rows * settings.epochs // _batch_size(settings, rows))


def _batch_size(settings: TrainSettings, rows: int) -> int:
    return settings.batch_size or min(max(rows // 160, 512), 8192)


def evaluate(model: nn.Module, data: Dataset, part: str) -> Quality:
    """Quality of a `DLRM` or `PlainDLRM` on one part of the data; the model is left in eval mode."""
    labels = data.labels[data.rows(part)]
    return quality_of(labels, predict(model, data, part))


def predict(model: nn.Module, data: Dataset, part: str, batch_size: int = 4096) -> np.ndarray:
    """Probabilities for the rows of one part, float64 [rows]."""
    model.eval()
    out = []
    rows = data.rows(part)
    with torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            logits = model(*model_input(model, data.batch(rows[start : start + batch_size])))
            out.append(logits.double().sigmoid())
    return torch.cat(out).numpy()


def _groups(model: nn.Module, settings: TrainSettings, epoch_steps: int) -> list[dict[str, object]]:
    tables = [p for name, p in model.named_parameters() if name.startswith("embeddings.")]
    others = [p for name, p in model.named_parameters() if not name.startswith("embeddings.")]
    # AdamW multiplies the decay by the learning rate in each step.
    decay = settings.embedding_decay / (epoch_steps * settings.learning_rate)
    return [{"params": tables, "weight_decay": decay}, {"params": others, "weight_decay": settings.weight_decay}]
