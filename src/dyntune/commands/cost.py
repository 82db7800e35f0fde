"""``dyntune cost``: parameters and MACs of a method on a backbone, without data or weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import torch
import typer

from dyntune.backbones.source import create_backbone
from dyntune.commands.common import (
    DEFAULT_MODEL,
    JsonOption,
    MethodOption,
    ModelOption,
    TokensOption,
    kilobytes,
    millions,
    parts,
    print_json,
    print_table,
)
from dyntune.cost import cost
from dyntune.tuned import tune

EXAMPLES = (
    "dyntune cost --model vit_base_patch16_224 --method dyt:rate=0.5",
    "dyntune cost --model vit_base_patch16_224 --method adaptformer --tokens dispatch:where=mlp,rate=0.5 --json",
)


def command(
    model: ModelOption = DEFAULT_MODEL,
    method: MethodOption = "dyt",
    tokens: TokensOption = None,
    classes: Annotated[
        int | None, typer.Option(min=0, help="Classes of the head; the backbone's own by default.")
    ] = None,
    img_size: Annotated[int | None, typer.Option(min=1, help="Image height and width in pixels.")] = None,
    json: JsonOption = False,
) -> None:
    """Parameters, MACs per image and adapter size. Dispatchers count at their target rate."""
    arguments: dict[str, Any] = {"num_classes": classes, "img_size": img_size}
    given = {key: value for key, value in arguments.items() if value is not None}
    with torch.device("meta"):
        figures = cost(tune(create_backbone(model, pretrained=False, **given), *parts(method, tokens)))
    figures = replace(figures, model=model, method=method, tokens=tokens)  # as the user wrote them
    if json:
        print_json(figures.to_dict())
        return
    rows = [
        ("trained parameters, without head", f"{figures.trainable_params:,}"),
        ("head parameters", f"{figures.head_params:,}"),
        ("all parameters", f"{figures.total_params:,}"),
        ("MACs per image, without head", f"{figures.macs:,} ({millions(figures.macs)})"),
        ("head MACs", f"{figures.head_macs:,}"),
        ("MACs of the untouched backbone", f"{figures.dense_macs:,} ({millions(figures.dense_macs)})"),
        ("share of the backbone's MACs", f"{figures.macs / figures.dense_macs:.1%}"),
        ("adapter size", kilobytes(figures.adapter_bytes)),
    ]
    print_table(
        f"{figures.method}{f' + {figures.tokens}' if figures.tokens else ''} on {figures.model}", ("", ""), rows
    )
