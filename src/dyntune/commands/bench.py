"""``dyntune bench``: speed beside the dense model and other peers, in each runtime."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from dyntune.commands.common import (
    DEFAULT_MODEL,
    DeviceOption,
    JsonOption,
    MethodOption,
    ModelOption,
    PolicyOption,
    WeightsOption,
    parts,
    pick_device,
)
from dyntune.commands.console import err, out, print_json, print_table, space
from dyntune.commands.options import Options, option, with_options
from dyntune.core.errors import SpecError
from dyntune.core.words import counted, duration
from dyntune.model.adapter_folder import read_config
from dyntune.parts.spec_list import split_list
from dyntune.studies import pictures
from dyntune.studies.bench.plan import Plan
from dyntune.studies.bench.report import DETAILS, MEASUREMENTS, details, require_room, speed_figure, summary, write
from dyntune.studies.bench.run import MeasuringStopped, bench, estimate
from dyntune.studies.bench.runtimes import known_runtimes

EXAMPLES = (
    "dyntune bench --model vit_base_patch16_224 --method dyt:rate=0.5 --batch-size 1,8,32",
    "dyntune bench --method dyt:rate=0.5 --against dense,adaptformer,tome:r=8 --runtime eager,fast --plot speed.png",
    "dyntune bench runs/digits --data digits --runtime onnx,openvino --threads 4 --json",
)
_OF_A_FRESH_MODEL = ("model", "method", "pretrained", "classes")
_PICTURES = (".png", ".svg", ".pdf")


@with_options
def command(
    context: typer.Context,
    run: Annotated[
        Path | None, typer.Argument(help="Folder that train or save() wrote; without it a fresh model is measured.")
    ] = None,
    *,
    model: ModelOption = DEFAULT_MODEL,
    method: MethodOption = "dyt",
    policy: PolicyOption = None,
    weights: WeightsOption = None,
    batch_size: Annotated[str, option(Plan, "batch_sizes")] = "1,8,32",
    runtime: Annotated[
        str,
        typer.Option(
            help=f"Some of {', '.join(known_runtimes())}, separated by commas; fast is optimize(). Each is measured "
            "in a process of its own."
        ),
    ] = "eager",
    against: Annotated[str, option(Plan, "against")] = "dense",
    plan: Annotated[
        Plan,
        Options(
            Plan, only=("pretrained", "classes", "rate", "data", "on_corrupt", "threads", "rounds", "seconds", "seed")
        ),
    ],
    device: DeviceOption = "auto",
    plot: Annotated[Path | None, typer.Option(help="Also draw the speed-ups to this file (.png, .svg, .pdf).")] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Also write each measurement as it is made, and results.json, results.md and speed.png, to a folder.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out what --out holds already.")] = False,
    json: JsonOption = False,
) -> None:
    """Throughput, latency, memory and skip efficiency beside the dense model and other peers, run in turns."""
    given = [name for name in _OF_A_FRESH_MODEL if context.get_parameter_source(name).name == "COMMANDLINE"]  # type: ignore[union-attr]
    if run is not None and given:
        options = ", ".join(f"--{name}" for name in given)
        raise typer.BadParameter(f"{run} says all about its model; leave out {options}, or leave out the run.")
    if plan.pretrained and weights is not None:
        raise typer.BadParameter("--pretrained and --weights name two sources of the backbone's weights; give one.")
    if plot is not None and plot.suffix.lower() not in _PICTURES:
        raise typer.BadParameter(f"--plot {plot}: expected a file name ending in {', '.join(_PICTURES)}.")
    if resume and folder is None:
        raise typer.BadParameter("--resume goes on with the measurements in --out; give the folder.")
    if run is not None:
        read_config(run)  # says at once what is no run
    if folder is not None:
        require_room(folder)
    plan = replace(
        plan,
        run=None if run is None else str(run),
        model=model,
        parts=tuple(parts(method, policy) if run is None else filter(None, [policy])),
        weights=None if weights is None else str(weights),
        against=tuple(split_list(against)),
        runtimes=tuple(split_list(runtime)),
        batch_sizes=_sizes(batch_size),
        device=pick_device(device).type,
    )
    kept = "" if folder is None else f", each is written to {folder} as it is made"
    err.print(
        f"about {duration(estimate(plan))} for {counted(len(plan.runtimes), 'runtime')}, "
        f"{counted(len(plan.batch_sizes), 'batch size')} and {counted(1 + len(plan.against), 'model')}{kept}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    with err.status("") as status:
        keep = None if folder is None else folder / MEASUREMENTS
        try:
            report = bench(plan, lambda name: status.update(f"measuring {name}"), keep=keep, resume=resume)
        except MeasuringStopped as stopped:
            raise MeasuringStopped(f"{stopped} --resume goes on with it.") from None
    if folder is not None:
        write(report, folder)
    if plot is not None:
        pictures.save_figure(speed_figure(report), plot)
    if json:
        print_json(report.to_dict())
        return
    space()
    print_table(f"{report.title}: images per second (speed-up over dense)", *summary(report))
    out.print()
    print_table("Every figure", DETAILS, details(report))
    out.print("\n".join(report.notes), highlight=False, markup=False)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(piece) for piece in text.split(","))
    except ValueError:
        raise SpecError(f"--batch-size {text!r}: expected whole numbers separated by commas, such as 1,8,32.") from None
