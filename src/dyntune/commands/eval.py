"""``dyntune eval``: accuracy, activation rates, MACs really executed, and speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dyntune.commands.clips import ViewsOption, with_views
from dyntune.commands.common import (
    VAL_FRACTION,
    BatchOption,
    DataArgument,
    DeviceOption,
    JsonOption,
    OnCorruptOption,
    RateOption,
    RunArgument,
    SpeedOption,
    TopPolicyOption,
    TrainedValFractionOption,
    WeightsOption,
    WorkersOption,
    apply_rate,
    pick_device,
    report_skipped,
    require_classes,
    say_missed_rate,
    say_threads,
)
from dyntune.commands.console import err, out, print_json, print_table
from dyntune.core.errors import DataError
from dyntune.core.words import counted, millions, several
from dyntune.data import LabelledImages, load_held
from dyntune.data.sources.base import Held
from dyntune.model.load import load
from dyntune.model.tuned import TunedModel
from dyntune.studies.compare import DENSE, compare_speed
from dyntune.training.evaluate import evaluate
from dyntune.training.identity import ASKED
from dyntune.training.inputs import spread_batch
from dyntune.training.progress import EvaluationBar
from dyntune.training.seen import Seen

EXAMPLES = ("dyntune eval runs/digits digits", "dyntune eval runs/flowers folder:flowers --split val --json")


def command(
    run: RunArgument,
    data: DataArgument,
    split: Annotated[
        Literal["all", "train", "val", "test"] | None,
        typer.Option(
            help="Which images: those of a split, or all.",
            show_default="test; all of a folder of classes that the run was not trained on",
        ),
    ] = None,
    val_fraction: TrainedValFractionOption = VAL_FRACTION,
    policy: TopPolicyOption = None,
    rate: RateOption = None,
    weights: WeightsOption = None,
    views: ViewsOption = None,
    batch_size: BatchOption = 64,
    workers: WorkersOption = 0,
    device: DeviceOption = "auto",
    speed: SpeedOption = True,
    on_corrupt: OnCorruptOption = "error",
    json: JsonOption = False,
) -> None:
    """Accuracy, activation rate per block, MACs really executed, and images per second beside the dense backbone."""
    model = load(run, weights=weights, device=pick_device(device), policy=policy)
    apply_rate(model, rate, policy)
    model.preprocessing = with_views(model.preprocessing, views)
    held = load_held(data, classes=model.classes, val_fraction=val_fraction, on_corrupt=on_corrupt)
    require_classes(model, held)
    seen = Seen.read(run)
    used = split or _default_split(held, seen, run)
    images = held.images(used)
    report_skipped(images)
    trained, chosen = seen.count(images) if seen else (None, None)
    _report_seen(images, trained, chosen)
    say_threads(model, len(images))
    with EvaluationBar(len(images), model.task.merit, err, images.noun) as bar:
        result = evaluate(model, images, batch_size=batch_size, workers=workers, watch=bar)
    if result.activation_per_unit:
        say_missed_rate(result.activation, model.target_rate, f"{used} {several(images.noun)}")
    clip = model.preprocessing.clip
    dense_macs = model.dense_macs * (1 if clip is None else clip.views)
    if json:
        report = {
            "run": str(run),
            "data": data,
            "split": used,
            "skipped": len(images.skipped),
            "trained_on": trained,
            "selected_on": chosen,
            **result.to_dict(),
            "dense_macs": dense_macs,
        }
        print_json(report | (_speed_figures(model, images, batch_size) if speed else dict.fromkeys(_SPEED_FIGURES)))
        return
    macs = result.macs or 0.0
    rows = [
        (result.merit, f"{result.score:.2%}"),
        *([("active patches", f"{result.activation:.1%}")] if result.activation_per_unit else []),
        (f"MACs per {'image' if clip is None else 'video'}", f"{millions(macs)} ({macs / dense_macs:.1%} of dense)"),
        *((f"active in {unit}", f"{rate:.1%}") for unit, rate in result.activation_per_unit.items()),
        *((f"tokens in {unit}", str(count)) for unit, count in result.tokens_per_unit.items()),
    ]
    which = (
        f"all {counted(result.images, images.noun)}"
        if used == "all"
        else counted(result.images, f"{used} {images.noun}")
    )
    print_table(f"{model.spec} on {which} of {data}", ("", ""), rows)
    if not speed:
        return
    found = _speed_figures(model, images, batch_size)
    out.print(
        f"{found['images_per_second']:.0f} {'image' if clip is None else 'clip'}s per second in batches of "
        f"{found['timed_batch']} ({found['speedup']:.2f} x dense, half of the rounds {found['speedup_low']:.2f} to "
        f"{found['speedup_high']:.2f})",
        highlight=False,
        soft_wrap=True,
    )


_SPEED_FIGURES = (
    "images_per_second",
    "dense_images_per_second",
    "speedup",
    "speedup_low",
    "speedup_high",
    "timed_batch",
)


def _speed_figures(model: TunedModel, images: LabelledImages, batch_size: int) -> dict[str, float]:
    """The figures that are timed, on images spread over the data."""
    batch = spread_batch(images, model, batch_size)
    with err.status("timing it beside the dense backbone"):
        speeds = compare_speed({model.spec: model}, batch)
    own, dense = speeds[model.spec], speeds[DENSE]
    timed = (own.images_per_second, dense.images_per_second, own.speedup, own.speedup_low, own.speedup_high, len(batch))
    return dict(zip(_SPEED_FIGURES, timed, strict=True))


def _default_split(held: Held, seen: Seen | None, run: Path) -> str:
    """Which images are evaluated on if nobody says so, and where that is not the test split, a line that says it.

    Raises:
        DataError: there is no test split, or it cannot be told which images are new to the run.
    """
    if not held.plain:
        if "test" in held.splits or len(held.splits) > 1:
            return "test"
        (only,) = held.splits
        err.print(f"{held.name} has the {only} split alone: evaluating on that", soft_wrap=True)
        return only
    everything = held.all
    items = f"{everything.noun}s"
    if seen is None and (run / ASKED).is_file():
        raise DataError(
            f"{run} is a run of a version that did not remember which {items} it was trained on, and {held.name} does "
            "not say by its folders which are for testing. Give --split all to evaluate on all of them, those of its "
            "training among them if it was trained on this folder, or give a folder with test/ in it."
        )
    trained, chosen = seen.count(everything) if seen else (None, None)
    if trained or chosen:
        return "test"
    why = (
        f"was not trained on any {everything.noun} of it"
        if trained == 0
        else f"does not say which {items} it was trained on"
    )
    count = counted(len(everything), everything.noun)
    one_or_all = count if len(everything) == 1 else f"all {count}"
    err.print(f"{held.name} has no splits, and {run} {why}: evaluating on {one_or_all}", soft_wrap=True)
    return "all"


def _report_seen(images: LabelledImages, trained: int | None, chosen: int | None) -> None:
    """Says how many of the images the run has seen before."""
    items = f"{images.noun}s"
    if trained is None or chosen is None:
        err.print(f"which of the {items} the run was trained on is not known: it does not say", soft_wrap=True)
        return
    given = counted(len(images), images.noun)
    told = f"of the {given}, the run was trained on {trained}, and its epoch was chosen on {chosen}"
    better = f": its figures are better than they are on new {items}" if trained or chosen else ""
    err.print(told + better, soft_wrap=True)
