"""``dyntune cost``: parameters, MACs and memory of a method on a backbone, without data or weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from dyntune.backbones.hosts import create_backbone
from dyntune.commands.clips import ClipOptions
from dyntune.commands.common import DEFAULT_MODEL, JsonOption, MethodOption, ModelOption, PolicyOption, parts
from dyntune.commands.console import err, out, print_json, print_table
from dyntune.commands.options import Options, with_options
from dyntune.core.shapes import shapes_only
from dyntune.core.words import kilobytes, millions
from dyntune.model.cost import Cost, cost
from dyntune.model.tune import tune
from dyntune.studies.table5 import CLASSES, MODEL, ROWS, SOURCE, WIDTHS

EXAMPLES = (
    "dyntune cost --model vit_base_patch16_224 --method dyt:rate=0.5",
    "dyntune cost --model vit_base_patch16_224 --method adaptformer --policy dispatch:where=mlp,rate=0.5 --json",
    "dyntune cost --model vit_base_patch16_224 --method adaptformer --policy tome:r=8 --per-block",
    "dyntune cost --model vit_base_patch16_224 --method dyt:bottleneck=64 --frames 8",
    "dyntune cost --table5",
)


@with_options
def command(
    context: typer.Context,
    *,
    model: ModelOption = DEFAULT_MODEL,
    method: MethodOption = "dyt",
    policy: PolicyOption = None,
    classes: Annotated[
        int | None, typer.Option(min=0, help="Classes of the head; the backbone's own by default.")
    ] = None,
    img_size: Annotated[
        int | None, typer.Option(min=1, help="Image height and width in pixels; the backbone's own by default.")
    ] = None,
    clip: Annotated[ClipOptions, Options(ClipOptions, only=("frames", "temporal", "time"))],
    per_block: Annotated[
        bool, typer.Option("--per-block", help="Also tokens and MACs of every block. JSON always has them.")
    ] = False,
    table5: Annotated[
        bool,
        typer.Option(
            "--table5",
            help="Instead of one model, methods with token reduction on ViT-B/16: our count beside the figures of "
            "Table 5 of the DyT paper. No other option but --json goes with it.",
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Parameters, MACs per image, largest activation and adapter size. Dispatchers count at their target rate."""
    if table5:
        given = [name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"]  # type: ignore[union-attr]
        if set(given) - {"table5", "json"}:
            raise typer.BadParameter("--table5 has its own models and methods; give no other option but --json.")
        _show_table5(json)
        return
    arguments: dict[str, Any] = {"num_classes": classes, "img_size": img_size}
    model, of_clips = clip.backbone(model)
    given_arguments = {key: value for key, value in arguments.items() if value is not None} | of_clips
    with shapes_only():
        tuned = tune(create_backbone(model, pretrained=False, **given_arguments), *parts(method, policy))
        figures = cost(tuned)
    figures = replace(figures, model=model, method=method, tokens=policy)  # as the user wrote them
    if json:
        print_json(figures.to_dict())
        return
    shape = " x ".join(map(str, figures.largest_activation_shape))
    one = "image" if tuned.preprocessing.clip is None else "clip"
    rows = [
        ("trained parameters, without head", f"{figures.trainable_params:,}"),
        ("head parameters", f"{figures.head_params:,}"),
        ("all parameters", f"{figures.total_params:,}"),
        (f"MACs per {one}, without head", f"{figures.macs:,} ({millions(figures.macs)})"),
        ("head MACs", f"{figures.head_macs:,}"),
        ("MACs of the untouched backbone", f"{figures.dense_macs:,} ({millions(figures.dense_macs)})"),
        ("share of the backbone's MACs", f"{figures.macs / figures.dense_macs:.1%}"),
        (
            f"largest activation of one {one}, fp32",
            f"{kilobytes(figures.largest_activation_bytes)} ({shape}, {figures.largest_activation_at})",
        ),
        ("adapter size", kilobytes(figures.adapter_bytes)),
    ]
    title = f"{figures.method}{f' + {figures.tokens}' if figures.tokens else ''} on {figures.model}"
    print_table(title, ("", ""), rows)
    if per_block:
        slices = tuned.backbone.slices
        _show_blocks(figures, one if one == "image" or slices > 1 else "clip, tokens of one of its frames")


def _show_blocks(figures: Cost, of: str) -> None:
    rows = [
        (
            block.block,
            _active(block.attention_active, block.attention_tokens),
            _active(block.mlp_active, block.mlp_tokens),
            f"{block.macs:,}",
            f"{block.macs / block.dense_macs:.1%}",
        )
        for block in figures.blocks
    ]
    print_table(
        f"Per {of}; a gate's expected tokens of those that are there",
        ("", "tokens in attention", "tokens in MLP", "MACs", "of the dense block's"),
        [
            ("embedding", "", "", f"{figures.embedding_macs:,}", ""),
            *rows,
            ("norm", "", "", f"{figures.norm_macs:,}", ""),
            ("total", "", "", f"{figures.macs:,}", f"{figures.macs / figures.dense_macs:.1%}"),
        ],
    )


def _active(active: float, tokens: int) -> str:
    return str(tokens) if active == tokens else f"{active:g} of {tokens}"


def _show_table5(json: bool) -> None:
    with err.status("counting"):
        rows = [row.to_dict() for row in ROWS]
    if json:
        print_json(rows)
        return
    print_table(
        f"Table 5 of the DyT paper: {MODEL}, {CLASSES} classes, costs without head, adapters of width "
        + " / ".join(map(str, WIDTHS)),
        ("name", "spec", "trained parameters", "MACs", "published"),
        [
            (
                row["name"],
                " + ".join(filter(None, (row["method"], row["tokens"]))),
                " / ".join(f"{counted['trainable_params'] / 1e6:.2f}" for counted in row["counted"]) + " M",
                " / ".join(f"{counted['macs'] / 1e9:.2f}" for counted in row["counted"]) + " G",
                f"{row['published']['params_m']:.2f} M / {row['published']['gmacs']:.2f} G",
            )
            for row in rows
        ],
    )
    out.print(f"published: parameters and MACs of {SOURCE}. Beside ours:", highlight=False)
    for row in rows:
        out.print(f"  {row['name']}: {row['note']}", highlight=False)
