"""``dyntune predict``: what a model predicts for images, such as the most probable classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dyntune.commands.clips import ViewsOption, with_views
from dyntune.commands.common import (
    BatchOption,
    DeviceOption,
    ImagesArgument,
    JsonOption,
    RateOption,
    TopPolicyOption,
    WeightsOption,
    apply_rate,
    pick_device,
    say_threads,
)
from dyntune.commands.console import err, print_json, print_table
from dyntune.commands.pictures import Pictures
from dyntune.core.errors import ExportError
from dyntune.data import build_transform, read_image
from dyntune.data.images import require_some
from dyntune.data.videos import Video
from dyntune.inference.export.folder import OpenedModel, is_exported, open_export
from dyntune.inference.export.registry import registered
from dyntune.model.load import load
from dyntune.model.tasks import Classification, Task
from dyntune.model.tuned import TunedModel
from dyntune.training.evaluate import in_views, over_views
from dyntune.training.interrupt import TrainingInterrupted
from dyntune.training.progress import CountBar

EXAMPLES = (
    "dyntune predict runs/flowers photo.jpg",
    'dyntune predict runs/flowers "photos/*.jpg" --top-k 3 --json',
    "dyntune predict flowers-onnx photo.jpg",
    "dyntune predict runs/clips film.mp4 --views 3x1",
)
_CODE = " or ".join(Path(runtime.file).suffix for runtime in registered().values() if runtime.needs_trust)
"""Files that may run code when they are opened."""


def command(
    run: Annotated[Path, typer.Argument(help="Folder that train, save() or export wrote.")],
    images: ImagesArgument,
    top_k: Annotated[int, typer.Option(min=1, help="Classes to show per image.")] = 5,
    policy: TopPolicyOption = None,
    rate: RateOption = None,
    weights: WeightsOption = None,
    views: ViewsOption = None,
    batch_size: BatchOption = 32,
    device: DeviceOption = "auto",
    trust: Annotated[
        bool,
        typer.Option(
            "--trust",
            help=f"You trust who made the folder: open an exported {_CODE} file, which may run code, or read a run's "
            "backbone from where it says.",
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """The most probable classes of images or videos, folders of them, or globs, from a run or an exported model."""
    require_some(images)
    model = _model(run, weights=weights, device=device, policy=policy, rate=rate, trust=trust)
    preprocessing = with_views(model.preprocessing, views)
    if isinstance(model, TunedModel):
        model.preprocessing = preprocessing
    elif views is not None:
        model = replace(model, preprocessing=preprocessing)
    pictures = Pictures(images, videos=preprocessing.clip is not None)
    if isinstance(model, TunedModel):
        say_threads(model, len(pictures.paths))
    batches = pictures.batches(batch_size, _prepare(model))
    noun = noun_of(model)
    predictions: list[dict[str, Any]] = []
    stopped: TrainingInterrupted | None = None
    try:
        with CountBar("predicting", len(pictures.paths), f"{noun}s", err) as bar:
            for batch in batches:
                predictions += _predicted(model, batch, top_k, batch_size)
                bar.count(len(predictions))
    except TrainingInterrupted as error:
        stopped = error  # what is done is shown first
    if json:
        failed = [{noun: name, "error": error} for name, error in pictures.failed.items()]
        print_json({"predictions": predictions, "failed": failed})
    elif predictions:
        cells = [{noun: row[noun], **task_of(model).cells(row)} for row in predictions]
        print_table(f"{model.spec} from {run}", tuple(cells[0]), [tuple(row.values()) for row in cells])
    if stopped is not None:
        raise stopped
    pictures.finish()


def _model(
    run: Path, *, policy: str | None, rate: float | None, weights: Path | None, device: str, trust: bool
) -> TunedModel | OpenedModel:
    """What is in the folder: a run, or a model that ``dyntune export`` wrote."""
    if not is_exported(run):
        model = load(run, policy=policy, weights=weights, device=pick_device(device), trust=trust)
        apply_rate(model, rate, policy)
        return model
    if policy is not None or rate is not None or weights is not None:
        raise ExportError(
            f"{run} is an exported model, whose weights, rate and token policy are fixed. Give --rate, --policy or "
            "--weights to dyntune export, or give the run."
        )
    if device not in ("auto", "cpu"):
        raise ExportError(
            f"{run} is an exported model, which runs on the CPU; given --device {device}. Leave it out, or give the "
            "run."
        )
    return open_export(run, trust=trust)


def predict(model: TunedModel | OpenedModel, paths: Sequence[Path], top_k: int) -> list[dict[str, Any]]:
    """For each image or video its path and what the model's task makes of its outputs, such as ``top_k`` classes."""
    prepare, clip = _prepare(model), model.preprocessing.clip
    read = [(path, prepare(read_image(path) if clip is None else Video(path))) for path in paths]
    return _predicted(model, read, top_k, len(read))


def _prepare(model: TunedModel | OpenedModel) -> Callable[[Any], torch.Tensor]:
    """From an image to what the model takes, from a video to all of its views."""
    return build_transform(model.preprocessing, every_view=True)


@torch.inference_mode()
def _predicted(
    model: TunedModel | OpenedModel, prepared: Sequence[tuple[Path, torch.Tensor]], top_k: int, batch_size: int
) -> list[dict[str, Any]]:
    clip, task = model.preprocessing.clip, task_of(model)
    batch, views = in_views(torch.stack([tensor for _, tensor in prepared]), clip)
    device = torch.device("cpu") if isinstance(model, OpenedModel) else next(model.parameters()).device
    outputs = torch.cat([model(piece.to(device)) for piece in batch.split(batch_size)])
    predictions = task.predictions(over_views(outputs, views, task, clip), model.classes, top_k)
    noun = noun_of(model)
    return [{noun: str(path), **prediction} for (path, _), prediction in zip(prepared, predictions, strict=True)]


def noun_of(model: TunedModel | OpenedModel) -> str:
    """What one of those that a model predicts for is called, in tables and as the key of its path."""
    return "image" if model.preprocessing.clip is None else "video"


def task_of(model: TunedModel | OpenedModel) -> Task:
    """The task of a model; of exported ones, classification alone is known by name.

    Raises:
        ExportError: the model was exported for another task.
    """
    if isinstance(model, TunedModel):
        return model.task
    name = model.config.get("task", Classification.name)
    if name != Classification.name:
        raise ExportError(
            f"the model was exported for {name}; predict reads classifiers. Use dyntune.open_export in Python."
        )
    return Classification()
