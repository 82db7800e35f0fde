"""``dyntune compare``: train and evaluate several methods, one table, one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dyntune.commands.common import (
    DEFAULT_MODEL,
    DataArgument,
    JsonOption,
    ModelOption,
    OnCorruptOption,
    SpeedOption,
    TeacherOption,
    WeightsOption,
    choose_threads,
    load_teacher,
    report_classes,
    report_skipped,
    show_header,
    train_settings,
)
from dyntune.commands.console import out, print_json, print_table, space
from dyntune.commands.options import Options, with_options
from dyntune.core.machine import machine
from dyntune.core.words import counted
from dyntune.data import load_data
from dyntune.data.base import DataSplits
from dyntune.model.tune import build_tuned
from dyntune.parts.spec_list import folder_name, split_specs
from dyntune.studies.compare import compare
from dyntune.studies.report import table_columns, table_rows, trained_with, write_report
from dyntune.training.header import outlines, training_header
from dyntune.training.progress import ProgressBar
from dyntune.training.run_folder import require_room
from dyntune.training.settings import TrainSettings

EXAMPLES = (
    "dyntune compare digits --methods linear,adaptformer:scale=1,dyt:rate=0.5,experts=4 --epochs 10 --out runs/three",
)


@with_options
def command(
    data: DataArgument,
    methods: Annotated[str, typer.Option(help="Specs separated by commas; + joins the parts of one.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for the runs, the table and the page.")],
    *,
    model: ModelOption = DEFAULT_MODEL,
    weights: WeightsOption = None,
    settings: Annotated[
        TrainSettings,
        Options(
            TrainSettings,
            only=(
                "epochs",
                "batch_size",
                "lr",
                "backbone_lr",
                "precision",
                "gradient_checkpointing",
                "device",
                "workers",
                "seed",
            ),
            names={"gradient_checkpointing": "grad_checkpointing"},
            make=train_settings,
        ),
    ],
    teacher: TeacherOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue runs that --out holds.")] = False,
    speed: SpeedOption = True,
    on_corrupt: OnCorruptOption = "error",
    json: JsonOption = False,
) -> None:
    """Train several methods alike, evaluate them on the test split, time them in turns, and write a page."""
    specs = split_specs(methods)
    for spec in specs:
        require_room(folder / folder_name(spec), resume)
    splits = load_data(data, on_corrupt=on_corrupt)
    report_skipped(splits)
    show_comparison(specs, splits, folder, model, settings, weights)
    report_classes(splits)
    rows, models = compare(
        specs,
        splits,
        folder,
        model=model,
        weights=weights,
        settings=settings,
        resume=resume,
        progress=ProgressBar,
        teacher=load_teacher(teacher, splits),
        timed=speed,
    )
    assert splits.test is not None  # compare() has refused data without a test split
    images, tested = counted(len(splits.train), "training image"), counted(len(splits.test), "test image")
    intro = (
        f"{model} adapted to {data}: {images}, {counted(settings.epochs, 'epoch')}, learning rate {settings.lr:g}, "
        f"batches of {settings.batch_size}, seed {settings.seed}; {tested}."
    )
    trained = trained_with(data, model, weights, settings)
    page = write_report(folder, f"Methods on {data}", intro, rows, models, splits.test, trained=trained)
    if json:
        print_json({**trained, "machine": machine(), "rows": [row.to_dict() for row in rows]})
        return
    space()
    print_table(f"{data} with {model}", table_columns(rows), table_rows(rows))
    out.print(f"measured on {machine()}\npage: {page}", highlight=False)


def show_comparison(
    specs: Sequence[str],
    data: DataSplits,
    folder: Path,
    model: str,
    settings: TrainSettings,
    weights: Path | None = None,
) -> None:
    """Says what a comparison begins with, for which every method is tried on the backbone's shapes."""
    models = outlines(model, [[spec] for spec in specs], classes=data.classes, weights=weights)
    show_header(
        training_header(
            models,
            data.train,
            data.val,
            settings,
            test=data.test,
            name=data.name,
            threads=choose_threads(
                lambda: build_tuned(model, specs[0], classes=data.classes, weights=weights), settings, folder
            ),
        )
    )
