"""``dyntune demo``: the main job on real images in a few minutes, with nothing to download."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dyntune.commands.common import DEFAULT_MODEL, JsonOption
from dyntune.commands.compare import show_comparison
from dyntune.commands.console import err, out, print_json, print_table, space
from dyntune.core.errors import DyntuneError
from dyntune.core.machine import machine
from dyntune.core.words import counted
from dyntune.data import load_data
from dyntune.studies.bench.peers import DENSE
from dyntune.studies.bench.plan import Plan
from dyntune.studies.bench.run import PLAN, MeasuringStopped, OtherMeasurements, Report, bench
from dyntune.studies.bench.runtimes import check_runtime
from dyntune.studies.compare import compare
from dyntune.studies.report import Table, table_columns, table_rows, trained_with, write_report
from dyntune.training.progress import ProgressBar
from dyntune.training.settings import TrainSettings

EXAMPLES = ("dyntune demo", "dyntune demo --out demo --epochs 3")
SPECS = ("linear", "adaptformer:scale=1", "dyt:rate=0.5")
LARGE, RUNTIMES = "vit_base_patch16_224", ("eager", "fast", "onnx", "onnx-int8")
_WORDS = {
    "eager": "PyTorch",
    "fast": "PyTorch, optimised",
    "onnx": "ONNX Runtime",
    "onnx-int8": "ONNX Runtime, int8",
}


def command(
    folder: Annotated[Path, typer.Option("--out", help="Folder for the runs, the table and the page.")] = Path("demo"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the 1,000 training images.")] = 8,
    speed: Annotated[bool, typer.Option(help="Also time ViT-B/16 with random weights, about two minutes.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Decides the order of images and every random number.")] = 0,
    json: JsonOption = False,
) -> None:
    """Adapt the built-in backbone to handwritten digits with a linear probe, AdaptFormer and DyT, and compare them.

    A demo that was stopped goes on where it was.
    """
    settings = TrainSettings(epochs=epochs, batch_size=16, lr=5e-3, device="cpu", seed=seed)
    splits = load_data("digits")
    show_comparison(SPECS, splits, folder, DEFAULT_MODEL, settings)
    rows, models = compare(
        SPECS, splits, folder, model=DEFAULT_MODEL, settings=settings, resume=True, progress=ProgressBar
    )
    assert splits.test is not None  # digits has one
    intro = (
        "The built-in backbone, which never saw a digit, adapted to scikit-learn's handwritten digits: "
        f"{counted(len(splits.train), 'training image')}, {counted(epochs, 'epoch')}, "
        f"{counted(len(splits.test), 'test image')}. The backbone stays frozen. The gates of DyT are trained to "
        "compute half of the patches in the MLPs and skip the rest; the table says what they computed."
    )
    further = [_large(folder / "speed")] if speed else []
    title, trained = "Dyntune demo: handwritten digits", trained_with("digits", DEFAULT_MODEL, None, settings)
    page = write_report(folder, title, intro, rows, models, splits.test, *further, trained=trained)
    if json:
        print_json(
            {
                **trained,
                "machine": machine(),
                "rows": [r.to_dict() for r in rows],
                "tables": [asdict(table) for table in further],
            }
        )
        return
    space()
    print_table("handwritten digits, built-in backbone", table_columns(rows), table_rows(rows))
    for table in further:
        out.print()
        print_table(table.title, table.columns, table.rows)
        out.print(table.note, highlight=False, markup=False)
    training = sum(row.train_seconds for row in rows)
    out.print(f"{training:.0f} s of training, measured on {machine()}\npage: {page}", highlight=False)


def _large(keep: Path) -> Table:
    """What dispatch means at a size that people deploy: DyT on ViT-B/16 beside the dense model, one image at a time."""
    usable = []
    for runtime in RUNTIMES:
        try:
            check_runtime(runtime)
        except DyntuneError as error:
            err.print(f"{_WORDS[runtime]} is left out: {error}", highlight=False, markup=False)
        else:
            usable.append(runtime)
    plan = Plan(model=LARGE, parts=("dyt:rate=0.5",), runtimes=tuple(usable), rounds=7, seconds=0.2)
    with err.status("") as status:

        def measured() -> Report:
            return bench(plan, lambda name: status.update(f"timing ViT-B/16, {_WORDS[name]}"), keep=keep, resume=True)

        try:
            try:
                report = measured()
            except OtherMeasurements:
                if not (keep / PLAN).exists():
                    raise
                for file in keep.glob("*.json"):  # a demo's own, of another machine or version
                    file.unlink()
                report = measured()
        except MeasuringStopped as stopped:
            raise MeasuringStopped(f"{stopped} The same command goes on with it.") from None
    dense = next(row for row in report.rows if row.name == DENSE)
    rows = [
        (
            f"{'dense' if row.name == DENSE else 'DyT at half'}, {_WORDS[row.runtime]}",
            f"{1000 * row.latency.p50:,.1f} ms",
            f"{row.macs / 1e9:.2f} G",
            "-" if row.name == DENSE else f"{row.speedup.median:.2f} x",
            f"{dense.latency.p50 / row.latency.p50:.2f} x",
        )
        for row in sorted(report.rows, key=lambda row: (usable.index(row.runtime), row.name != DENSE))
    ]
    columns = ("model", "per image", "MACs", "over dense in turns", "over dense in PyTorch")
    note = (
        "One image per call, median. Random weights, gates set so that half of the patches go through; int8 is not "
        "exact. Dense and DyT run in turns, each runtime in a process of its own. "
        f"Measured on {machine()}."
    )
    return Table("The same on ViT-B/16, an image at a time", columns, rows, note)
