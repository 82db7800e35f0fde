"""``dyntune predict``: the most probable classes of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dyntune.commands.common import (
    BatchOption,
    DeviceOption,
    ImagesArgument,
    JsonOption,
    RateOption,
    RunArgument,
    TopTokensOption,
    WeightsOption,
    apply_rate,
    pick_device,
    print_json,
    print_table,
)
from dyntune.core.errors import ExportError
from dyntune.data import build_transform, expand_images, read_image
from dyntune.inference.export.folder import OpenedModel, is_exported, open_export
from dyntune.inference.export.registry import registered
from dyntune.model.checkpoint import load
from dyntune.model.tuned import TunedModel

EXAMPLES = (
    "dyntune predict runs/flowers photo.jpg",
    'dyntune predict runs/flowers "photos/*.jpg" --top-k 3 --json',
    "dyntune predict flowers-onnx photo.jpg",
)
_CODE = " or ".join(Path(runtime.file).suffix for runtime in registered().values() if runtime.needs_trust)
"""Files that may run code when they are opened."""


def command(
    run: RunArgument,
    images: ImagesArgument,
    top_k: Annotated[int, typer.Option(min=1, help="Classes to show per image.")] = 5,
    tokens: TopTokensOption = None,
    rate: RateOption = None,
    weights: WeightsOption = None,
    batch_size: BatchOption = 32,
    device: DeviceOption = "auto",
    trust: Annotated[
        bool,
        typer.Option("--trust", help=f"Open an exported {_CODE} file, which may run code, from someone you trust."),
    ] = False,
    json: JsonOption = False,
) -> None:
    """The most probable classes of image files, folders of images, or globs, from a run or an exported model."""
    paths = expand_images(images)
    model = _model(run, weights=weights, device=device, tokens=tokens, rate=rate, trust=trust)
    predictions = [
        row for i in range(0, len(paths), batch_size) for row in predict(model, paths[i : i + batch_size], top_k)
    ]
    if json:
        print_json({"predictions": predictions})
        return
    rows = [(row["image"], *(f"{top['class']} {top['probability']:.1%}" for top in row["top"])) for row in predictions]
    print_table(
        f"{model.spec} from {run}", ("image", *(f"top {i + 1}" for i in range(len(predictions[0]["top"])))), rows
    )


def _model(
    run: Path, *, tokens: str | None, rate: float | None, weights: Path | None, device: str, trust: bool
) -> TunedModel | OpenedModel:
    """What is in the folder: a run, or a model that ``dyntune export`` wrote."""
    if not is_exported(run):
        model = load(run, tokens=tokens, weights=weights, device=pick_device(device))
        apply_rate(model, rate, tokens)
        return model
    if tokens is not None or rate is not None or weights is not None:
        raise ExportError(
            f"{run} is an exported model, whose weights, rate and token policy are fixed. Give --rate, --tokens or "
            "--weights to dyntune export, or give the run."
        )
    if device not in ("auto", "cpu"):
        raise ExportError(
            f"{run} is an exported model, which runs on the CPU; given --device {device}. Leave it out, or give the "
            "run."
        )
    return open_export(run, trust=trust)


@torch.inference_mode()
def predict(model: TunedModel | OpenedModel, paths: list[Path], top_k: int) -> list[dict[str, Any]]:
    """For each image file the ``top_k`` classes with their probabilities, the most probable first."""
    transform = build_transform(model.preprocessing)
    batch = torch.stack([transform(read_image(path)) for path in paths])
    logits = model(batch if isinstance(model, OpenedModel) else batch.to(next(model.parameters()).device))
    probabilities, labels = logits.softmax(-1).topk(min(top_k, logits.shape[-1]))
    names = model.classes
    return [
        {
            "image": str(path),
            "top": [
                {"class": names[label] if names else str(label), "label": label, "probability": probability}
                for probability, label in zip(ps, ls, strict=True)
            ],
        }
        for path, ps, ls in zip(paths, probabilities.tolist(), labels.tolist(), strict=True)
    ]
