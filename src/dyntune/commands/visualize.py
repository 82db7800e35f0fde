"""``dyntune visualize``: which tokens a model computes, merges and drops on images, and how many in each block."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from dyntune.commands.common import (
    DeviceOption,
    ImagesArgument,
    RateOption,
    RunArgument,
    TopPolicyOption,
    WeightsOption,
    apply_rate,
    err,
    out,
    pick_device,
)
from dyntune.core.errors import DyntuneError
from dyntune.data import Preprocessing, build_transform, expand_images, load_data, read_image
from dyntune.data.videos import Video, expand_videos
from dyntune.model.forward import activation_rates
from dyntune.model.load import load
from dyntune.model.tuned import TunedModel
from dyntune.studies.pictures import (
    activation_figure,
    by_slices,
    frames_animation,
    frames_figure,
    reduction_figure,
    save_figure,
    token_figure,
)
from dyntune.training.evaluate import evaluate

EXAMPLES = (
    'dyntune visualize runs/flowers "photos/*.jpg" --out pictures',
    "dyntune visualize runs/clips film.mp4 --out pictures",
    "dyntune visualize runs/flowers photo.jpg --rates-on folder:flowers --rates-on digits --out pictures",
)


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
    per_figure: Annotated[int, typer.Option(min=1, help="Images in one picture.")] = 6,
    suffix: Annotated[str, typer.Option("--format", help="png, svg or pdf.")] = "png",
    device: DeviceOption = "auto",
) -> None:
    """Draw over images, or frames of videos, which tokens each block computes, merges or drops, and how many."""
    model = load(run, weights=weights, device=pick_device(device), policy=policy)
    apply_rate(model, rate, policy)
    clip = model.preprocessing.clip
    paths = expand_images(images) if clip is None else expand_videos(images)
    if not model.policies:
        raise DyntuneError(
            f"{model.spec} in {run} has no token policy: every token is computed, so there is nothing to show."
        )
    if clip is not None:
        per_figure = 1  # each frame is a picture
    rates = []
    for start in range(0, len(paths), per_figure):
        chosen = paths[start : start + per_figure]
        names = [path.name for path in chosen]
        if clip is None:
            pictures = [read_image(path) for path in chosen]
            batch = torch.stack([build_transform(model.preprocessing)(picture) for picture in pictures])
        else:
            batch = build_transform(model.preprocessing)(Video(chosen[0])).unsqueeze(0)
            pictures = _seen(batch[0], model.preprocessing)
            names = [f"frame {number}" for number in range(len(pictures))]
        with torch.inference_mode():
            output = model.run(batch.to(next(model.parameters()).device))
        number, gates, grid = start // per_figure + 1, output.gates, output.grid
        slices = model.backbone.slices
        if slices > 1:  # tokens of the whole clip, each of several frames, of which the first stands for all
            pictures = pictures[:: len(pictures) // slices]
            gates, grid = tuple(by_slices(gates, slices)), (grid[0] // slices, grid[1])
        if output.gates:
            rates.append(len(chosen) * activation_rates(output.gates).cpu())
            if clip is None:
                _write(token_figure(pictures, gates, grid, names), folder / f"tokens-{number}.{suffix}")
            else:
                _write(frames_figure(pictures, gates, grid), folder / f"tokens-{number}.{suffix}")
                film = frames_animation(pictures, gates, grid, folder / f"tokens-{number}.gif")
                out.print(f"wrote {film}", highlight=False)
        if output.reductions:
            if slices > 1:
                pictures = [Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures]))]
                names = ["frames from top to bottom"]
            _write(reduction_figure(pictures, output, names), folder / f"reductions-{number}.{suffix}")
        if not output.gates and not output.reductions:
            raise DyntuneError(f"{model.spec} in {run} skips, merges and drops no token, so there is nothing to show.")
    if rates:
        mean = (torch.stack(rates).sum(0) / len(paths)).tolist()
        rate_of = {model.spec: list(zip((gate.unit for gate in output.gates), mean, strict=True))}
        _write(activation_figure(rate_of, {model.spec: model.target_rate}), folder / f"activation.{suffix}")
    if rates_on:
        _write(_rates_on(model, rates_on), folder / f"activation-data.{suffix}")


def _rates_on(model: TunedModel, names: list[str]) -> Figure:
    """The activation rate per block on several data sets."""
    rates = {}
    for name in names:
        splits = load_data(name)
        images = splits.test or splits.val or splits.train
        with err.status(f"running on {len(images)} images of {name}"):
            rates[name] = list(evaluate(model, images, count_macs=False).activation_per_unit.items())
    return activation_figure(rates, dict.fromkeys(names, model.target_rate))


def _seen(clip: Tensor, preprocessing: Preprocessing) -> list[Image.Image]:
    """The frames of a clip ``(T, 3, H, W)`` as they were before normalisation."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    pixels = ((clip * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in pixels]


def _write(figure: Figure, file: Path) -> None:
    save_figure(figure, file)
    out.print(f"wrote {file}", highlight=False)
