"""``dyntune calibrate``: thresholds with which a trained run computes any share of the patches that is asked for."""

from __future__ import annotations

from typing import Annotated

import typer

from dyntune.commands.common import (
    VAL_FRACTION,
    BatchOption,
    DataArgument,
    DeviceOption,
    JsonOption,
    OnCorruptOption,
    RunArgument,
    TrainedValFractionOption,
    WeightsOption,
    pick_device,
    report_skipped,
    say_threads,
)
from dyntune.commands.console import err, print_json, print_table
from dyntune.core.errors import SpecError
from dyntune.core.words import counted, millions
from dyntune.data import load_held
from dyntune.model.adapter_folder import write_calibration
from dyntune.model.calibrate import IMAGES, RATES, calibrate
from dyntune.model.cost import cost
from dyntune.model.load import load
from dyntune.parts.spec import format_value
from dyntune.training.progress import CountBar

EXAMPLES = (
    "dyntune calibrate runs/digits digits",
    "dyntune calibrate runs/flowers folder:new-photos --rates 0.2/0.3/0.4 --images 500",
)


def command(
    run: RunArgument,
    data: DataArgument,
    rates: Annotated[str, typer.Option(help="Shares of patches; those between are interpolated.")] = format_value(
        RATES
    ),
    images: Annotated[int, typer.Option(min=1, help="Images to use.")] = IMAGES,
    val_fraction: TrainedValFractionOption = VAL_FRACTION,
    weights: WeightsOption = None,
    batch_size: BatchOption = 32,
    device: DeviceOption = "auto",
    on_corrupt: OnCorruptOption = "error",
    json: JsonOption = False,
) -> None:
    """Calibrate a run on validation images, or training images, for --rate of eval, predict and visualize.

    No label is used. train does this at its end; do it again where the images have changed.
    """
    try:
        asked = tuple(float(rate) for rate in rates.split("/"))
    except ValueError:
        raise SpecError(f"--rates {rates!r}: expected shares of the patches, written 0.3/0.5/0.7.") from None
    model = load(run, weights=weights, device=pick_device(device))
    held = load_held(data, val_fraction=val_fraction, on_corrupt=on_corrupt)
    found = held.images(next((split for split in ("val", "train") if split in held.splits), "all"))
    report_skipped(found)
    say_threads(model, min(images, len(found)))
    lost = sorted(set(model.calibration.rates) - set(asked)) if model.calibration else []
    if lost:
        given = "/".join(f"{rate:g}" for rate in sorted({*asked, *lost}))
        err.print(
            f"the run was calibrated for {counted(len(lost), 'other rate')} before, which this replaces; to keep "
            f"them too: --rates {given}",
            highlight=False,
            soft_wrap=True,
        )
    with CountBar("calibrating", len(set(asked)), "rates", err) as bar:
        calibration = calibrate(model, found, asked, images=images, batch_size=batch_size, watch=bar.count)
    write_calibration(run, calibration)
    model.calibration = calibration
    rows = []
    for rate in calibration.rates:
        model.set_rate(rate)
        rows.append({"rate": rate, "activation": calibration.activation(rate), "macs": cost(model).macs})
    if json:
        print_json({"run": str(run), "images": calibration.images, "dense_macs": model.dense_macs, "rates": rows})
        return
    print_table(
        f"{model.spec} in {run}, calibrated on {counted(calibration.images, found.noun)}",
        ("rate", "active patches", f"MACs per {'image' if model.preprocessing.clip is None else 'clip'}"),
        [
            (
                f"{row['rate']:g}",
                f"{row['activation']:.1%}",
                f"{millions(row['macs'])} ({row['macs'] / model.dense_macs:.1%} of dense)",
            )
            for row in rows
        ],
    )
