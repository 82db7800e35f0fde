"""``dyntune deploy``: a folder with the model for another runtime, checked against the run that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from torch import Tensor

from dyntune.commands.common import (
    JsonOption,
    RateOption,
    RunArgument,
    TopTokensOption,
    WeightsOption,
    apply_rate,
    err,
    out,
    print_json,
    print_table,
    report_skipped,
    require_classes,
)
from dyntune.core.errors import DataError, DeploymentError
from dyntune.data import DataSplits, ImageSubset, LabelledImages, load_data
from dyntune.inference.export.bundle import CALIBRATION_IMAGES, Export, place_for, record, require_possible
from dyntune.inference.export.check import Check, check
from dyntune.inference.export.choose import Choice, choose
from dyntune.inference.export.folder import OpenedModel, Precision, RuntimeName, open_runtime
from dyntune.inference.export.runtimes.onnx import OLDEST_OPSET, OPSET
from dyntune.model.checkpoint import load
from dyntune.model.tuned import TunedModel
from dyntune.training.inputs import first_batch

EXAMPLES = (
    "dyntune deploy runs/flowers --out flowers-onnx --check folder:flowers",
    "dyntune deploy runs/flowers --runtime auto --batch-size 8 --out flowers-fast",
    "dyntune deploy runs/flowers --precision int8 --out flowers-int8 --check folder:flowers --json",
)
_LEAST = 0.9
"""Share of predictions that a check wants to be the same."""


def command(
    run: RunArgument,
    folder: Annotated[Path, typer.Option("--out", help="Folder to write; it must not be there yet.")],
    runtime: Annotated[
        Literal["auto", "onnx", "openvino", "torch"],
        typer.Option(help="auto times those that are installed and takes the fastest."),
    ] = "onnx",
    precision: Annotated[
        Precision, typer.Option(help="Of the backbone's linear layers; gates, adapters and head stay in fp32.")
    ] = "fp32",
    check_on: Annotated[
        str | None, typer.Option("--check", help="Data, as for eval, to compare the folder with the run on.")
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help=f"With --check: write nothing if fewer predictions are the same; {_LEAST:g} if not given.",
        ),
    ] = None,
    calibrate_on: Annotated[
        str | None, typer.Option(help="Data whose training images int8 in OpenVINO takes its scales from.")
    ] = None,
    rate: RateOption = None,
    masks: Annotated[bool, typer.Option("--masks", help="The model also gives which patches were computed.")] = False,
    opset: Annotated[
        int | None,
        typer.Option(
            min=OLDEST_OPSET, help=f"Opset of the ONNX file, {OPSET} if not given; older runtimes need lower."
        ),
    ] = None,
    tokens: TopTokensOption = None,
    weights: WeightsOption = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="With --runtime auto or --check: images per forward pass; 1 if not given.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="With --runtime auto or --check: threads of a forward pass.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Write a run as a folder for ONNX Runtime, OpenVINO or torch.export, with a runner that needs no Dyntune."""
    runs = runtime == "auto" or check_on is not None
    _require("--min-agreement", min_agreement, check_on is not None, "--check DATA")
    _require("--batch-size", batch_size, runs, "--runtime auto or --check DATA")
    _require("--threads", threads, runs, "--runtime auto or --check DATA")
    calibrated = precision == "int8" and runtime in ("auto", "openvino")
    _require("--calibrate-on", calibrate_on, calibrated, "--precision int8 and --runtime openvino or auto")
    _require("--opset", opset, runtime in ("auto", "onnx"), "--runtime onnx or auto")
    batch_size = batch_size or 1
    with place_for(folder) as room:
        model = load(run, weights=weights, tokens=tokens)
        apply_rate(model, rate, tokens)
        data = None if check_on is None else _load(check_on, model)
        calibration = None if calibrate_on is None else _some(_load(calibrate_on, model).train, model)
        if runtime != "auto":
            require_possible(runtime, precision, calibration)
        with err.status("exporting"):
            export = Export(model, masks=masks, opset=OPSET if opset is None else opset)
        choice = None
        if runtime == "auto":
            images = _timed_images(model, data, calibration, batch_size)
            with err.status("timing the runtimes"):
                choice = choose(
                    export, room, images, precision=precision, threads=threads, calibration_images=calibration
                )
        taken: RuntimeName = choice.runtime if choice else runtime  # type: ignore[assignment]
        if choice is None:
            export.write(room / taken, taken, precision, calibration)
        checked = None
        if data is not None:
            with err.status("checking"):
                after = open_runtime(room / taken, threads, trust=True)
                with_masks = _with_masks(export, room, taken, precision, calibration, threads)
                checked = check(export.model, after, _checked_split(data), with_masks=with_masks, batch_size=batch_size)
            checked.require(_LEAST if min_agreement is None else min_agreement)
        record(room / taken, choice=choice and choice.to_dict(), check=checked and checked.to_dict())
        (room / taken).rename(folder)
    _report(folder, taken, precision, choice, checked, json)


def _require(option: str, given: object, used: bool, by: str) -> None:
    """Refuses an option that would do nothing."""
    if given is not None and not used:
        raise DeploymentError(f"{option} is for {by}, and does nothing without. Leave it out, or give that too.")


def _load(name: str, model: TunedModel) -> DataSplits:
    data = load_data(name)
    report_skipped(data)
    require_classes(model, data)
    return data


def _some(images: LabelledImages, model: TunedModel) -> Tensor:
    """Images drawn from a data set, always the same ones, preprocessed: ``(at most 128, 3, height, width)``."""
    drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:CALIBRATION_IMAGES]
    return first_batch(ImageSubset(images, drawn.tolist()), model, CALIBRATION_IMAGES)


def _checked_split(data: DataSplits) -> LabelledImages:
    split = data.test or data.val
    if split is None:
        raise DataError(f"{data.name} has neither test nor validation images to check on.")
    return split


def _timed_images(model: TunedModel, data: DataSplits | None, calibration: Tensor | None, batch_size: int) -> Tensor:
    """One batch: of the data to check or calibrate on, or noise."""
    if data is not None and len(_checked_split(data)) >= batch_size:
        return first_batch(_checked_split(data), model, batch_size)
    if calibration is not None and len(calibration) >= batch_size:
        return calibration[:batch_size]
    err.print("timing on noise: on it, gates may open more or less than on images. Give --check DATA for those.")
    return torch.randn(batch_size, *model.backbone.image_shape, generator=torch.Generator().manual_seed(0))


def _with_masks(
    export: Export,
    room: Path,
    runtime: RuntimeName,
    precision: Precision,
    calibration: Tensor | None,
    threads: int | None,
) -> OpenedModel | None:
    """The same model deployed with masks, to compare gates; None if there are none, or it gives masks already."""
    if export.masks or not export.gates:
        return None
    Export(export.model, masks=True, opset=export.opset).write(room / "with-masks", runtime, precision, calibration)
    return open_runtime(room / "with-masks", threads, trust=True)


def _report(
    folder: Path, runtime: str, precision: str, choice: Choice | None, checked: Check | None, json: bool
) -> None:
    size = sum(path.stat().st_size for path in folder.iterdir())
    if json:
        figures = {"choice": choice and choice.to_dict(), "check": checked and checked.to_dict()}
        print_json({"folder": str(folder), "runtime": runtime, "precision": precision, "bytes": size, **figures})
        return
    if choice:
        out.print(choice.reason)
    if checked:
        rows = [
            ("images", str(checked.images)),
            ("accuracy before", f"{checked.accuracy_before:.2%}"),
            ("accuracy after", f"{checked.accuracy_after:.2%}"),
            ("same predictions", f"{checked.agreement:.2%}"),
            ("largest difference of logits", f"{checked.largest_difference:.2g} of {checked.largest_logit:.3g}"),
            *([] if checked.gate_agreement is None else [("same gates", f"{checked.gate_agreement:.2%}")]),
            *((f"same in {unit}", f"{share:.2%}") for unit, share in checked.gate_agreement_per_unit.items()),
        ]
        print_table(f"{folder} beside the run", ("", ""), rows)
    elif precision == "int8":
        err.print("not checked: int8 changes logits and gates. --check DATA says how much.")
    out.print(f"{folder}: {runtime}, {precision}, {size / 1e6:.1f} MB. Try: python {folder}/run.py photo.jpg")
