"""``dyntune bench``: speed beside the dense model and other peers, in each runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dyntune.commands.common import (
    DEFAULT_MODEL,
    DeviceOption,
    JsonOption,
    MethodOption,
    ModelOption,
    TokensOption,
    WeightsOption,
    err,
    out,
    parts,
    pick_device,
    print_json,
    print_table,
)
from dyntune.core.errors import SpecError
from dyntune.studies.bench.picture import speed_figure
from dyntune.studies.bench.plan import Plan
from dyntune.studies.bench.run import bench
from dyntune.studies.bench.runtimes import known_runtimes
from dyntune.studies.bench.table import DETAILS, details, summary, write
from dyntune.studies.compare import split_list
from dyntune.studies.pictures import save_figure

EXAMPLES = (
    "dyntune bench --model vit_base_patch16_224 --method dyt:rate=0.5 --batch-size 1,8,32",
    "dyntune bench --method dyt:rate=0.5 --against dense,adaptformer,tome:r=8 --runtime eager,fast --plot speed.png",
    "dyntune bench runs/digits --data digits --runtime onnx,openvino --threads 4 --json",
)
_OF_A_FRESH_MODEL = ("model", "method", "pretrained", "classes")
_PICTURES = (".png", ".svg", ".pdf")


def command(
    context: typer.Context,
    run: Annotated[
        Path | None, typer.Argument(help="Folder that train or save() wrote; without it a fresh model is measured.")
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    method: MethodOption = "dyt",
    tokens: TokensOption = None,
    weights: WeightsOption = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Give a fresh model timm's weights for its name, not random ones.")
    ] = False,
    classes: Annotated[int, typer.Option(min=1, help="Classes of a fresh model's head.")] = 100,
    batch_size: Annotated[str, typer.Option(help="Images per call; several separated by commas.")] = "1,8,32",
    runtime: Annotated[
        str,
        typer.Option(
            help=f"Some of {', '.join(known_runtimes())}, separated by commas; fast is optimize(). Each is measured "
            "in a process of its own."
        ),
    ] = "eager",
    against: Annotated[
        str,
        typer.Option(
            help="What the model is compared with, separated by commas: dense (the untouched backbone, always there), "
            "specs of fresh models such as adaptformer or tome:r=8, and gather (the model itself in plain torch)."
        ),
    ] = "dense",
    rate: Annotated[
        float | None,
        typer.Option(
            help="Share of the patches that gates let through: of a fresh model, whose target it is by default, set "
            "exactly on the timed images; of a run, as set_rate() sets it."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Time on test images of this data set, such as digits, instead of noise.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of each runtime; by default as many as torch takes, one per core.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each model at each batch size.")] = 15,
    seconds: Annotated[float, typer.Option(min=0, help="Least time of a turn.")] = 0.2,
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Decides random weights and noise.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Also draw the speed-ups to this file (.png, .svg, .pdf).")] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Also write results.json, results.md and speed.png to this folder.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Throughput, latency, memory and skip efficiency beside the dense model and other peers, run in turns."""
    given = [name for name in _OF_A_FRESH_MODEL if context.get_parameter_source(name).name == "COMMANDLINE"]  # type: ignore[union-attr]
    if run is not None and given:
        options = ", ".join(f"--{name}" for name in given)
        raise typer.BadParameter(f"{run} says all about its model; leave out {options}, or leave out the run.")
    if pretrained and weights is not None:
        raise typer.BadParameter("--pretrained and --weights name two sources of the backbone's weights; give one.")
    if plot is not None and plot.suffix.lower() not in _PICTURES:
        raise typer.BadParameter(f"--plot {plot}: expected a file name ending in {', '.join(_PICTURES)}.")
    plan = Plan(
        run=None if run is None else str(run),
        model=model,
        parts=tuple(parts(method, tokens) if run is None else filter(None, [tokens])),
        weights=None if weights is None else str(weights),
        pretrained=pretrained,
        classes=classes,
        against=tuple(split_list(against)),
        runtimes=tuple(split_list(runtime)),
        batch_sizes=_sizes(batch_size),
        rate=rate,
        data=data,
        threads=threads,
        device=pick_device(device).type,
        rounds=rounds,
        seconds=seconds,
        seed=seed,
    )
    with err.status("") as status:
        report = bench(plan, lambda name: status.update(f"measuring {name}"))
    if folder is not None:
        write(report, folder)
    if plot is not None:
        save_figure(speed_figure(report), plot)
    if json:
        print_json(report.to_dict())
        return
    print_table(f"{report.title}: images per second (speed-up over dense)", *summary(report))
    print_table("Every figure", DETAILS, details(report))
    out.print("\n".join(report.notes), highlight=False, markup=False)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(piece) for piece in text.split(","))
    except ValueError:
        raise SpecError(f"--batch-size {text!r}: expected whole numbers separated by commas, such as 1,8,32.") from None
