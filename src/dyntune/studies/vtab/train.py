"""One training of a benchmark, from its data to its result."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dyntune.core.errors import TrainingError
from dyntune.data.base import DataSplits, LabelledImages
from dyntune.data.transforms import Preprocessing
from dyntune.model.cost import cost
from dyntune.model.tune import build_tuned
from dyntune.model.tuned import TunedModel
from dyntune.parts.methods.full import Full
from dyntune.parts.methods.noah import Noah
from dyntune.parts.registry import expand, resolve
from dyntune.parts.spec import Part, format_spec
from dyntune.studies.noah import train_noah
from dyntune.studies.vtab.folders import ResizedImages, TrainList, load_task
from dyntune.studies.vtab.plan import Job, Plan, unsearched
from dyntune.studies.vtab.recipes import Recipe
from dyntune.studies.vtab.results import JobResult, read_search
from dyntune.studies.vtab.tasks import Task
from dyntune.training.evaluate import evaluate
from dyntune.training.inputs import with_pixels_as
from dyntune.training.progress import Progress, Silent
from dyntune.training.settings import TrainSettings
from dyntune.training.state import STATE
from dyntune.training.trainer import FitResult, fit

Report = Callable[[float], None]
"""Told the share of a job that is done."""


class EpochReport(Silent):
    """Passes a run's epochs on as the share of a job that is done.

    Args:
        report: is told the share.
        begin: share that was done before this run.
        end: share that will be done after it.
    """

    def __init__(self, report: Report, begin: float = 0.0, end: float = 1.0) -> None:
        self.report, self.begin, self.end = report, begin, end

    def epoch(self, epoch: int, epochs: int, steps: int, first: int) -> None:
        self.report(self.begin + (self.end - self.begin) * epoch / epochs)


def train_one(
    spec: str, data: DataSplits, plan: Plan, settings: TrainSettings, out: Path | None, progress: Progress
) -> tuple[TunedModel, FitResult]:
    """Trains one method on one task, or continues what ``out`` holds.

    Args:
        spec: the method.
        data: train images, and those that ``settings.select`` picks the epoch on.
        plan: names backbone, weights and preprocessing.
        settings: of the run; the seed decides the new head too.
        out: folder of the run; None keeps nothing on disk.
        progress: shows what goes on.
    """
    torch.manual_seed(settings.seed)
    model = _build([spec], data, plan)
    train = _kept(data.train, model.preprocessing, settings)
    chosen = {"val": data.val, "test": data.test, "last": None}[settings.select]
    if train is not data.train and settings.select != "test":
        # What other processes keep in memory ends with them, after each epoch.
        settings = replace(settings, workers=0)
    result = fit(
        model,
        train,
        chosen,
        out=out,
        resume=out is not None,
        progress=progress,
        calibrate=False,
        settings=settings,
    )
    return model, result


def _kept(images: LabelledImages, preprocessing: Preprocessing, settings: TrainSettings) -> LabelledImages:
    """Training images that are decoded and resized once, where that is all that is done to them."""
    return ResizedImages(images, preprocessing) if settings.augment == "none" else images


def _build(parts: Sequence[str | Part], data: DataSplits, plan: Plan) -> TunedModel:
    recipe = plan.recipe
    arguments = {"drop_path_rate": recipe.drop_path, **plan.backbone_arguments}
    model = build_tuned(plan.model, *parts, classes=data.classes, weights=plan.weights, **arguments)
    model.preprocessing = with_pixels_as(model.preprocessing, recipe.normalisation, recipe.interpolation)
    return model


def _train_noah(
    spec: str, part: Noah, task: Task, plan: Plan, settings: TrainSettings, out: Path, report: Report
) -> tuple[TunedModel, FitResult]:
    """Supernet on ``train800``, search on ``val200``, and the last training on both."""
    recipe, folder = plan.recipe, plan.folders[task.folder]
    halves, both = load_task(task, folder, "train800"), load_task(task, folder, "train800val200")
    assert halves.val is not None  # train800 has val200 beside it
    preprocessing = _build([spec], both, plan).preprocessing
    epochs, lr = recipe.supernet
    shares = {"noah supernet": (0.0, 0.7), "noah": (0.8, 1.0)}
    result = train_noah(
        part,
        lambda sized: _build([sized if other == part else other for other in resolve([spec])], both, plan),
        _kept(halves.train, preprocessing, settings),
        halves.val,
        _kept(both.train, preprocessing, settings),
        out,
        replace(settings, select="last"),
        supernet_epochs=max(1, round(settings.epochs * epochs)),
        supernet_lr=settings.lr * lr,
        search=recipe.noah,
        progress=lambda title: EpochReport(report, *shares[title]),
    )
    return result.model, replace(result.fit, seconds=result.seconds)


def train_job(job: Job, plan: Plan, report: Report) -> JobResult:
    """Trains on all 1,000 images (on ``train800`` where ``val200`` picks the epoch) and evaluates on the test split.

    Raises:
        TrainingError: the search that it builds on has not finished, or training cannot go on.
        TrainingInterrupted: the state is saved.
    """
    assert job.seed is not None
    began = time.perf_counter()
    spec, settings = job.spec, replace(base_settings(job.spec, plan.recipe), seed=job.seed)
    if plan.search:
        found = read_search(job, plan.out)
        if found is None:
            raise TrainingError(f"the search of {job.spec} on {job.task} has not finished, so its result is missing.")
        spec, settings = with_scale(spec, found.scale), with_lr(settings, found.lr)
    task = plan.task(job.task)
    train: TrainList = "train800" if settings.select == "val" else "train800val200"
    data = load_task(task, plan.folders[task.folder], train)
    assert data.test is not None  # every task has one
    run = job.folder(plan.out) / "run"
    before = time.perf_counter()
    if part := unsearched(spec):
        model, fitted = _train_noah(spec, part, task, plan, settings, run, report)
    else:
        model, fitted = train_one(spec, data, plan, settings, run, EpochReport(report))
    training = time.perf_counter() - before
    trainable_params = cost(model).trainable_params
    if model.folds:
        model.merge()  # what would be served, and what published tables count
    evaluation = evaluate(model, data.test, batch_size=settings.batch_size, workers=settings.workers)
    assert evaluation.macs is not None
    return JobResult(
        spec=job.spec,
        task=job.task,
        seed=job.seed,
        accuracy=evaluation.accuracy,
        activation=evaluation.activation,
        macs=evaluation.macs,
        trainable_params=trainable_params,
        trained_spec=model.spec,
        lr=settings.lr,
        epoch=fitted.best_epoch,
        train_seconds=fitted.seconds,
        seconds=fitted.seconds + time.perf_counter() - began - training,
        activation_per_unit=evaluation.activation_per_unit,
    )


def forget_state(job: Job, plan: Plan) -> None:
    """Removes what a job could go on from, once its result is there: with full tuning these are gigabytes."""
    run = job.folder(plan.out) / "run"
    (run / STATE).unlink(missing_ok=True)
    shutil.rmtree(run / "last", ignore_errors=True)


def base_settings(spec: str, recipe: Recipe) -> TrainSettings:
    """What a method is trained with unless a search finds better; where every weight is trained, the rate is lower."""
    settings = recipe.settings
    if any(isinstance(part, Full) for part in expand(resolve([spec]))):
        return with_lr(settings, settings.lr * recipe.full_lr)
    return settings


def own_scale(spec: str) -> float | None:
    """The adapter scale that a search can change; None unless exactly one part has one as a number."""
    scales = [scale for part in resolve([spec]) if (scale := _scale(part)) is not None]
    return scales[0] if len(scales) == 1 else None


def with_scale(spec: str, scale: float | None) -> str:
    """The spec with another adapter scale in every part that has one as a number; None leaves it."""
    if scale is None:
        return spec
    parts = [replace(part, **({"scale": scale} if _scale(part) is not None else {})) for part in resolve([spec])]
    return "+".join(map(format_spec, parts))


def _scale(part: Part) -> float | None:
    """The adapter scale of a part, or of what a preset stands for, where it is a number, neither learnt nor absent."""
    scales = [getattr(inner, "scale", None) for inner in expand([part])]
    return next((scale for scale in scales if isinstance(scale, float)), None)


def with_lr(settings: TrainSettings, lr: float) -> TrainSettings:
    """The settings with another peak learning rate; where the schedule begins and ends is not above it."""
    return replace(settings, lr=lr, min_lr=min(settings.min_lr, lr), warmup_lr=min(settings.warmup_lr, lr))
