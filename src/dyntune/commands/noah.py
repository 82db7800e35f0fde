"""``dyntune noah``: find the sizes of prompts, low-rank updates and adapters for a data set, and train them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dyntune.commands.common import (
    DEFAULT_MODEL,
    DataArgument,
    JsonOption,
    ModelOption,
    WeightsOption,
    kilobytes,
    out,
    print_json,
    report_skipped,
)
from dyntune.core.errors import DataError, SpecError
from dyntune.data import load_data
from dyntune.data.datasets import JoinedImages
from dyntune.model.cost import cost
from dyntune.model.tuned import TunedModel, build_tuned
from dyntune.parts.methods.noah import Noah
from dyntune.parts.registry import resolve
from dyntune.studies.noah import SearchSettings, train_noah
from dyntune.studies.noah.progress import SearchBar
from dyntune.training.inputs import Interpolation, Normalisation, prepared_as
from dyntune.training.progress import ProgressBar
from dyntune.training.settings import Device, Precision, TrainSettings

EXAMPLES = (
    "dyntune noah digits --out runs/noah --supernet-epochs 20 --epochs 20 --population 20 --generations 5",
    "dyntune noah vtab:vtab-1k/cifar --model vit_base_patch16_224.orig_in21k --limit 0.64 --out runs/cifar",
)
_DEFAULTS = TrainSettings()
_SEARCH = SearchSettings()


def command(
    data: DataArgument,
    run: Annotated[Path, typer.Option("--out", help="Folder for the supernet, the search and the adapter.")],
    limit: Annotated[float, typer.Option(help="Most trained parameters, in millions, without the head.")] = 0.64,
    least: Annotated[float, typer.Option(help="Fewest trained parameters, in millions.")] = _SEARCH.least,
    count: Annotated[
        Literal["stored", "published"],
        typer.Option(help="What the limits count: what is trained, or what the public code counts."),
    ] = _SEARCH.count,
    method: Annotated[
        str, typer.Option(help="noah with its options but the sizes, such as noah:choices=1/5.")
    ] = "noah",
    model: ModelOption = DEFAULT_MODEL,
    weights: WeightsOption = None,
    supernet_epochs: Annotated[int, typer.Option(min=1, help="Passes of the supernet over the training images.")] = 500,
    supernet_lr: Annotated[float, typer.Option(help="Peak learning rate of the supernet.")] = 5e-4,
    epochs: Annotated[int, typer.Option(min=1, help="Passes of what was found over all images.")] = 100,
    lr: Annotated[float, typer.Option(help="Its peak learning rate.")] = _DEFAULTS.lr,
    population: Annotated[int, typer.Option(min=1, help="Candidates of a generation.")] = _SEARCH.population,
    generations: Annotated[int, typer.Option(min=1, help="The first of them is random.")] = _SEARCH.generations,
    parents: Annotated[int, typer.Option(min=1, help="Best candidates that have children.")] = _SEARCH.parents,
    mutations: Annotated[
        int | None, typer.Option(min=0, help="Children of one parent per generation; half of them by default.")
    ] = None,
    crossovers: Annotated[
        int | None, typer.Option(min=0, help="Children of two parents per generation; half of them by default.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step.")] = _DEFAULTS.batch_size,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.")] = _DEFAULTS.weight_decay,
    decay_1d: Annotated[bool, typer.Option(help="Weight decay on biases and other 1-D tensors too.")] = False,
    drop_path: Annotated[float, typer.Option(min=0, max=0.99, help="Stochastic depth rate of the backbone.")] = 0.1,
    precision: Annotated[Precision, typer.Option(help="Of the trainings.")] = "fp32",
    device: Annotated[Device, typer.Option(help="auto takes an accelerator if there is one.")] = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Decides the order of images and every random number.")] = 0,
    normalisation: Annotated[
        Normalisation, typer.Option(help="Of the pixels: the backbone's own, 0.5/0.5, ImageNet's statistics, or none.")
    ] = "backbone",
    interpolation: Annotated[Interpolation, typer.Option(help="How images are resized.")] = "backbone",
    val_fraction: Annotated[
        float, typer.Option(help="Split off the training images where there is no validation split.")
    ] = 0.2,
    on_corrupt: Annotated[
        Literal["error", "skip"], typer.Option(help="What to do with images that cannot be read.")
    ] = "error",
    json: JsonOption = False,
) -> None:
    """Train a supernet, search it under a limit of parameters, and train what was found; the same command goes on."""
    parts = resolve([method])
    supernets = [part for part in parts if isinstance(part, Noah) and not part.searched]
    if len(supernets) != 1:
        raise SpecError(
            f"--method {method}: expected noah without sizes, alone or joined by + with other parts. "
            "Train a part that has sizes with dyntune train."
        )
    search = SearchSettings(
        limit=limit,
        least=least,
        population=population,
        generations=generations,
        parents=parents,
        mutations=population // 2 if mutations is None else mutations,
        crossovers=population // 2 if crossovers is None else crossovers,
        count=count,
    )
    settings = TrainSettings(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        min_lr=min(_DEFAULTS.min_lr, lr),
        weight_decay=weight_decay,
        decay_1d=decay_1d,
        precision=precision,
        device=device,
        workers=workers,
        seed=seed,
        select="last",
    )
    splits = load_data(data, val_fraction=val_fraction, on_corrupt=on_corrupt)
    report_skipped(splits)
    if splits.val is None:
        raise DataError(f"{data} has no validation split, which the search needs.")

    def build(part: Noah) -> TunedModel:
        sized = [part if other is supernets[0] else other for other in parts]
        tuned = build_tuned(model, *sized, classes=splits.classes, weights=weights, drop_path_rate=drop_path)
        tuned.preprocessing = prepared_as(tuned.preprocessing, normalisation, interpolation)
        return tuned

    result = train_noah(
        supernets[0],
        build,
        splits.train,
        splits.val,
        JoinedImages([splits.train, splits.val]),
        run,
        settings,
        supernet_epochs=supernet_epochs,
        supernet_lr=supernet_lr,
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
    score = f"{result.best.accuracy:.1%} on val with the supernet's weights"
    out.print(
        f"found {figures.trainable_params / 1e6:.3f} M parameters, {score}: {run / 'search.png'}", highlight=False
    )
    out.print(f"saved epoch {result.fit.best_epoch} to {run} ({kilobytes(figures.adapter_bytes)})", highlight=False)
    out.print(f"its sizes: --method {spec}", highlight=False, soft_wrap=True)
    out.print(f"next: dyntune eval {run} {data}", highlight=False)
