"""``dyntune visualize``: which tokens a model activates on images, and how many in each block."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from dyntune.checkpoint import load
from dyntune.commands.common import DeviceOption, ImagesArgument, RunArgument, WeightsOption, out, pick_device
from dyntune.data import build_transform, expand_images, read_image
from dyntune.errors import DyntuneError
from dyntune.forward import activation_rates
from dyntune.visualize import activation_figure, save_figure, token_figure

EXAMPLES = ('dyntune visualize runs/flowers "photos/*.jpg" --out pictures',)


def command(
    run: RunArgument,
    images: ImagesArgument,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")],
    weights: WeightsOption = None,
    per_figure: Annotated[int, typer.Option(min=1, help="Images in one picture.")] = 6,
    suffix: Annotated[str, typer.Option("--format", help="png, svg or pdf.")] = "png",
    device: DeviceOption = "auto",
) -> None:
    """Draw the activated tokens of each block over the images, and the activation rate per block."""
    paths = expand_images(images)
    model = load(run, weights=weights, device=pick_device(device))
    if not model.policies:
        raise DyntuneError(
            f"{model.spec} in {run} has no token policy: every token is computed, so there is nothing to show."
        )
    transform = build_transform(model.preprocessing)
    rates = []
    for start in range(0, len(paths), per_figure):
        chosen = paths[start : start + per_figure]
        pictures = [read_image(path) for path in chosen]
        batch = torch.stack([transform(picture) for picture in pictures]).to(next(model.parameters()).device)
        with torch.inference_mode():
            output = model.run(batch)
        rates.append(len(chosen) * activation_rates(output.gates).cpu())
        file = folder / f"tokens-{start // per_figure + 1}.{suffix}"
        save_figure(token_figure(pictures, output.gates, output.grid, [path.name for path in chosen]), file)
        out.print(f"wrote {file}", highlight=False)
    mean = (torch.stack(rates).sum(0) / len(paths)).tolist()
    units = [gate.unit for gate in output.gates]
    file = folder / f"activation.{suffix}"
    rate_of = {model.spec: list(zip(units, mean, strict=True))}
    save_figure(activation_figure(rate_of, {model.spec: model.target_rate}), file)
    out.print(f"wrote {file}", highlight=False)
