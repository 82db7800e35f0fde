"""``dyntune visualize``: which tokens a model computes, merges and drops on images, and how many in each block."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure

from dyntune.commands.common import (
    DeviceOption,
    ImagesArgument,
    Pictures,
    RateOption,
    RunArgument,
    TopPolicyOption,
    WeightsOption,
    apply_rate,
    out,
    pick_device,
)
from dyntune.core.errors import DyntuneError
from dyntune.core.texts import printable
from dyntune.data import build_transform
from dyntune.model.forward import activation_rates
from dyntune.model.load import load
from dyntune.studies.pictures import activation_figure, reduction_figure, save_figure, token_figure

EXAMPLES = ('dyntune visualize runs/flowers "photos/*.jpg" --out pictures',)


def command(
    run: RunArgument,
    images: ImagesArgument,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")],
    policy: TopPolicyOption = None,
    rate: RateOption = None,
    weights: WeightsOption = None,
    per_figure: Annotated[int, typer.Option(min=1, help="Images in one picture.")] = 6,
    suffix: Annotated[str, typer.Option("--format", help="png, svg or pdf.")] = "png",
    device: DeviceOption = "auto",
) -> None:
    """Draw over the images which tokens each block computes, merges or drops, and the activation rate per block."""
    found = Pictures(images)
    model = load(run, weights=weights, device=pick_device(device), policy=policy)
    apply_rate(model, rate, policy)
    if not model.policies:
        raise DyntuneError(
            f"{model.spec} in {run} has no token policy: every token is computed, so there is nothing to show."
        )
    transform = build_transform(model.preprocessing)
    rates = []
    for number, batch_of in enumerate(found.batches(per_figure), 1):
        names = [path.name for path, _ in batch_of]
        pictures = [picture for _, picture in batch_of]
        batch = torch.stack([transform(picture) for picture in pictures]).to(next(model.parameters()).device)
        with torch.inference_mode():
            output = model.run(batch)
        if output.gates:
            rates.append(len(pictures) * activation_rates(output.gates).cpu())
            _write(token_figure(pictures, output.gates, output.grid, names), folder / f"tokens-{number}.{suffix}")
        if output.reductions:
            _write(reduction_figure(pictures, output, names), folder / f"reductions-{number}.{suffix}")
        if not output.gates and not output.reductions:
            raise DyntuneError(f"{model.spec} in {run} skips, merges and drops no token, so there is nothing to show.")
    if rates:
        mean = (torch.stack(rates).sum(0) / found.read).tolist()
        rate_of = {model.spec: list(zip((gate.unit for gate in output.gates), mean, strict=True))}
        _write(activation_figure(rate_of, {model.spec: model.target_rate}), folder / f"activation.{suffix}")
    found.finish()


def _write(figure: Figure, file: Path) -> None:
    save_figure(figure, file)
    out.print(f"wrote {printable(str(file))}", highlight=False)
