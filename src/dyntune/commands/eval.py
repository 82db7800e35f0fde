"""``dyntune eval``: accuracy, activation rates, MACs really executed, and speed."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from dyntune.commands.common import (
    VAL_FRACTION,
    BatchOption,
    DataArgument,
    DeviceOption,
    JsonOption,
    OnCorruptOption,
    RateOption,
    RunArgument,
    TopPolicyOption,
    TrainedValFractionOption,
    WeightsOption,
    WorkersOption,
    apply_rate,
    err,
    millions,
    pick_device,
    print_json,
    print_table,
    report_skipped,
    require_classes,
)
from dyntune.core.errors import DataError
from dyntune.data import load_data
from dyntune.model.load import load
from dyntune.studies.compare import DENSE, compare_speed
from dyntune.training.evaluate import evaluate
from dyntune.training.inputs import first_batch

EXAMPLES = ("dyntune eval runs/digits digits", "dyntune eval runs/flowers folder:flowers --split val --json")


def command(
    run: RunArgument,
    data: DataArgument,
    split: Annotated[Literal["test", "val", "train"], typer.Option(help="Which images.")] = "test",
    val_fraction: TrainedValFractionOption = VAL_FRACTION,
    policy: TopPolicyOption = None,
    rate: RateOption = None,
    weights: WeightsOption = None,
    batch_size: BatchOption = 64,
    workers: WorkersOption = 0,
    device: DeviceOption = "auto",
    on_corrupt: OnCorruptOption = "error",
    json: JsonOption = False,
) -> None:
    """Accuracy, activation rate per block, MACs really executed, and images per second beside the dense backbone."""
    model = load(run, weights=weights, device=pick_device(device), policy=policy)
    apply_rate(model, rate, policy)
    splits = load_data(data, val_fraction=val_fraction, on_corrupt=on_corrupt)
    report_skipped(splits)
    require_classes(model, splits)
    images = getattr(splits, split)
    if images is None:
        raise DataError(f"{data} has no {split} split.")
    with err.status(f"evaluating on {len(images)} images"):
        result = evaluate(model, images, batch_size=batch_size, workers=workers)
        speeds = compare_speed({model.spec: model}, first_batch(images, model, batch_size))
    speed, dense = speeds[model.spec], speeds[DENSE]
    if json:
        report = {
            "run": str(run),
            "data": data,
            "split": split,
            "skipped": len(splits.skipped),
            **result.to_dict(),
            "dense_macs": model.dense_macs,
        }
        report["images_per_second"] = speed.images_per_second
        print_json({**report, "dense_images_per_second": dense.images_per_second, "speedup": speed.speedup})
        return
    macs = result.macs or 0.0
    rows = [
        (result.merit, f"{result.score:.2%}"),
        *([("active patches", f"{result.activation:.1%}")] if result.activation_per_unit else []),
        ("MACs per image", f"{millions(macs)} ({macs / model.dense_macs:.1%} of dense)"),
        ("images per second", f"{speed.images_per_second:.0f} ({speed.speedup:.2f} x dense)"),
        *((f"active in {unit}", f"{rate:.1%}") for unit, rate in result.activation_per_unit.items()),
        *((f"tokens in {unit}", str(count)) for unit, count in result.tokens_per_unit.items()),
    ]
    print_table(f"{model.spec} on {result.images} {split} images of {data}", ("", ""), rows)
