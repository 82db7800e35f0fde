"""``dyntune visualize``: which tokens a model computes, merges and drops on images, and how many in each block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from dyntune.commands.common import (
    DeviceOption,
    ImagesArgument,
    RateOption,
    RunArgument,
    TopPolicyOption,
    WeightsOption,
    apply_rate,
    pick_device,
)
from dyntune.commands.console import err, out
from dyntune.commands.pictures import Pictures
from dyntune.core.errors import DyntuneError, SpecError
from dyntune.core.texts import listed, printable
from dyntune.core.words import counted
from dyntune.data import build_transform
from dyntune.data.images import require_some
from dyntune.data.load import load_held
from dyntune.data.transforms import preprocessed
from dyntune.model.activation import MeanActivation
from dyntune.model.load import load
from dyntune.model.tuned import TunedModel
from dyntune.parts.policies.base import Gate
from dyntune.studies import pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLES = (
    'dyntune visualize runs/flowers "photos/*.jpg" --out pictures',
    "dyntune visualize runs/clips film.mp4 --out pictures --animation mp4 --blocks 0,5,11",
    "dyntune visualize runs/flowers photo.jpg --rates-on folder:flowers --rates-on digits --out pictures",
)

Film = Literal["gif", "mp4"]
_BATCH = 64
"""Images per forward pass of a whole data set."""


def command(
    run: RunArgument,
    images: ImagesArgument,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")],
    policy: TopPolicyOption = None,
    rate: RateOption = None,
    weights: WeightsOption = None,
    rates_on: Annotated[
        list[str] | None,
        typer.Option(
            help="Data whose test images' activation rates are drawn in one plot; may be given several times."
        ),
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option(
            help="Blocks whose computed tokens are drawn, 0,5,11 or all; by itself all of images, and four in the "
            "strip of a video's frames."
        ),
    ] = None,
    per_figure: Annotated[int, typer.Option(min=1, help="Images in one picture.")] = 6,
    suffix: Annotated[str, typer.Option("--format", help="png, svg or pdf.")] = "png",
    animation: Annotated[Film, typer.Option(help="Of videos: the file that shows one frame after the other.")] = "gif",
    device: DeviceOption = "auto",
) -> None:
    """Draw over images, or frames of videos, which tokens each block computes, merges or drops, and how many."""
    require_some(images)
    suffix = suffix.removeprefix(".")
    asked = _numbers(blocks)
    model = load(run, weights=weights, device=pick_device(device), policy=policy)
    apply_rate(model, rate, policy)
    clip = model.preprocessing.clip
    found = Pictures(images, videos=clip is not None)
    if not model.policies:
        raise DyntuneError(
            f"{model.spec} in {run} has no token policy: every token is computed, so there is nothing to show."
        )
    if clip is not None:
        per_figure = 1  # each frame is a picture
    transform = build_transform(model.preprocessing)

    def prepare(given: Any) -> tuple[list[Image.Image], Tensor]:
        """The pictures to draw on, and what the model is given."""
        tensor = transform(given)
        return ([given] if clip is None else []), tensor

    there = _drawn(folder, suffix)
    active = MeanActivation()
    for number, read in enumerate(found.batches(per_figure, prepare), 1):
        names = [path.name for path, _ in read]
        shown = [picture for _, (drawn_on, _) in read for picture in drawn_on]
        with torch.inference_mode():
            output = model.run(torch.stack([tensor for _, (_, tensor) in read]).to(next(model.parameters()).device))
        gates, grid, slices = list(output.gates), output.grid, model.backbone.slices
        if clip is not None:
            ((_, (_, frames)),) = read
            shown, gates, grid = pictures.of_clip(frames, model.preprocessing, output, slices)
            names = [f"frame {number}" for number in range(len(shown))]
        if asked is not None or output.gates:
            drawn = pictures.gated_blocks(gates, asked)
            active.add(output.gates, len(read))
            file = folder / f"tokens-{number}.{suffix}"
            if clip is None:
                _write(pictures.token_figure(shown, gates, grid, names, blocks=drawn), file, there, drawn, gates)
            else:
                strip = pictures.strip_blocks(gates) if blocks is None else drawn
                of = read[0][0].name
                _write(pictures.frames_figure(shown, gates, grid, strip), file, there, strip, gates, of)
                film = pictures.frames_animation(shown, gates, grid, file.with_suffix(f".{animation}"), blocks=drawn)
                _say_written(film, there, drawn, gates, of)
        if output.reductions:
            if slices > 1:
                shown = [Image.fromarray(np.concatenate([np.asarray(picture) for picture in shown]))]
                names = ["frames from top to bottom"]
            _write(pictures.reduction_figure(shown, output, names), folder / f"reductions-{number}.{suffix}", there)
        if not output.gates and not output.reductions:
            raise DyntuneError(f"{model.spec} in {run} skips, merges and drops no token, so there is nothing to show.")
    if active.per_unit:
        _write(
            pictures.activation_figure({model.spec: list(active.per_unit.items())}, {model.spec: model.target_rate}),
            folder / f"activation.{suffix}",
            there,
        )
    if rates_on:
        _write(_rates_on(model, rates_on), folder / f"activation-data.{suffix}", there)
    if there:
        kept = listed(sorted(path.name for path in there))
        err.print(f"of an earlier call, {folder} still has {kept}", highlight=False, soft_wrap=True)
    found.finish()


def _rates_on(model: TunedModel, names: list[str]) -> Figure:
    """The activation rate per block on several data sets, whose labels do not matter."""
    rates = {}
    for name in names:
        splits = load_held(name).splits
        images = next(splits[split] for split in ("test", "val", "train") if split in splits)
        active = MeanActivation()
        with err.status(f"running on {counted(len(images), images.noun)} of {printable(name)}"), torch.inference_mode():
            for batch, _ in DataLoader(preprocessed(images, model.preprocessing), _BATCH):
                active.add(model.run(batch.to(next(model.parameters()).device)).gates, len(batch))
        if not active.per_unit:
            raise DyntuneError(f"{model.spec} has no gates, so that there are no activation rates for --rates-on.")
        rates[name] = list(active.per_unit.items())
    return pictures.activation_figure(rates, dict.fromkeys(names, model.target_rate))


def _drawn(folder: Path, suffix: str) -> set[Path]:
    """The pictures that an earlier call has left in a folder."""
    kinds = [f"{name}.{suffix}" for name in ("tokens-*", "reductions-*", "activation*")]
    kinds += [f"tokens-*.{film}" for film in get_args(Film)]
    return {path for kind in kinds for path in folder.glob(kind)}


def _numbers(blocks: str | None) -> list[int] | None:
    """The numbers of blocks that ``--blocks`` gives; None for all."""
    if blocks in (None, "all"):
        return None
    numbers = [piece.strip() for piece in str(blocks).split(",")]
    if not all(piece.isdecimal() for piece in numbers):
        raise SpecError(f"--blocks {blocks!r}: expected numbers of blocks separated by commas, such as 0,5,11, or all.")
    return [int(piece) for piece in numbers]


def _write(
    figure: Figure, file: Path, there: set[Path], drawn: Sequence[int] = (), gates: Sequence[Gate] = (), of: str = ""
) -> None:
    pictures.save_figure(figure, file)
    _say_written(file, there, drawn, gates, of)


def _say_written(file: Path, there: set[Path], drawn: Sequence[int], gates: Sequence[Gate], of: str) -> None:
    """Says that a picture was written, and whether in the place of one that was there, which it is no more.

    Args:
        file: the picture.
        there: pictures of an earlier call.
        drawn: numbers of the blocks that it shows.
        gates: that it shows; none where it shows no blocks.
        of: name of the video, which is not in the picture.
    """
    replaced = ", in the place of an earlier one" if file in there else ""
    there.discard(file)
    some = pictures.blocks_in_words(drawn, gates) if gates else ""
    blocks = f", {some} (--blocks all for every one)" if some else ""
    film = f" of {printable(of)}" if of else ""
    out.print(f"wrote {printable(str(file))}{film}{replaced}{blocks}", highlight=False, soft_wrap=True)
