"""``dyntune noah``: find the sizes of prompts, low-rank updates and adapters for a data set, and train them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from dyntune.commands.common import (
    DEFAULT_MODEL,
    VAL_FRACTION,
    DataArgument,
    DropPathOption,
    InterpolationOption,
    JsonOption,
    ModelOption,
    NormalisationOption,
    OnCorruptOption,
    ValFractionOption,
    WeightsOption,
    choose_threads,
    print_next_eval,
    report_classes,
    report_skipped,
    show_header,
    train_settings,
)
from dyntune.commands.console import out, print_json, space
from dyntune.commands.options import Options, with_options
from dyntune.core.errors import DataError, SpecError
from dyntune.core.words import counted, kilobytes
from dyntune.data import load_data
from dyntune.data.datasets import JoinedImages
from dyntune.model.cost import cost
from dyntune.model.tune import build_tuned
from dyntune.model.tuned import TunedModel
from dyntune.parts.methods.noah import Noah
from dyntune.parts.registry import resolve
from dyntune.studies.noah import SearchSettings, train_noah
from dyntune.studies.noah.pipeline import require_no_other_run
from dyntune.studies.noah.progress import SearchBar
from dyntune.training.header import outlines, training_header
from dyntune.training.inputs import with_pixels_as
from dyntune.training.progress import ProgressBar
from dyntune.training.settings import TrainSettings

EXAMPLES = (
    "dyntune noah digits --out runs/noah --supernet-epochs 20 --epochs 20 --population 20 --generations 5",
    "dyntune noah vtab:vtab-1k/cifar --model vit_base_patch16_224.orig_in21k --limit 0.64 --out runs/cifar",
)


@with_options
def command(
    data: DataArgument,
    run: Annotated[Path, typer.Option("--out", help="Folder for the supernet, the search and the adapter.")],
    *,
    method: Annotated[
        str, typer.Option(help="noah with its options but the sizes, such as noah:choices=1/5.")
    ] = "noah",
    model: ModelOption = DEFAULT_MODEL,
    weights: WeightsOption = None,
    search: Annotated[
        SearchSettings,
        Options(
            SearchSettings,
            only=("limit", "least", "count", "population", "generations", "parents", "mutations", "crossovers"),
            unset=dict.fromkeys(("mutations", "crossovers"), "half of the population"),
            make=SearchSettings.of_halves,
        ),
    ],
    supernet: Annotated[dict[str, Any], Options(train_noah, only=("supernet_epochs", "supernet_lr"), make=dict)],
    settings: Annotated[
        TrainSettings,
        Options(
            TrainSettings,
            only=("epochs", "lr", "batch_size", "weight_decay", "decay_1d", "precision", "device", "workers", "seed"),
            defaults={"epochs": 100, "decay_1d": False},
            helps={
                "epochs": "Passes of what was found over all images.",
                "lr": "Peak learning rate of what was found.",
            },
            make=functools.partial(train_settings, select="last"),
        ),
    ],
    drop_path: DropPathOption = 0.1,
    normalisation: NormalisationOption = "backbone",
    interpolation: InterpolationOption = "backbone",
    val_fraction: ValFractionOption = VAL_FRACTION,
    on_corrupt: OnCorruptOption = "error",
    json: JsonOption = False,
) -> None:
    """Train a supernet, search it under a limit of parameters, and train what was found.

    A run that was stopped goes on with the same command.
    """
    parts = resolve([method])
    supernets = [part for part in parts if isinstance(part, Noah) and not part.searched]
    if len(supernets) != 1:
        raise SpecError(
            f"--method {method}: expected noah without sizes, alone or joined by + with other parts. "
            "Train a part that has sizes with dyntune train."
        )
    require_no_other_run(run)
    splits = load_data(data, val_fraction=val_fraction, on_corrupt=on_corrupt)
    report_skipped(splits)
    if splits.val is None:
        raise DataError(f"{data} has no validation split, which the search needs.")

    def build(part: Noah) -> TunedModel:
        sized = [part if other is supernets[0] else other for other in parts]
        tuned = build_tuned(model, *sized, classes=splits.classes, weights=weights, drop_path_rate=drop_path)
        tuned.preprocessing = with_pixels_as(tuned.preprocessing, normalisation, interpolation)
        return tuned

    first = counted(supernet["supernet_epochs"], "epoch")
    show_header(
        training_header(
            outlines(model, [parts], classes=splits.classes, weights=weights),
            splits.train,
            splits.val,
            settings,
            test=splits.test,
            name=splits.name,
            threads=choose_threads(lambda: build(supernets[0]), settings, run),
            course=f"{first} of the supernet, {counted(search.population * search.generations, 'candidate')} at most, "
            f"{counted(settings.epochs, 'epoch')} of what was found, seed {settings.seed}",
        )
    )
    report_classes(splits)
    result = train_noah(
        supernets[0],
        build,
        splits.train,
        splits.val,
        JoinedImages([splits.train, splits.val]),
        run,
        settings,
        **supernet,
        search=search,
        progress=ProgressBar,
        search_progress=SearchBar,
    )
    assert result.best is not None  # the part had no sizes
    figures, spec = cost(result.model), result.model.spec
    if json:
        print_json(
            {
                "run": str(run),
                "spec": spec,
                "supernet_accuracy": result.best.accuracy,
                "skipped": len(splits.skipped),
                **figures.to_dict(),
            }
        )
        return
    space()
    score = f"{result.best.accuracy:.1%} on val with the supernet's weights"
    out.print(
        f"found {figures.trainable_params / 1e6:.3f} M parameters, {score}: {run / 'search.png'}", highlight=False
    )
    out.print(f"saved epoch {result.fit.best_epoch} to {run} ({kilobytes(figures.adapter_bytes)})", highlight=False)
    out.print(f"its sizes: --method {spec}", highlight=False, soft_wrap=True)
    print_next_eval(run, splits, val_fraction, on_corrupt)
