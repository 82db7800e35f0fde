"""Several methods on one data set: trained alike, evaluated on the test split, and timed in turns."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from dyntune.backbones.hosts import rebuild, wrap
from dyntune.core.errors import DataError
from dyntune.core.timing import Throughput, measure_throughput
from dyntune.core.words import counted
from dyntune.data.base import DataSplits, LabelledImages
from dyntune.model.cost import cost
from dyntune.model.tune import build_tuned
from dyntune.model.tuned import TunedModel
from dyntune.parts.policies.base import TokenPolicy, learners
from dyntune.parts.registry import expand, resolve
from dyntune.parts.spec_list import folder_name
from dyntune.training.evaluate import Evaluation, evaluate
from dyntune.training.inputs import spread_batch
from dyntune.training.progress import EvaluationBar, Progress
from dyntune.training.settings import TrainSettings
from dyntune.training.trainer import fit

log = logging.getLogger("dyntune")
DENSE = "dense backbone"
"""Name of the untouched backbone, the reference of every speed."""
SPEED_BATCH = 64
"""Images in the batch that speeds are measured on."""
_SECONDS = 15.0
"""Of each model after which no further round begins: on a CPU a batch of a large model takes as long by itself."""


@dataclass(frozen=True)
class Row:
    """What one method came to.

    Args:
        method: its spec string.
        test: evaluation on the test split; MACs as executed there.
        trainable_params: trained parameters without the head.
        adapter_bytes: size of the saved tensors, head included.
        dense_macs: MACs per image of the untouched backbone; of a video, of all of its views.
        speed: images per second, and speed-up over the untouched backbone in the same runs; None if it was not timed.
        train_seconds: time that training took.
        per: what MACs are of, ``image`` or ``video``.
    """

    method: str
    test: Evaluation
    trainable_params: int
    adapter_bytes: int
    dense_macs: int
    speed: Throughput | None
    train_seconds: float
    per: str = "image"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"test": self.test.to_dict()}


def compare(
    specs: Sequence[str],
    data: DataSplits,
    out: Path,
    *,
    model: str,
    weights: Path | None = None,
    settings: TrainSettings,
    resume: bool = False,
    progress: Callable[[str], Progress] | None = None,
    teacher: nn.Module | None = None,
    timed: bool = True,
) -> tuple[list[Row], dict[str, TunedModel]]:
    """Trains each method with the same settings and seed, evaluates it, and times all of them in turns.

    Args:
        specs: one method each; ``+`` joins several parts.
        data: train, validation and test images.
        out: each run gets a folder in it.
        model: timm name of the backbone.
        weights: local weight file of the backbone.
        settings: of every run.
        resume: continue runs that ``out`` holds.
        progress: makes the display of a run from its spec.
        teacher: as for ``fit``, of the runs that learn from one.
        timed: whether speeds are measured.

    Returns:
        A row per method, and the trained models by spec.

    Raises:
        DataError: the data set has no test split.
    """
    if data.test is None:
        raise DataError(f"{data.name} has no test split, which a comparison reports on.")
    if teacher is not None and not any(learners(_policies(spec)) for spec in specs):
        log.warning("the teacher is not used: no method has a token policy that learns from one (dynamicvit).")
    models: dict[str, TunedModel] = {}
    seconds: dict[str, float] = {}
    for spec in specs:
        torch.manual_seed(settings.seed)  # the same new head for every method
        models[spec] = build_tuned(model, spec, classes=data.classes, weights=weights)
        result = fit(
            models[spec],
            data.train,
            data.val,
            out=out / folder_name(spec),
            resume=resume,
            settings=settings,
            progress=progress(spec) if progress else False,
            calibrate=False,
            teacher=teacher if learners(models[spec].policies) else None,
        )
        seconds[spec] = result.seconds
    evaluations = {
        spec: _evaluated(m, data.test, settings.batch_size, shown=progress is not None) for spec, m in models.items()
    }
    speeds: dict[str, Throughput] = {}
    if timed:
        batch = spread_batch(data.test, next(iter(models.values())), SPEED_BATCH)
        words = f"timing {counted(len(models), 'model')} in turns with the dense backbone"
        with Console(stderr=True).status(words) if progress is not None else contextlib.nullcontext():
            speeds = compare_speed(models, batch)
    rows = [
        Row(
            method=spec,
            test=evaluations[spec],
            trainable_params=(figures := cost(models[spec])).trainable_params,
            adapter_bytes=figures.adapter_bytes,
            dense_macs=figures.dense_macs * (1 if (clip := models[spec].preprocessing.clip) is None else clip.views),
            speed=speeds.get(spec),
            train_seconds=seconds[spec],
            per=data.test.noun,
        )
        for spec in specs
    ]
    return rows, models


def _policies(spec: str) -> list[TokenPolicy]:
    return [part for part in expand(resolve([spec])) if isinstance(part, TokenPolicy)]


def _evaluated(model: TunedModel, images: LabelledImages, batch_size: int, *, shown: bool) -> Evaluation:
    if not shown:
        return evaluate(model, images, batch_size=batch_size)
    with EvaluationBar(len(images), model.task.merit, Console(stderr=True), images.noun) as bar:
        return evaluate(model, images, batch_size=batch_size, watch=bar)


def compare_speed(models: dict[str, TunedModel], images: Tensor) -> dict[str, Throughput]:
    """Images per second of tuned models and of the untouched backbone, ``DENSE``, in turns on one batch.

    Of 15 rounds, or as many as there is time for: at least three.
    """
    first = next(iter(models.values()))
    like = next(first.parameters())
    plain = (
        rebuild(first.origin, pretrained=False) if first.backbone_name else copy.deepcopy(first.backbone.plain().host)
    )
    dense = wrap(plain.to(like)).eval()
    contestants: dict[str, Callable[[Tensor], Any]] = {DENSE: dense.host_logits}  # some hosts ask for more than images
    contestants |= {spec: model.eval() for spec, model in models.items()}
    with torch.inference_mode():
        return measure_throughput(contestants, images.to(like), reference=DENSE, limit=_SECONDS)
