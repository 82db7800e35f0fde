"""``dyntune compare``: train and evaluate several methods, one table, one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dyntune.commands.common import (
    DEFAULT_MODEL,
    DataArgument,
    JsonOption,
    ModelOption,
    OnCorruptOption,
    TeacherOption,
    WeightsOption,
    load_teacher,
    out,
    print_json,
    print_table,
    report_classes,
    report_skipped,
    train_settings,
)
from dyntune.commands.options import Options, with_options
from dyntune.core.machine import machine
from dyntune.data import load_data
from dyntune.parts.spec_list import split_specs
from dyntune.studies.compare import compare
from dyntune.studies.report import table_columns, table_rows, write_report
from dyntune.training.progress import ProgressBar
from dyntune.training.settings import TrainSettings

EXAMPLES = (
    "dyntune compare digits --methods linear,adaptformer,dyt:rate=0.5,dispatch=layer --epochs 10 --out runs/compare",
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
    on_corrupt: OnCorruptOption = "error",
    json: JsonOption = False,
) -> None:
    """Train several methods alike, evaluate them on the test split, time them in turns, and write a page."""
    specs = split_specs(methods)
    splits = load_data(data, on_corrupt=on_corrupt)
    report_skipped(splits)
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
    )
    assert splits.test is not None  # compare() has refused data without a test split
    trained = f"{len(splits.train)} training images, {settings.epochs} epochs, seed {settings.seed}"
    intro = f"{model} adapted to {data}: {trained}; {len(splits.test)} test images."
    page = write_report(folder, f"Methods on {data}", intro, rows, models, splits.test)
    if json:
        print_json({"data": data, "model": model, "machine": machine(), "rows": [row.to_dict() for row in rows]})
        return
    print_table(f"{data} with {model}", table_columns(rows), table_rows(rows))
    out.print(f"measured on {machine()}\npage: {page}", highlight=False)
