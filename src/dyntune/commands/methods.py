"""``dyntune methods``: what there is, where it comes from, and what it costs on ViT-B/16."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import torch
import typer

from dyntune.backbones.source import create_backbone
from dyntune.commands.common import JsonOption, err, millions, out, print_json, print_table
from dyntune.cost import cost
from dyntune.methods.base import TuningMethod
from dyntune.presets.base import Preset
from dyntune.registry import lookup, registered
from dyntune.spec import Part
from dyntune.tuned import tune

EXAMPLES = ("dyntune methods", "dyntune methods dyt", "dyntune methods --json")
REFERENCE_MODEL = "vit_base_patch16_224"


def command(
    name: Annotated[str | None, typer.Argument(help="Show the options of this one.")] = None, json: JsonOption = False
) -> None:
    """Tuning methods and token policies: name, source, and cost on ViT-B/16 with default options."""
    if name is not None:
        part = lookup(name)
        _show_options(part) if not json else print_json(_options(part))
        return
    with err.status("counting"):
        rows = [_row(part) for part in registered().values()]
    if json:
        print_json(rows)
        return
    print_table(
        f"Methods and token policies, costs on {REFERENCE_MODEL} without head",
        ("name", "kind", "trained parameters", "MACs", "source"),
        [(r["name"], r["kind"], f"{r['trainable_params']:,}", millions(r["macs"]), r["source"]) for r in rows],
    )
    out.print("Options of one: dyntune methods NAME", highlight=False)


def _row(part: type[Part]) -> dict[str, Any]:
    with torch.device("meta"):
        figures = cost(tune(create_backbone(REFERENCE_MODEL, pretrained=False, num_classes=0), part()))
    kind = "preset" if issubclass(part, Preset) else "method" if issubclass(part, TuningMethod) else "tokens"
    return {
        "name": part.name(),
        "kind": kind,
        "summary": part.summary(),
        "trainable_params": figures.trainable_params,
        "macs": figures.macs,
        "source": part.source,
    }


def _options(part: type[Part]) -> dict[str, Any]:
    defaults = {field.name: field.default for field in dataclasses.fields(part)}
    texts = part.options()
    options = [{"name": key, "default": value, "help": texts[key]} for key, value in defaults.items()]
    return {"name": part.name(), "summary": part.summary(), "source": part.source, "options": options}


def _show_options(part: type[Part]) -> None:
    described = _options(part)
    out.print(
        f"[bold]{described['name']}[/bold]: {described['summary']}\nSource: {described['source']}", highlight=False
    )
    rows = [(option["name"], str(option["default"]), option["help"]) for option in described["options"]]
    if rows:
        print_table("", ("option", "default", "what it does"), rows)
