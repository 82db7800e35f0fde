"""``dyntune methods``: what there is, and what it costs on ViT-B/16 beside the published figures."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.padding import Padding
from rich.text import Text

from dyntune.backbones.hosts import create_backbone
from dyntune.commands.common import JsonOption
from dyntune.commands.console import err, out, print_json, print_table
from dyntune.core.shapes import shapes_only
from dyntune.core.words import millions
from dyntune.model.cost import cost
from dyntune.model.tune import tune
from dyntune.parts.methods.base import TuningMethod
from dyntune.parts.presets.base import Preset
from dyntune.parts.registry import lookup, registered, resolve
from dyntune.parts.spec import Part, format_value
from dyntune.studies.vtab.published import MODEL, SOURCE, published_row, published_specs

EXAMPLES = ("dyntune methods", "dyntune methods dyt", "dyntune methods --json")


def command(
    name: Annotated[str | None, typer.Argument(help="Show the options of this one.")] = None, json: JsonOption = False
) -> None:
    """Tuning methods and token policies: source, and cost on ViT-B/16 beside what was published."""
    if name is not None:
        part = lookup(name)
        _show_options(part) if not json else print_json(_options(part))
        return
    specs = list(dict.fromkeys([*registered(), *published_specs()]))
    with err.status("counting"), _unsaid():
        rows = sorted((_row(spec) for spec in specs), key=lambda row: ("method", "preset", "tokens").index(row["kind"]))
    if json:
        print_json(rows)
        return
    print_table(
        f"Methods and token policies, costs on {MODEL} without head",
        ("name", "kind", "trained parameters", "MACs", "merged", "published", "source"),
        [
            (
                row["name"],
                row["kind"],
                f"{row['trainable_params']:,}",
                millions(row["macs"]),
                millions(row["merged_macs"]) if row["merges"] else "",
                _published(row["published"]),
                row["source"],
            )
            for row in rows
        ],
    )
    out.print("merged: MACs after merging, of those that merge completely.", highlight=False)
    out.print(f"published: parameters and MACs of {SOURCE}. Where they differ:", highlight=False)
    for row in rows:
        if row["published"] and row["published"]["note"]:
            out.print(f"  {row['name']}: {row['published']['note']}", highlight=False)
    out.print("Options of one: dyntune methods NAME", highlight=False)


@contextlib.contextmanager
def _unsaid() -> Iterator[None]:
    """Keeps to itself what parts have to say of the model that they are put on: here it is one of many."""
    logger = logging.getLogger("dyntune")
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = False


def _row(spec: str) -> dict[str, Any]:
    (part,) = resolve([spec])
    with shapes_only():
        model = tune(create_backbone(MODEL, pretrained=False, num_classes=0), part)
        figures = cost(model)
    kind = "preset" if isinstance(part, Preset) else "method" if isinstance(part, TuningMethod) else "tokens"
    published = published_row(spec)
    return {
        "name": spec,
        "kind": kind,
        "summary": part.summary(),
        "trainable_params": figures.trainable_params,
        "macs": figures.macs,
        "merges": model.folds,
        "merged_macs": figures.dense_macs if model.folds else figures.macs,
        "published": published
        and {
            "name": published.name,
            "params_m": published.params_m,
            "gmacs": published.gflops,
            "note": published.note,
        },
        "source": part.source,
    }


def _published(row: dict[str, Any] | None) -> str:
    return f"{row['params_m']:.2f} M / {row['gmacs']:.2f} G" if row else ""


def _options(part: type[Part]) -> dict[str, Any]:
    defaults = {field.name: field.default for field in dataclasses.fields(part)}
    texts = part.options()
    options = [{"name": key, "default": value, "help": texts[key].replace("``", "")} for key, value in defaults.items()]
    return {"name": part.name(), "summary": part.summary(), "source": part.source, "options": options}


def _show_options(part: type[Part]) -> None:
    described = _options(part)
    title = Text.assemble((described["name"], "bold"), f": {described['summary']}\nSource: {described['source']}")
    out.print(title)
    for option in described["options"]:
        default = format_value(option["default"]) or "(empty)"
        out.print(Text.assemble("\n  ", (option["name"], "bold"), f"={default}"))
        out.print(Padding(Text(option["help"]), (0, 0, 0, 6)))
