"""``dyntune export``: a folder with the model for another runtime, checked against the run that it was made from."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer
from torch import Tensor

from dyntune.commands.common import (
    JsonOption,
    OnCorruptOption,
    RateOption,
    RunArgument,
    TopPolicyOption,
    WeightsOption,
    apply_rate,
    report_skipped,
    require_classes,
)
from dyntune.commands.console import err, out, print_json, print_table
from dyntune.core.errors import DataError, ExportError
from dyntune.data import ImageSubset, LabelledImages, load_data, load_held
from dyntune.data.sources.base import Held
from dyntune.inference.export.bundle import CALIBRATION_IMAGES, Export, place_for, record
from dyntune.inference.export.check import Check, check
from dyntune.inference.export.choose import Choice, choose
from dyntune.inference.export.folder import OpenedModel, open_export
from dyntune.inference.export.registry import (
    configured,
    every,
    options,
    precisions,
    registered,
    require_possible,
    require_precision,
)
from dyntune.inference.export.runtimes.base import FP32, Runtime
from dyntune.model.load import load
from dyntune.model.tuned import TunedModel
from dyntune.training.inputs import spread_batch
from dyntune.training.progress import CountBar

EXAMPLES = (
    "dyntune export runs/flowers --out flowers-onnx --check folder:flowers",
    "dyntune export runs/flowers --runtime auto --batch-size 8 --out flowers-fast",
    "dyntune export runs/flowers --precision int8 --out flowers-int8 --check folder:flowers --json",
)
_LEAST = 0.9
"""Share of predictions that a check wants to be the same."""
AUTO = "auto"


def _calibrated() -> str:
    """The runtimes and precisions that take scales from images, in words."""
    return ", ".join(
        f"{precision} in {runtime.title}"
        for runtime in registered().values()
        for precision, offer in runtime.precisions.items()
        if offer.images
    )


def _with_options_of_runtimes(command: Callable[..., None]) -> Callable[..., None]:
    """Puts an option of the command line for each option of a runtime in the place of ``**given``."""
    known: dict[str, inspect.Parameter] = {}
    for runtime in registered().values():
        types = get_type_hints(runtime)
        for name, field in runtime.options().items():
            option = typer.Option(None, help=field.metadata.get("help"))
            kind, hint = inspect.Parameter.KEYWORD_ONLY, types[name] | None
            known.setdefault(name, inspect.Parameter(name, kind, default=option, annotation=hint))
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != "given"]
    command.__signature__ = signature.replace(parameters=[*own, *known.values()])  # type: ignore[attr-defined]
    return command


@_with_options_of_runtimes
def command(
    run: RunArgument,
    folder: Annotated[Path, typer.Option("--out", help="Folder to write; it must not be there yet.")],
    runtime: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(registered())}, or {AUTO}, which times those that are installed and takes the fastest."
        ),
    ] = "onnx",
    precision: Annotated[
        str,
        typer.Option(
            help=f"Of the backbone's linear layers, {' or '.join(precisions())}; gates, adapters and head stay in fp32."
        ),
    ] = FP32,
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
        str | None, typer.Option(help=f"Data whose training images {_calibrated()} takes its scales from.")
    ] = None,
    rate: RateOption = None,
    masks: Annotated[bool, typer.Option("--masks", help="The model also gives which patches were computed.")] = False,
    policy: TopPolicyOption = None,
    weights: WeightsOption = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="With --runtime auto or --check: images per forward pass; 1 if not given.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="With --runtime auto or --check: threads of a forward pass.")
    ] = None,
    on_corrupt: OnCorruptOption = "error",
    json: JsonOption = False,
    **given: Any,
) -> None:
    """Write a run as a folder for another runtime, with a runner that needs no Dyntune."""
    runs = runtime == AUTO or check_on is not None
    _require("--min-agreement", min_agreement, check_on is not None, "--check DATA")
    _require("--batch-size", batch_size, runs, "--runtime auto or --check DATA")
    _require("--threads", threads, runs, "--runtime auto or --check DATA")
    require_precision(precision)
    given = {name: value for name, value in given.items() if value is not None}
    for name, owners in options().items():
        used = runtime in (*owners, AUTO)
        _require(f"--{name.replace('_', '-')}", given.get(name), used, f"--runtime {' or '.join((*owners, AUTO))}")
    taken = every(given) if runtime == AUTO else [configured(runtime, given)]
    images_used = any(one.precisions[precision].images for one in taken if precision in one.precisions)
    _require("--calibrate-on", calibrate_on, images_used, f"{_calibrated()}, or --runtime {AUTO} with that precision")
    batch_size = batch_size or 1
    with place_for(folder) as room:
        model = load(run, weights=weights, policy=policy)
        apply_rate(model, rate, policy)
        images = calibration = None
        if check_on is not None:
            held = load_held(check_on, classes=model.classes, on_corrupt=on_corrupt)
            require_classes(model, held)
            images = _checked_split(held)
            report_skipped(images)
        if calibrate_on is not None:
            splits = load_data(calibrate_on, on_corrupt=on_corrupt)
            report_skipped(splits)
            require_classes(model, splits)
            calibration = _some(splits.train, model)
        if runtime != AUTO:
            require_possible(taken[0], precision, calibration)
        with err.status("exporting"):
            export = Export(model, masks=masks)
        choice = None
        if runtime == AUTO:
            timed = _timed_images(model, images, calibration, batch_size)
            with err.status("timing the runtimes"):
                choice = choose(
                    export, room, timed, taken, precision=precision, threads=threads, calibration_images=calibration
                )
            taken = [one for one in taken if one.name() == choice.runtime]
        (chosen,) = taken
        written = room / chosen.name()
        if choice is None:
            export.write(written, chosen, precision, calibration)
        checked = None
        if images is not None:
            with CountBar("checking", len(images), f"{images.noun}s", err) as bar:
                after = open_export(written, threads, trust=True)
                with_masks = _with_masks(export, room, chosen, precision, calibration, threads)
                checked = check(
                    export.model, after, images, with_masks=with_masks, batch_size=batch_size, watch=bar.count
                )
            checked.require(_LEAST if min_agreement is None else min_agreement)
        record(written, choice=choice and choice.to_dict(), check=checked and checked.to_dict())
        written.rename(folder)
    _report(folder, chosen.name(), precision, choice, checked, json)


def _require(option: str, given: object, used: bool, by: str) -> None:
    """Refuses an option that would do nothing."""
    if given is not None and not used:
        raise ExportError(f"{option} is for {by}, and does nothing without. Leave it out, or give that too.")


def _some(images: LabelledImages, model: TunedModel) -> Tensor:
    """Images drawn from a data set, always the same ones, preprocessed: ``(at most 128, 3, height, width)``."""
    drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:CALIBRATION_IMAGES]
    return spread_batch(ImageSubset(images, drawn.tolist()), model, CALIBRATION_IMAGES)


def _checked_split(data: Held) -> LabelledImages:
    split = next((split for split in ("test", "val") if split in data.splits), None)
    if split is None:
        raise DataError(f"{data.name} has neither test nor validation images to check on.")
    return data.images(split)


def _timed_images(
    model: TunedModel, images: LabelledImages | None, calibration: Tensor | None, batch_size: int
) -> Tensor:
    """One batch: of the images to check or calibrate on, or noise."""
    if images is not None and len(images) >= batch_size:
        return spread_batch(images, model, batch_size)
    if calibration is not None and len(calibration) >= batch_size:
        return calibration[:batch_size]
    err.print("timing on noise: on it, gates may open more or less than on images. Give --check DATA for those.")
    return torch.randn(batch_size, *model.backbone.input_shape, generator=torch.Generator().manual_seed(0))


def _with_masks(
    export: Export,
    room: Path,
    runtime: Runtime,
    precision: str,
    calibration: Tensor | None,
    threads: int | None,
) -> OpenedModel | None:
    """The same model exported with masks, to compare gates; None if there are none, or it gives masks already."""
    if export.masks or not export.gates:
        return None
    Export(export.model, masks=True).write(room / "with-masks", runtime, precision, calibration)
    return open_export(room / "with-masks", threads, trust=True)


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
    trying = shlex.join(["python", str(folder / "run.py"), "photo.jpg"])
    out.print(f"{folder}: {runtime}, {precision}, {size / 1e6:.1f} MB. Try: {trying}")
