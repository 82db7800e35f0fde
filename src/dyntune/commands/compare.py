"""``dyntune compare``: train and evaluate several methods, one table, one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dyntune.commands.common import (
    DEFAULT_MODEL,
    BackboneLrOption,
    DataArgument,
    GradCheckpointingOption,
    JsonOption,
    ModelOption,
    TeacherOption,
    WeightsOption,
    load_teacher,
    out,
    print_json,
    print_table,
)
from dyntune.core.machine import machine
from dyntune.data import load_data
from dyntune.parts.spec_list import split_specs
from dyntune.studies.compare import compare
from dyntune.studies.report import table_columns, table_rows, write_report
from dyntune.training.progress import ProgressBar
from dyntune.training.settings import Device, Precision, TrainSettings

EXAMPLES = (
    "dyntune compare digits --methods linear,adaptformer,dyt:rate=0.5,dispatch=layer --epochs 10 --out runs/compare",
)
_DEFAULTS = TrainSettings()


def command(
    data: DataArgument,
    methods: Annotated[str, typer.Option(help="Specs separated by commas; + joins the parts of one.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for the runs, the table and the page.")],
    model: ModelOption = DEFAULT_MODEL,
    weights: WeightsOption = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = _DEFAULTS.epochs,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step.")] = _DEFAULTS.batch_size,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = _DEFAULTS.lr,
    backbone_lr: BackboneLrOption = _DEFAULTS.backbone_lr,
    teacher: TeacherOption = None,
    precision: Annotated[Precision, typer.Option(help="Of the forward and backward pass.")] = "fp32",
    grad_checkpointing: GradCheckpointingOption = False,
    device: Annotated[Device, typer.Option(help="auto takes an accelerator if there is one.")] = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Decides the order of images and every random number.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue runs that --out holds.")] = False,
    json: JsonOption = False,
) -> None:
    """Train several methods alike, evaluate them on the test split, time them in turns, and write a page."""
    specs = split_specs(methods)
    settings = TrainSettings(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        min_lr=min(_DEFAULTS.min_lr, lr),
        backbone_lr=backbone_lr,
        precision=precision,
        gradient_checkpointing=grad_checkpointing,
        device=device,
        workers=workers,
        seed=seed,
    )
    splits = load_data(data)
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
    sizes = f"{len(splits.train)} training images, {epochs} epochs, seed {seed}; {len(splits.test)} test images"
    intro = f"{model} adapted to {data}: {sizes}."
    page = write_report(folder, f"Methods on {data}", intro, rows, models, splits.test)
    if json:
        print_json({"data": data, "model": model, "machine": machine(), "rows": [row.to_dict() for row in rows]})
        return
    print_table(f"{data} with {model}", table_columns(rows), table_rows(rows))
    out.print(f"measured on {machine()}\npage: {page}", highlight=False)
