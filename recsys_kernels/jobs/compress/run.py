"""The main job: train a ranking model, compress it every way, measure quality and cost of each."""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recsys_kernels import __version__
from recsys_kernels.backends import selection
from recsys_kernels.backends.registry import native
from recsys_kernels.data.examples import Dataset
from recsys_kernels.data.load import load_dataset
from recsys_kernels.models.boosted import Boosted, fit_boosted
from recsys_kernels.models.dlrm import DLRM, DLRMConfig
from recsys_kernels.models.metrics import Estimate, Quality, auc_change, auc_estimate, log_loss_deviation, quality_of
from recsys_kernels.models.train import Epoch, TrainSettings, evaluate, imitate, imitation_steps, predict, train
from recsys_kernels.ops.linear.sparse.patterns import parse_pattern

from ...compress.prune.pruner import CubicSchedule, OneShot, Pruner
from .cost import Cost, all_sides, grown_batches, grown_models, measure, real_batches
from .variants import BASELINE, BASELINE_TITLE, METHOD, PATTERN, VARIANTS, Material, prune_options, share_of

TOLERANCE = 0.001  # AUC that a compressed model may lose
SMALL_TEST = 3000  # test rows below which changes of AUC are hardly more than noise
PRUNED_TOLERANCE = 0.002  # AUC that a pruned one may lose to be recommended among its like
# Training examples on which the ranges of static layers are found.
CALIBRATION_BATCHES, CALIBRATION_ROWS = 32, 512
# Learning rate of the quantization-aware training, one epoch, as a share of that of the training.
TUNING_RATE = 0.025
# The training of pruned MLPs: epochs, learning rate as a share of that of the training, and the share of the steps
# after which nothing more is pruned. On MovieLens 100k 80 % of blocks of 4 x 1 cost 0.0005 of AUC so, and 0.004 in one
# epoch at the training's rate with the same share of each layer.
PRUNING_EPOCHS, PRUNING_RATE, PRUNING_END = 4, 1.0, 0.6
PRUNING_MOVES = 50  # masks move at most this often


@dataclass(frozen=True)
class JobSettings:
    """The settings of a run.

    Attributes:
        data: data set, see `load_dataset`; MovieLens 100k by default.
        cache: folder for fetched files.
        limit: rows to use at most.
        rows: rows of every table in the second cost measurement; None leaves it out.
        dim: width of the embedding rows.
        threads: torch threads, for training and timing; the same number gives the same model.
        sparsity: share of the weights that pruned MLPs drop; None: what the pattern fixes, else 0.8.
        pattern: how they are pruned, see `rk.prune`.
        training: see `TrainSettings`.
    """

    data: Path | None = None
    cache: Path | None = None
    limit: int | None = None
    rows: int | None = None
    dim: int = 64
    threads: int = 1
    sparsity: float | None = None
    pattern: str = PATTERN
    training: TrainSettings = field(default_factory=TrainSettings)


@dataclass
class JobResult:
    """The result of a run.

    Attributes:
        data: the examples.
        models: name -> model; `BASELINE` and every variant.
        epochs: the training's progress.
        quality: test quality by model name.
        change: test AUC minus that of the uncompressed model by model name, with the deviation of the difference.
        auc: test AUC of the uncompressed model with its deviation.
        log_loss_deviation: of the test log loss of the uncompressed model.
        boosted: gradient-boosted trees on the same features, which a model worth compressing at least matches.
        boosted_quality: their test quality.
        lead: test AUC of the uncompressed model minus that of the trees.
        without_tables: test quality of the uncompressed model with every table zeroed: what the tables are worth.
        validation: validation AUC by model name.
        validation_change: validation AUC minus that of the uncompressed model, which `chosen` goes by.
        cost: cost of the trained models by name.
        grown: cost with tables of `settings.rows` rows, random weights; empty if not asked for.
        chosen: the smallest variant that keeps the AUC by more than noise, see `TOLERANCE`.
        chosen_pruned: the smallest pruned one that keeps it within `PRUNED_TOLERANCE` so; None if none does.
        seconds: wall time of each stage.
    """

    settings: JobSettings
    data: Dataset
    models: dict[str, Any]
    epochs: list[Epoch]
    quality: dict[str, Quality]
    change: dict[str, Estimate]
    auc: Estimate
    log_loss_deviation: float
    boosted: Boosted
    boosted_quality: Quality
    lead: Estimate
    without_tables: Quality
    validation: dict[str, float]
    validation_change: dict[str, Estimate]
    cost: dict[str, Cost]
    grown: dict[str, Cost]
    chosen: str
    chosen_pruned: str | None
    seconds: dict[str, float]

    def title(self, name: str) -> str:
        """The title that a reader sees for a model name."""
        return {BASELINE: BASELINE_TITLE, **{variant.name: variant.title for variant in VARIANTS}}[name]

    @property
    def test_is_small(self) -> bool:
        """Whether the test has so few rows that its AUC changes say little."""
        return len(self.data.rows("test")) < SMALL_TEST


def run(
    settings: JobSettings,
    on_stage: Callable[[str], None] = lambda stage: None,
    on_step: Callable[[int, int], None] | None = None,
) -> JobResult:
    """Runs the job.

    Args:
        settings: what to run.
        on_stage: called with a few words when a stage begins.
        on_step: called with (steps done, steps in all) in training.

    Raises:
        DataError: the data cannot be used, or the grown tables do not fit into memory.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        return _run(settings, _Clock(on_stage), on_step)
    finally:
        torch.set_num_threads(before)


def _run(settings: JobSettings, clock: _Clock, on_step: Callable[[int, int], None] | None) -> JobResult:
    clock.stage("reading the data")
    data = load_dataset(settings.data, cache=settings.cache, limit=settings.limit)
    torch.manual_seed(settings.training.seed)
    config = DLRMConfig.for_schema(data.schema, settings.dim)
    # The tables are built before the training: tables that do not fit are reported at once, not minutes later.
    grown = _grown_cost(config, data, settings, clock) if settings.rows else {}
    clock.stage("training")
    torch.manual_seed(settings.training.seed)
    model = DLRM(config)
    epochs = train(model, data, settings.training, on_step)
    clock.stage("compressing")
    models = all_sides(model, _material(data, settings, clock, on_step))
    clock.stage("scoring")
    scores = _Scores(models, data, "test")
    validation = _Scores(models, data, "validation")
    without_tables = evaluate(_without_tables(model), data, "test")
    clock.stage("fitting gradient-boosted trees")
    boosted = fit_boosted(data, settings.training.seed, settings.threads)
    clock.stage("timing")
    cost = measure(models, real_batches(data, settings.training.seed))
    return JobResult(
        settings=settings,
        data=data,
        models=models,
        epochs=epochs,
        quality=scores.quality,
        change=scores.change,
        auc=auc_estimate(scores.labels, scores.of[BASELINE]),
        log_loss_deviation=log_loss_deviation(scores.labels, scores.of[BASELINE]),
        boosted=boosted,
        boosted_quality=quality_of(scores.labels, boosted.scores),
        lead=auc_change(scores.labels, scores.of[BASELINE], boosted.scores),
        without_tables=without_tables,
        validation={name: quality.auc for name, quality in validation.quality.items()},
        validation_change=validation.change,
        cost=cost,
        grown=grown,
        chosen=_choose(validation.change, cost, TOLERANCE) or VARIANTS[0].name,
        chosen_pruned=_choose(validation.change, cost, PRUNED_TOLERANCE, pruned=True),
        seconds=clock.finish(),
    )


class _Scores:
    """The predictions of every model for one part of the data.

    Attributes:
        labels: [rows].
        of: probabilities [rows] by model name.
        quality: how good they are.
        change: AUC minus that of the uncompressed model.
    """

    def __init__(self, models: dict[str, Any], data: Dataset, part: str) -> None:
        self.labels = data.labels[data.rows(part)]
        self.of = {name: predict(model, data, part) for name, model in models.items()}
        self.quality = {name: quality_of(self.labels, scores) for name, scores in self.of.items()}
        self.change = {name: auc_change(self.labels, scores, self.of[BASELINE]) for name, scores in self.of.items()}


def _material(
    data: Dataset, settings: JobSettings, clock: _Clock, on_step: Callable[[int, int], None] | None
) -> Material:
    """Training examples for the ranges of static layers, and the training of quantized and pruned MLPs."""
    random = np.random.default_rng(settings.training.seed)
    rows = data.rows("train")
    rows = random.choice(rows, min(len(rows), CALIBRATION_BATCHES * CALIBRATION_ROWS), replace=False)
    batches = [data.batch(rows[start : start + CALIBRATION_ROWS]) for start in range(0, len(rows), CALIBRATION_ROWS)]

    def tune(model: DLRM, teacher: DLRM) -> None:
        clock.stage("training 8-bit MLPs")
        rate = settings.training.learning_rate * TUNING_RATE
        imitate(model, teacher, data, replace(settings.training, epochs=1, learning_rate=rate), on_step)
        clock.stage("compressing")

    done: list[DLRM] = []

    def pruned(model: DLRM) -> DLRM:
        if not done:  # several variants are made of it
            clock.stage("training pruned MLPs")
            done.append(_pruned(model, data, settings, on_step))
            clock.stage("compressing")
        return copy.deepcopy(done[0])  # with tables of its own, see `grown_bytes`

    return Material([batch[:3] for batch in batches], tune, pruned, settings.sparsity, settings.pattern)


def _pruned(model: DLRM, data: Dataset, settings: JobSettings, on_step: Callable[[int, int], None] | None) -> DLRM:
    """The model with 8-bit tables and MLPs that are pruned step by step while they learn to predict what it does."""
    small = model.quantize(8)
    rate = settings.training.learning_rate * PRUNING_RATE
    training = replace(settings.training, epochs=PRUNING_EPOCHS, learning_rate=rate)
    options = prune_options(small, settings.sparsity, settings.pattern)
    schedule: CubicSchedule | OneShot = OneShot()  # n:m patterns have a single sparsity
    if parse_pattern(settings.pattern).sparsity is None:
        steps = imitation_steps(data, training)
        schedule = CubicSchedule(0, max(1, round(PRUNING_END * steps)), max(1, steps // PRUNING_MOVES))
    pruner = Pruner(small.head, schedule=schedule, **options)
    imitate(small, model, data, training, on_step, pruner.step)
    pruner.finish()
    return small


def _without_tables(model: DLRM) -> DLRM:
    """The model with zeros in every table, to see how much of its quality the tables carry."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for weight in copied.embeddings.parameters():
            weight.zero_()
    return copied


def to_json(result: JobResult) -> dict[str, Any]:
    """The whole result as plain JSON values (times in microseconds, sizes in bytes)."""
    data, settings = result.data, result.settings
    parts = {}
    for part in ("train", "validation", "test"):
        labels = data.labels[data.rows(part)]
        parts[part] = {"rows": len(labels), "positive_share": float(labels.mean())}
    config = result.models[VARIANTS[0].name].config
    return {
        "format": 1,
        "data": {"name": data.name, "parts": parts, "dense": [f.name for f in data.schema.dense]},
        "model": config.to_json(),
        "training": {**asdict(settings.training), "history": [asdict(epoch) for epoch in result.epochs]},
        "threads": settings.threads,
        "grown_rows": settings.rows,
        "auc_tolerance": TOLERANCE,
        "calibration": {"method": METHOD, "rows": min(CALIBRATION_BATCHES * CALIBRATION_ROWS, parts["train"]["rows"])},
        "tuning": {
            "epochs": 1,
            "labels": "predictions of the uncompressed model",
            "learning_rate": settings.training.learning_rate * TUNING_RATE,
        },
        "pruning": {
            "sparsity": share_of(settings.sparsity, settings.pattern),
            "pattern": settings.pattern,
            "epochs": PRUNING_EPOCHS,
            "labels": "predictions of the uncompressed model",
            "learning_rate": settings.training.learning_rate * PRUNING_RATE,
            "auc_tolerance": PRUNED_TOLERANCE,
        },
        "small_test": result.test_is_small,
        "auc_deviation": result.auc.deviation,
        "log_loss_deviation": result.log_loss_deviation,
        "boosted": {
            **asdict(result.boosted_quality),
            "lead": result.lead.value,
            "lead_deviation": result.lead.deviation,
            "rounds": result.boosted.rounds,
            "rows": result.boosted.rows,
            "columns": result.boosted.columns,
        },
        "chosen": result.chosen,
        "chosen_pruned": result.chosen_pruned,
        "variants": [_variant_json(result, name) for name in result.models],
        "without_tables": asdict(result.without_tables),
        "seconds": result.seconds,
        "machine": machine(),
    }


def _variant_json(result: JobResult, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "title": result.title(name),
        **asdict(result.quality[name]),
        "auc_change": result.change[name].value,
        "auc_change_deviation": result.change[name].deviation,
        "validation_auc": result.validation[name],
        **asdict(result.cost[name]),
        "grown": asdict(result.grown[name]) if result.grown else None,
    }


def machine() -> dict[str, str]:
    """The machine and the versions on which the numbers were measured."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return {
        "cpu": name,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "recsys_kernels": __version__,
        "backend": selection.chosen("embedding_bag_collection", "cpu"),
        "isa": native.isa() or "none",
    }


def _grown_cost(config: DLRMConfig, data: Dataset, settings: JobSettings, clock: _Clock) -> dict[str, Cost]:
    assert settings.rows is not None
    clock.stage(f"timing tables of {settings.rows:,} rows")
    seed = settings.training.seed
    pools = grown_batches(real_batches(data, seed), settings.rows, seed)
    sides = grown_models(config, settings.rows, pools[max(pools)], settings.sparsity, settings.pattern)
    return measure(sides, pools)


def _choose(change: dict[str, Estimate], cost: dict[str, Cost], tolerance: float, pruned: bool = False) -> str | None:
    """The smallest variant that surely loses no more than a tolerance.

    The choice goes by validation AUC: the test must not choose what it judges. If too few rows decide
    nothing, the variant is not chosen.
    """
    names = [variant.name for variant in VARIANTS if variant.pruned or not pruned]
    kept = [name for name in names if change[name].surely_above(-tolerance)]
    return min(kept, key=lambda name: cost[name].total_bytes, default=None)


class _Clock:
    """Seconds of each stage."""

    def __init__(self, on_stage: Callable[[str], None]) -> None:
        self._on_stage = on_stage
        self._seconds: dict[str, float] = {}
        self._stage = ""
        self._start = self._begin = time.perf_counter()

    def stage(self, name: str) -> None:
        self._close()
        self._stage = name
        self._on_stage(name)

    def finish(self) -> dict[str, float]:
        self._close()
        return {**self._seconds, "total": time.perf_counter() - self._begin}

    def _close(self) -> None:
        now = time.perf_counter()
        if self._stage:
            self._seconds[self._stage] = round(self._seconds.get(self._stage, 0.0) + now - self._start, 3)
        self._start = now
