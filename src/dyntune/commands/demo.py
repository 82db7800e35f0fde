"""``dyntune demo``: the main job on real images in a few minutes, with nothing to download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dyntune.commands.common import DEFAULT_MODEL, JsonOption, out, print_json, print_table
from dyntune.core.machine import machine
from dyntune.data import load_data
from dyntune.studies.compare import compare
from dyntune.studies.report import table_columns, table_rows, write_report
from dyntune.training.progress import ProgressBar
from dyntune.training.settings import TrainSettings

EXAMPLES = ("dyntune demo", "dyntune demo --out demo --epochs 3")
# So short a training leaves many gates undecided, so the rate is held where inference needs it (docs/dyt.md).
SPECS = ("linear", "adaptformer:scale=1", "dyt:rate=0.5,scale=1,rate_of=inference,rate_weight=10")


def command(
    folder: Annotated[Path, typer.Option("--out", help="Folder for the runs, the table and the page.")] = Path("demo"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the 1,000 training images.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Decides the order of images and every random number.")] = 0,
    json: JsonOption = False,
) -> None:
    """Adapt the built-in backbone to handwritten digits with a linear probe, AdaptFormer and DyT, and compare them.

    A demo that was stopped goes on where it was.
    """
    settings = TrainSettings(epochs=epochs, batch_size=32, lr=5e-3, device="cpu", seed=seed)
    splits = load_data("digits")
    rows, models = compare(
        SPECS, splits, folder, model=DEFAULT_MODEL, settings=settings, resume=True, progress=ProgressBar
    )
    assert splits.test is not None  # digits has one
    intro = (
        "The built-in backbone, which never saw a digit, adapted to scikit-learn's handwritten digits: "
        f"{len(splits.train)} training images, {epochs} epochs, {len(splits.test)} test images. "
        "The backbone stays frozen. The gates of DyT are trained to compute half of the patches in the MLPs and skip "
        "the rest; the table says what they computed. Its rate loss holds the activation of inference, and "
        "weighs more than in the paper (docs/dyt.md says why)."
    )
    page = write_report(folder, "Dyntune demo: handwritten digits", intro, rows, models, splits.test)
    if json:
        print_json(
            {"data": "digits", "model": DEFAULT_MODEL, "machine": machine(), "rows": [r.to_dict() for r in rows]}
        )
        return
    print_table("handwritten digits, built-in backbone", table_columns(rows), table_rows(rows))
    training = sum(row.train_seconds for row in rows)
    out.print(f"{training:.0f} s of training, measured on {machine()}\npage: {page}", highlight=False)
