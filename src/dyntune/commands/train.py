"""``dyntune train``: adapt a pretrained ViT to labelled images."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dyntune.commands.clips import ClipOptions
from dyntune.commands.common import (
    DEFAULT_MODEL,
    VAL_FRACTION,
    DataArgument,
    DropPathOption,
    InterpolationOption,
    JsonOption,
    MethodOption,
    ModelOption,
    NormalisationOption,
    OnCorruptOption,
    PolicyOption,
    TeacherOption,
    ValFractionOption,
    WeightsOption,
    calibration_images,
    choose_threads,
    load_teacher,
    parts,
    print_next_eval,
    report_classes,
    report_skipped,
    say_missed_rate,
    show_header,
    train_settings,
)
from dyntune.commands.console import out, print_json, space
from dyntune.commands.options import Options, with_options
from dyntune.core.errors import DataError, SpecError
from dyntune.core.words import counted, kilobytes, several
from dyntune.data import load_data
from dyntune.model.adapter_folder import read_config
from dyntune.model.cost import cost
from dyntune.model.tune import build_tuned
from dyntune.parts.registry import resolve
from dyntune.parts.spec import Part
from dyntune.training.accelerator import is_main_process
from dyntune.training.header import training_header
from dyntune.training.inputs import with_pixels_as
from dyntune.training.progress import ProgressBar
from dyntune.training.run_folder import require_continuable, require_room
from dyntune.training.settings import TrainSettings
from dyntune.training.trainer import ACTIVATION, fit

EXAMPLES = (
    "dyntune train digits --method dyt:rate=0.5 --out runs/digits",
    "dyntune train folder:flowers --model vit_base_patch16_224.orig_in21k --method dyt:rate=0.5 --out runs/flowers",
    "dyntune train folder:flowers --model vit_base_patch16_224.orig_in21k --weights ViT-B_16.npz "
    "--method adaptformer:scale=1 --policy dispatch:rate=0.7 --out runs/flowers --resume",
    "dyntune train digits --method dyt --rate 0.3..0.9 --out runs/elastic",
    "dyntune train video-folder:clips --frames 8 --stride 4 --views 3x1 --out runs/clips",
)


@with_options
def command(
    data: DataArgument,
    run: Annotated[Path, typer.Option("--out", help="Folder for the adapter, logs and state.")],
    *,
    model: ModelOption = DEFAULT_MODEL,
    weights: WeightsOption = None,
    method: MethodOption = "dyt",
    policy: PolicyOption = None,
    rate: Annotated[
        str | None,
        typer.Option(help="Share of patches to train the gates towards, or a range, 0.3..0.9, for all of its rates."),
    ] = None,
    teacher: TeacherOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, or start it.")] = False,
    settings: Annotated[
        TrainSettings,
        Options(TrainSettings, names={"gradient_checkpointing": "grad_checkpointing"}, make=train_settings),
    ],
    drop_path: DropPathOption = 0.0,
    normalisation: NormalisationOption = "backbone",
    interpolation: InterpolationOption = "backbone",
    img_size: Annotated[
        int | None, typer.Option(min=1, help="Image height and width in pixels; the backbone's own by default.")
    ] = None,
    clip: Annotated[ClipOptions, Options(ClipOptions)],
    val_fraction: ValFractionOption = VAL_FRACTION,
    on_corrupt: OnCorruptOption = "error",
    json: JsonOption = False,
) -> None:
    """Adapt a pretrained ViT to labelled images, or clips of videos, and save the adapter of the best epoch."""
    require_room(run, resume)
    # Data can take minutes to read: what is written wrongly is said before.
    given = with_rate(parts(method, policy), rate)
    model, of_clips = clip.backbone(model)
    splits = load_data(data, val_fraction=val_fraction, on_corrupt=on_corrupt)
    report_skipped(splits)
    select = settings.select
    chosen = splits.test if select == "test" else splits.val
    if chosen is None and select != "last":
        raise DataError(f"{data} has no {select} split to select on; use --select last.")
    taught_by = load_teacher(teacher, splits)
    torch.manual_seed(settings.seed)
    arguments: dict[str, Any] = {"drop_path_rate": drop_path, **({} if img_size is None else {"img_size": img_size})}
    arguments |= of_clips
    tuned = build_tuned(model, *given, classes=splits.classes, weights=weights, **arguments)
    tuned.preprocessing = clip.preprocessing(with_pixels_as(tuned.preprocessing, normalisation, interpolation))
    if resume:
        require_continuable(run, tuned, splits.train, settings, taught_by, chosen)
    show_header(
        training_header(
            tuned,
            splits.train,
            chosen,
            settings,
            test=None if select == "test" else splits.test,
            name=splits.name,
            threads=choose_threads(lambda: tuned, settings, run),
        )
    )
    report_classes(splits)
    bar = ProgressBar(tuned.spec)
    result = fit(
        tuned,
        splits.train,
        chosen,
        out=run,
        resume=resume,
        progress=bar,
        calibrate=calibration_images(splits),
        settings=settings,
        teacher=taught_by,
    )
    if not is_main_process():
        return
    missed = read_config(run).get("results", {}).get(ACTIVATION)
    if missed is not None:
        say_missed_rate(
            missed, tuned.target_rate, f"{'test' if select == 'test' else 'val'} {several(splits.train.noun)}"
        )
    calibration = tuned.calibration
    figures = cost(tuned)
    if json:
        print_json(
            {
                "run": str(run),
                "best_epoch": result.best_epoch,
                tuned.task.merit: result.best_accuracy,
                "skipped": len(splits.skipped),
                "calibrated_rates": calibration and calibration.rates,
                **figures.to_dict(),
            }
        )
        return
    score = (
        ""
        if result.best_accuracy is None
        else f", {result.best_accuracy:.1%} on {select if select != 'last' else 'val'}"
    )
    space()
    out.print(f"saved epoch {result.best_epoch}{score} to {run} ({kilobytes(figures.adapter_bytes)})", highlight=False)
    if calibration is not None:
        out.print(
            f"calibrated on {counted(calibration.images, splits.train.noun)}: eval, predict and visualize take --rate, "
            f"{calibration.rates[0]:g} to {calibration.rates[-1]:g}",
            highlight=False,
        )
    print_next_eval(run, splits, val_fraction, on_corrupt)


def with_rate(specs: list[str], rate: str | None) -> tuple[Part, ...]:
    """The parts with ``--rate``, one share of patches or a range, put into the one that has gates.

    Raises:
        SpecError: ``rate`` is neither, or not exactly one part has a rate.
    """
    given = resolve(specs)
    if rate is None:
        return given
    low, dots, high = rate.partition("..")
    try:
        value: Any = (float(low), float(high)) if dots else float(low)
    except ValueError:
        raise SpecError(f"--rate {rate!r}: expected a share of the patches, 0.5, or a range, 0.3..0.9.") from None
    gated = [part for part in given if any(field.name == "rate" for field in fields(part))]
    if len(gated) != 1:
        raise SpecError(
            f"--rate {rate} needs one part with a rate; {'+'.join(specs)} has "
            f"{' and '.join(part.name() for part in gated) or 'none'}. Give dyt or dispatch, once."
        )
    return tuple(replace(part, **{"rate": value}) if part is gated[0] else part for part in given)
