"""What the commands share: their options, building a model from them, and what they say of data and runs."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from dyntune.backbones.builtin import BUILTIN_BACKBONE
from dyntune.commands.console import err, print_next, space
from dyntune.commands.options import option
from dyntune.core.errors import DataError, SpecError
from dyntune.core.texts import listed, printable
from dyntune.core.threads import chosen_by_user, take_threads
from dyntune.core.words import counted, several
from dyntune.data.base import DataSplits, LabelledImages
from dyntune.data.load import forms
from dyntune.data.sources.base import Held
from dyntune.model.load import load
from dyntune.model.trial import settle_threads_for
from dyntune.model.tuned import TunedModel
from dyntune.studies.vtab.recipes import Recipe
from dyntune.training.accelerator import launched_processes, pick_device
from dyntune.training.header import Header
from dyntune.training.identity import began_with
from dyntune.training.inputs import Interpolation, Normalisation
from dyntune.training.settings import TrainSettings

DataArgument = Annotated[str, typer.Argument(help=f"{forms()}.")]
RunArgument = Annotated[Path, typer.Argument(help="Folder that train or save() wrote.")]
ImagesArgument = Annotated[list[str], typer.Argument(help="Image or video files, folders or globs.")]
ModelOption = Annotated[
    str,
    typer.Option(
        help="timm name of the backbone; for transformers, hf:FOLDER or hf:REPOSITORY; for clips, frames:NAME or "
        "videomae:FOLDER."
    ),
]
WeightsOption = Annotated[
    Path | None,
    typer.Option(help="Local weight file (.npz, .pth, .safetensors) of the backbone, or a folder for hf: models."),
]
MethodOption = Annotated[
    str, typer.Option(help="Tuning method, name or name:key=value,key=value; dyntune methods lists them.")
]
PolicyOption = Annotated[str | None, typer.Option("--policy", help="Token policy on top, written like a method.")]
TopPolicyOption = Annotated[
    str | None,
    typer.Option("--policy", help="Token policy without parameters to put on the run, such as tome:r=8."),
]
RateOption = Annotated[
    float | None,
    typer.Option(
        "--rate", min=0, max=1, help="Share of patches to compute, instead of what the run was trained towards."
    ),
]
TeacherOption = Annotated[
    Path | None,
    typer.Option(help="Run of a dense model on the same data, for policies that learn from one (dynamicvit)."),
]
DropPathOption = Annotated[float, option(Recipe, "drop_path")]
NormalisationOption = Annotated[Normalisation, option(Recipe, "normalisation")]
InterpolationOption = Annotated[Interpolation, option(Recipe, "interpolation")]
ValFractionOption = Annotated[
    float, typer.Option(help="Split off the training images where there is no validation split.")
]
OnCorruptOption = Annotated[Literal["error", "skip"], typer.Option(help="What to do with images that cannot be read.")]
TrainedValFractionOption = Annotated[
    float, typer.Option(help="As given to train, where val is split off the training images.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Images per forward pass.")]
SpeedOption = Annotated[bool, typer.Option(help="Also time it beside the dense backbone, in turns.")]
WorkersOption = Annotated[int, typer.Option(min=0, help="Processes that read images.")]
DEFAULT_MODEL = BUILTIN_BACKBONE
VAL_FRACTION = 0.2

_MOST_CLASSES = 40
_MANY = 64
"""Images from which on a trial of threads pays."""
_RATE_MISSED = 0.02
"""Share of the patches by which a rate may be missed before it is said."""


def parts(method: str, policy: str | None) -> list[str]:
    """The parts that ``--method`` and ``--policy`` give, in the order in which they are installed."""
    return [method] if policy is None else [method, policy]


def train_settings(*, lr: float, min_lr: float = TrainSettings.min_lr, **others: Any) -> TrainSettings:
    """The settings that options give; a peak learning rate below the cosine's end lowers that end with it."""
    return TrainSettings(lr=lr, min_lr=min(min_lr, lr), **others)


def calibration_images(data: DataSplits) -> LabelledImages:
    """The images that gates are calibrated on: validation images, or training images where there are none."""
    return data.train if data.val is None else data.val


def choose_threads(build: Callable[[], TunedModel], settings: TrainSettings, folder: Path) -> str | None:
    """Takes the number of threads that training on a CPU is quickest with.

    A run that goes on takes as many as it began with, because sums of numbers depend on it in their last bits.

    Args:
        build: gives a model like the one that is trained, to be tried on some images.
        settings: of the training.
        folder: of the run, or of several.

    Returns:
        What was taken, for people; None where nothing was to be chosen.
    """
    if chosen_by_user() or launched_processes() > 1 or pick_device(settings.device).type != "cpu":
        return None
    before = next(filter(None, map(began_with, (folder, *sorted(folder.glob("*/"))))), None)
    if before is None:
        model = build()
        training = model.training
        said = settle_threads_for(model.eval(), settings.batch_size)
        model.train(training)
    else:
        take_threads(before)
        said = f"{counted(before, 'thread')}, as the run began with"
    return said


def say_threads(model: TunedModel, images: int) -> None:
    """Takes the number of threads that a model on the CPU is quickest with, and says so.

    Args:
        model: that is to run.
        images: how many it will be given; before a trial of a second is over, few are done.
    """
    if images < _MANY or chosen_by_user():
        return
    said = settle_threads_for(model)
    if said is not None:
        err.print(f"threads: {said}", highlight=False, soft_wrap=True)


def show_header(header: Header) -> None:
    """Says on standard error what a training begins with."""
    if os.environ.get("RANK", "0") == "0":  # another process of the same run says it
        err.print(str(header), highlight=False, soft_wrap=True)
        space()


def apply_rate(model: TunedModel, rate: float | None, policy: str | None) -> None:
    """Sets the rate that ``--rate`` gives; raises SpecError beside a policy that it is not calibrated for."""
    if rate is not None and policy is not None and 0 < rate < 1:
        raise SpecError(
            f"--rate {rate:g} beside --policy {policy}: the gates were calibrated without that policy, which shows "
            "them other tokens. Give one of the two, or calibrate in Python: model.set_rate(rate, images)."
        )
    model.set_rate(rate)


def say_missed_rate(activation: float, target: float, on: str) -> None:
    """Says on standard error where the gates let clearly more or fewer patches through than they were meant to.

    Args:
        activation: share of the patches that were computed.
        target: share that was aimed at.
        on: the images, in words.
    """
    if abs(activation - target) > _RATE_MISSED:
        err.print(
            f"the gates computed {activation:.1%} of the patches of the {on}, aimed at {target:.1%}. A calibrated run "
            f"comes closer with --rate {target:g}; or train longer.",
            highlight=False,
            soft_wrap=True,
        )


def report_skipped(data: DataSplits | LabelledImages) -> None:
    """Says on standard error how many images were left out because they cannot be read."""
    if data.skipped:
        first = printable(data.skipped[0])
        noun = data.train.noun if isinstance(data, DataSplits) else data.noun
        unread = counted(len(data.skipped), noun)
        err.print(f"left out {unread} that cannot be read, the first is {first}", soft_wrap=True)


def report_classes(data: DataSplits) -> None:
    """Shows on standard error how many images there are of each class in each split."""
    if os.environ.get("RANK", "0") != "0":
        return  # another process of the same run says it
    counts = [
        (name, Counter(split.targets))
        for name, split in (("train", data.train), ("val", data.val), ("test", data.test))
        if split is not None
    ]
    title = printable(f"{data.name}: {counted(len(data.classes), 'class')}")
    err.print(title, style="italic", highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("class", overflow="fold")
    for name, _ in counts:
        table.add_column(name, justify="right")
    for label, class_name in enumerate(data.classes[:_MOST_CLASSES]):
        table.add_row(printable(class_name), *(str(count[label]) for _, count in counts))
    further = range(_MOST_CLASSES, len(data.classes))
    if further:
        ranges = ((min(count[i] for i in further), max(count[i] for i in further)) for _, count in counts)
        cells = (f"{low}" if low == high else f"{low} to {high}" for low, high in ranges)
        table.add_row(f"{len(further)} more, each", *cells)
    table.add_section()
    table.add_row(several(data.train.noun), *(str(count.total()) for _, count in counts))
    err.print(table)
    space()


def require_classes(model: TunedModel, data: DataSplits | Held) -> None:
    """Raises DataError when a data set's classes are not those that the model was trained on."""
    if not model.classes and model.backbone.classes and len(data.classes) > model.backbone.classes:
        raise DataError(
            f"{data.name} has {counted(len(data.classes), 'class')} ({listed(data.classes)}), but the model tells "
            f"{model.backbone.classes} apart. Give data with the same classes."
        )
    if model.classes and tuple(model.classes) != tuple(data.classes):
        raise DataError(
            f"{data.name} has {counted(len(data.classes), 'class')} ({listed(data.classes)}), but the model was "
            f"trained on {len(model.classes)} ({listed(model.classes)}). Give data with the same classes."
        )


def load_teacher(run: Path | None, data: DataSplits) -> TunedModel | None:
    """The model that ``--teacher`` names; raises DataError when its classes are not those of the data."""
    if run is None:
        return None
    teacher = load(run)
    if teacher.classes and tuple(teacher.classes) != tuple(data.classes):
        raise DataError(
            f"the teacher in {run} was trained on {counted(len(teacher.classes), 'class')} "
            f"({listed(teacher.classes)}), but {data.name} has {len(data.classes)} ({listed(data.classes)}). Give a "
            "teacher trained on the same data."
        )
    return teacher


def print_next_eval(run: Path, data: DataSplits, val_fraction: float, on_corrupt: str) -> None:
    """How to evaluate a run that has been trained: on the test images where there are any, else on those there are."""
    words = ["dyntune", "eval", str(run), data.name]
    if data.test is None:
        words += ["--split", "train" if data.val is None else "val"]
        if val_fraction != VAL_FRACTION:
            words += ["--val-fraction", f"{val_fraction:g}"]
    if on_corrupt != "error":
        words += ["--on-corrupt", on_corrupt]
    print_next(shlex.join(words))
