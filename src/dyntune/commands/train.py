"""``dyntune train``: adapt a pretrained ViT to labelled images."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from accelerate import PartialState

from dyntune.commands.common import (
    DEFAULT_MODEL,
    BackboneLrOption,
    DataArgument,
    GradCheckpointingOption,
    JsonOption,
    MethodOption,
    ModelOption,
    TeacherOption,
    TokensOption,
    WeightsOption,
    calibration_images,
    err,
    kilobytes,
    load_teacher,
    out,
    parts,
    print_json,
    report_skipped,
)
from dyntune.core.errors import DataError, SpecError
from dyntune.data import load_data
from dyntune.data.base import DataSplits
from dyntune.model.cost import cost
from dyntune.model.rates import Calibration, calibrate, dispatchers
from dyntune.model.saved import read_config, write_calibration
from dyntune.model.tuned import TunedModel, build_tuned
from dyntune.parts.registry import resolve
from dyntune.parts.spec import Part
from dyntune.training.inputs import Interpolation, Normalisation, prepared_as
from dyntune.training.progress import ProgressBar
from dyntune.training.schedule import Schedule
from dyntune.training.settings import Device, Optimizer, Precision, Select, TrainSettings
from dyntune.training.trainer import fit

EXAMPLES = (
    "dyntune train digits --method dyt:rate=0.5,scale=1 --out runs/digits",
    "dyntune train folder:flowers --model vit_base_patch16_224.orig_in21k --method dyt:rate=0.5 --out runs/flowers",
    "dyntune train folder:flowers --model vit_base_patch16_224.orig_in21k --weights ViT-B_16.npz "
    "--method adaptformer --tokens dispatch:rate=0.7 --out runs/flowers --resume",
    "dyntune train digits --method dyt:scale=1 --rate 0.3..0.9 --out runs/elastic",
)
_DEFAULTS = TrainSettings()


def command(
    data: DataArgument,
    run: Annotated[Path, typer.Option("--out", help="Folder for the adapter, logs and state.")],
    model: ModelOption = DEFAULT_MODEL,
    weights: WeightsOption = None,
    method: MethodOption = "dyt",
    tokens: TokensOption = None,
    rate: Annotated[
        str | None,
        typer.Option(help="Share of patches to train the gates towards, or a range, 0.3..0.9, for all of its rates."),
    ] = None,
    teacher: TeacherOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, or start it.")] = False,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = _DEFAULTS.epochs,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step and process.")] = _DEFAULTS.batch_size,
    drop_last: Annotated[bool, typer.Option("--drop-last", help="Leave out a last batch that is not full.")] = False,
    optimizer: Annotated[Optimizer, typer.Option(help="sgd has momentum 0.9.")] = _DEFAULTS.optimizer,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = _DEFAULTS.lr,
    min_lr: Annotated[float, typer.Option(help="Learning rate at the end of the cosine.")] = _DEFAULTS.min_lr,
    backbone_lr: BackboneLrOption = _DEFAULTS.backbone_lr,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.")] = _DEFAULTS.weight_decay,
    decay_1d: Annotated[bool, typer.Option(help="Weight decay on biases and other 1-D tensors too.")] = True,
    warmup_epochs: Annotated[
        float | None, typer.Option(help="Linear warm-up; a tenth of the epochs by default.")
    ] = None,
    warmup_lr: Annotated[float, typer.Option(help="Learning rate at which the warm-up begins.")] = _DEFAULTS.warmup_lr,
    cooldown_epochs: Annotated[int, typer.Option(min=0, help="Last epochs, at --min-lr.")] = _DEFAULTS.cooldown_epochs,
    schedule: Annotated[
        Schedule,
        typer.Option(help="Learning rate per iteration or per epoch; timm's cosine counts the warm-up as its part."),
    ] = _DEFAULTS.schedule,
    label_smoothing: Annotated[float, typer.Option(help="Share of the target spread over all classes.")] = 0.0,
    mixup: Annotated[float, typer.Option(help="Alpha of mixup, 0 for none.")] = 0.0,
    cutmix: Annotated[float, typer.Option(help="Alpha of CutMix, 0 for none.")] = 0.0,
    augment: Annotated[
        Literal["none", "timm"], typer.Option(help="none resizes only; timm crops, flips, recolours.")
    ] = "none",
    drop_path: Annotated[float, typer.Option(min=0, max=0.99, help="Stochastic depth rate of the backbone.")] = 0.0,
    accumulate: Annotated[int, typer.Option(min=1, help="Steps whose gradients are added up.")] = 1,
    clip_norm: Annotated[float | None, typer.Option(help="Largest norm of the gradient.")] = None,
    precision: Annotated[Precision, typer.Option(help="Of the forward and backward pass.")] = "fp32",
    grad_checkpointing: GradCheckpointingOption = False,
    device: Annotated[Device, typer.Option(help="auto takes an accelerator if there is one.")] = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Decides the order of images and every random number.")] = 0,
    select: Annotated[Select, typer.Option(help="Split that picks the saved epoch.")] = "val",
    eval_every: Annotated[int, typer.Option(min=1, help="Epochs between two evaluations.")] = _DEFAULTS.eval_every,
    normalisation: Annotated[
        Normalisation, typer.Option(help="Of the pixels: the backbone's own, 0.5/0.5, ImageNet's statistics, or none.")
    ] = "backbone",
    interpolation: Annotated[Interpolation, typer.Option(help="How images are resized.")] = "backbone",
    img_size: Annotated[int | None, typer.Option(min=1, help="Image height and width in pixels.")] = None,
    val_fraction: Annotated[
        float, typer.Option(help="Split off the training images where there is no validation split.")
    ] = 0.2,
    on_corrupt: Annotated[
        Literal["error", "skip"], typer.Option(help="What to do with images that cannot be read.")
    ] = "error",
    json: JsonOption = False,
) -> None:
    """Adapt a pretrained ViT to labelled images and save the adapter of the best epoch."""
    settings = TrainSettings(
        epochs=epochs,
        batch_size=batch_size,
        drop_last=drop_last,
        optimizer=optimizer,
        lr=lr,
        min_lr=min(min_lr, lr),
        backbone_lr=backbone_lr,
        weight_decay=weight_decay,
        decay_1d=decay_1d,
        warmup_epochs=warmup_epochs,
        warmup_lr=warmup_lr,
        cooldown_epochs=cooldown_epochs,
        schedule=schedule,
        label_smoothing=label_smoothing,
        mixup=mixup,
        cutmix=cutmix,
        augment=augment,
        accumulate=accumulate,
        clip_norm=clip_norm,
        precision=precision,
        gradient_checkpointing=grad_checkpointing,
        device=device,
        workers=workers,
        seed=seed,
        select=select,
        eval_every=eval_every,
    )
    splits = load_data(data, val_fraction=val_fraction, on_corrupt=on_corrupt)
    report_skipped(splits)
    chosen = splits.test if select == "test" else splits.val
    if chosen is None and select != "last":
        raise DataError(f"{data} has no {select} split to select on; use --select last.")
    taught_by = load_teacher(teacher, splits)
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {"drop_path_rate": drop_path, **({} if img_size is None else {"img_size": img_size})}
    given = with_rate(parts(method, tokens), rate)
    tuned = build_tuned(model, *given, classes=splits.classes, weights=weights, **arguments)
    tuned.preprocessing = prepared_as(tuned.preprocessing, normalisation, interpolation)
    bar = ProgressBar(tuned.spec)
    result = fit(
        tuned, splits.train, chosen, out=run, resume=resume, progress=bar, settings=settings, teacher=taught_by
    )
    if not PartialState().is_main_process:
        return
    calibration = _calibrated(tuned, run, splits)
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
    out.print(f"saved epoch {result.best_epoch}{score} to {run} ({kilobytes(figures.adapter_bytes)})", highlight=False)
    if calibration is not None:
        out.print(
            f"calibrated on {calibration.images} images: eval, predict and visualize take --rate, "
            f"{calibration.rates[0]:g} to {calibration.rates[-1]:g}",
            highlight=False,
        )
    out.print(f"next: dyntune eval {run} {data}", highlight=False)


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


def _calibrated(model: TunedModel, run: Path, splits: DataSplits) -> Calibration | None:
    """Calibrates the gates of a finished run for other rates, unless that is done already; None without gates."""
    if not dispatchers(model.backbone):
        return None
    saved = read_config(run).get("calibration")
    if saved is not None:
        return Calibration.from_dict(saved)
    images = calibration_images(splits)
    with err.status("calibrating the gates for other rates"):
        calibration = calibrate(model, images)
    write_calibration(run, calibration)
    return calibration
