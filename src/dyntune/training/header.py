"""What a training begins with, for people: backbone, data, methods and their cost, device, and what to mind first."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from dyntune.core.errors import DataError
from dyntune.core.shapes import shapes_only
from dyntune.core.texts import listed, printable
from dyntune.core.words import counted, millions, several
from dyntune.data.base import LabelledImages
from dyntune.data.others import Samples, accepted
from dyntune.model.cost import cost
from dyntune.model.tune import build_tuned
from dyntune.model.tuned import TunedModel
from dyntune.parts.spec import Part
from dyntune.training.accelerator import launched_processes, pick_device
from dyntune.training.settings import TrainSettings

LARGER_MODEL = "vit_base_patch16_224.orig_in21k"
"""What is advised for photographs, with weights that timm's hub has."""
_SMALL, _TIMES = 64, 3
"""Pixels of an input that is small, and by how much photographs are larger than it before something is said."""
_LOOKED_AT = 8
"""Images whose size is looked at: those of one data set are mostly alike."""
_SHOWN = 8


@dataclass(frozen=True)
class Header:
    """What is said before the first step.

    Args:
        rows: what a line is about, and what it says.
        warnings: what to mind, a sentence or two each.
    """

    rows: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows)
        lines = [f"{name:<{width}}  {text}" for name, text in self.rows]
        return "\n".join(map(printable, [*lines, *(f"warning: {text}" for text in self.warnings)]))


def training_header(
    models: TunedModel | Sequence[TunedModel],
    train: Dataset[Any],
    val: Dataset[Any] | None,
    settings: TrainSettings,
    *,
    test: Dataset[Any] | None = None,
    name: str = "",
    threads: str | None = None,
    course: str | None = None,
) -> Header:
    """What is said before models are trained on one data set.

    Args:
        models: what is trained, one after another, all on the same backbone; shapes alone are enough.
        train: as for ``fit``.
        val: what the epoch is chosen on.
        settings: of each training.
        test: what is evaluated on in the end, where that is known.
        name: of the data set.
        threads: how many are taken on a CPU, and why; those of torch if not given.
        course: how long the training goes, where it is not one of ``settings`` alone.
    """
    models = [models] if isinstance(models, TunedModel) else models
    sets = {"training": train, "validation": val, "test": test}
    known = {kind: accepted(data, f"the {kind} set") for kind, data in sets.items() if data is not None}
    noun = known["training"].noun
    counts = [f"{len(data):,} {kind}" for kind, data in known.items()]
    images = _joined(counts) + f" {noun if [len(data) for data in known.values()] == [1] else several(noun)}"
    classes = f"{counted(models[0].backbone.classes, 'class')}, " if models[0].backbone.classes else ""
    return Header(
        (
            backbone_row(models[0]),
            ("data", f"{name}: {classes}{images}" if name else f"{classes}{images}"),
            *method_rows(models),
            device_row(settings, threads),
            ("training", course or _course(len(train), settings, noun)),  # type: ignore[arg-type]
        ),
        tuple(_to_mind(models[0], known["training"], known.get("validation"))),
    )


def outlines(
    name: str,
    specs: Sequence[Sequence[str | Part]],
    *,
    classes: Sequence[str],
    weights: str | Path | None = None,
    **arguments: Any,
) -> list[TunedModel]:
    """Models as shapes alone, for a header, and to know what cannot be built before anything is trained.

    Args:
        name: as for ``build_tuned``, and so are the others.
        specs: the parts of each model.
    """
    models = []
    for parts in specs:
        with shapes_only():
            model = build_tuned(name, *parts, classes=classes, weights=weights, pretrained=False, **arguments)
        model.origin = replace(model.origin.with_weights(weights), published=weights is None)
        models.append(model)
    return models


def backbone_row(model: TunedModel) -> tuple[str, str]:
    """The backbone, where its weights come from, the size of its images and its tokens."""
    *frames, _, height, width = model.preprocessing.shape
    size = f"{counted(frames[0], 'frame')} of " if frames else ""
    tokens = counted(cost(model).blocks[0].attention_tokens, "token")
    name = model.backbone_name or type(model.backbone.host).__name__
    return "backbone", f"{name}, {model.origin.weights_in_words}; {size}{height} x {width} pixels, {tokens}"


def method_rows(models: Sequence[TunedModel]) -> list[tuple[str, str]]:
    """What each model trains beside its head, and computes beside its untouched backbone."""
    rows = []
    for model in models:
        figures = cost(model)
        share = figures.trainable_params / (figures.total_params - figures.head_params)
        trained = f"{counted(figures.trainable_params, 'trained parameter')} without head ({share:.2%} of all)"
        macs = f"{millions(figures.macs)} MACs ({figures.macs / figures.dense_macs:.1%} of dense)"
        rows.append(("method", f"{model.spec}: {trained}, {macs}"))
    return rows


def device_row(settings: TrainSettings, threads: str | None = None) -> tuple[str, str]:
    """What is trained on, in how many processes and, on a CPU, threads."""
    device = pick_device(settings.device)
    if device.type == "cpu":
        words = f"cpu, {threads or counted(torch.get_num_threads(), 'thread')}"
    else:
        words = f"{device.type}, {torch.cuda.get_device_name()}" if device.type == "cuda" else device.type
    world = launched_processes()
    return "device", words if world == 1 else f"{words}, {counted(world, 'process')}"


def _course(images: int, settings: TrainSettings, noun: str) -> str:
    """How long a training on so many images goes."""
    step = settings.batch_size * launched_processes()
    steps = images // step if settings.drop_last else math.ceil(images / step)
    epochs, each = counted(settings.epochs, "epoch"), counted(min(step, images), noun)
    return f"{epochs} of {counted(steps, 'step')} of {each}, seed {settings.seed}"


def _to_mind(model: TunedModel, train: LabelledImages | Samples, val: LabelledImages | Samples | None) -> Iterator[str]:
    yield from too_small(model, train)
    if not isinstance(train, LabelledImages) or not model.backbone.classes:
        return
    seen = Counter(train.targets)
    noun, every = train.noun, range(model.backbone.classes)
    without, alone = ([label for label in every if seen[label] == count] for count in (0, 1))
    if without:
        yield f"{_classes(model, without)} no training {noun}, so that nothing of it is learned."
    if alone:
        yield f"{_classes(model, alone)} a single training {noun}. Add some; one says little about others."
    if isinstance(val, LabelledImages):
        judged = Counter(val.targets)
        unjudged = [label for label in every if seen[label] and not judged[label]]
        if unjudged:
            yield (
                f"{_classes(model, unjudged)} no validation {noun}: the epoch that is kept is chosen without it. Move "
                f"some of its training {several(noun)} there."
            )


def too_small(model: TunedModel, train: LabelledImages | Samples) -> Iterator[str]:
    """What is said where a small backbone is given photographs, of which it sees a few pixels."""
    height, width = model.preprocessing.size
    if max(height, width) > _SMALL or model.preprocessing.clip is not None:
        return
    sizes = list(_sizes(train))
    if not sizes:
        return
    rows, columns = (round(median(size[axis] for size in sizes)) for axis in (1, 0))
    if min(rows, columns) >= _TIMES * max(height, width):
        name = model.backbone_name or "the backbone"
        yield (
            f"the images have about {rows} x {columns} pixels, and {name} sees them at {height} x {width}, at which "
            "most of what tells photographs apart is gone. Take a model that was pretrained at 224 x 224: --model "
            f"{LARGER_MODEL} (in Python timm.create_model({LARGER_MODEL!r}, pretrained=True, num_classes=...))."
        )


def _sizes(data: LabelledImages | Samples) -> Iterator[tuple[int, int]]:
    """Width and height of some images, as far as they are pictures and can be read."""
    if data.videos or (isinstance(data, Samples) and not data.pictures):
        return
    count = len(data)
    for index in sorted({count * number // _LOOKED_AT for number in range(min(count, _LOOKED_AT))}):
        try:
            picture = data.read(index) if isinstance(data, LabelledImages) else data.pair(index)[0]
        except DataError:  # the training says it, and where
            continue
        if isinstance(picture, Image.Image):  # tensors among pictures have been prepared
            yield picture.size


def _classes(model: TunedModel, labels: Sequence[int]) -> str:
    """Which classes have something, with the verb."""
    names = model.classes or tuple(map(str, range(model.backbone.classes)))
    many, shown = counted(len(labels), "class"), listed([names[label] for label in labels], _SHOWN)
    return f"{many} ({shown}) {'has' if len(labels) == 1 else 'have'}"


def _joined(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
