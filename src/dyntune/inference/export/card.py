"""The README.md that lies in an exported model's folder: what it is, how to run it, what a check has found."""

from typing import Any

from dyntune.core.texts import for_markdown_code
from dyntune.core.words import counted
from dyntune.inference.export.registry import lookup
from dyntune.inference.export.runtimes.base import FP32
from dyntune.model.card import predicting
from dyntune.model.tasks import Classification

_UNCHECKED = "**Its accuracy has not been checked.**"


def export_card(config: dict[str, Any]) -> str:
    """Markdown.

    Args:
        config: what ``deploy.json`` holds.
    """
    height, width = config["preprocessing"]["size"]
    clip = config["preprocessing"].get("clip")
    what = "Images" if clip is None else f"Clips of {counted(clip['frames'], 'frame')}"
    one, extra, sample = ("image", (), "photo.jpg") if clip is None else ("clip", ("av",), "film.mp4")
    classes, task = config["classes"], config.get("task", Classification.name)
    runtime = lookup(config["runtime"]).from_config(config)
    packages = " ".join((runtime.requirement(), "numpy", "pillow", *extra))
    trust = ", trust=True" if runtime.needs_trust else ""
    options = ", ".join(f"{name} {value}" for name, value in runtime.to_dict().items())
    written_in = f" ({options})" if options else ""
    sections = [
        f"# {for_markdown_code(config['spec'])} on {for_markdown_code(str(config['backbone']))}, "
        f"for {config['runtime']}{written_in}",
        f"Written by Dyntune {config['dyntune_version']}. {what} of {height} x {width} pixels"
        + (f", {counted(len(classes), 'class')}" if classes else "")
        + f"; {config['macs'] / 1e9:.3f} G MACs per {one} where {config['activation']:.0%} of the patches are active "
        f"({config['macs'] / config['dense_macs']:.0%} of the dense backbone).",
        f"```bash\npip install {packages}\npython run.py {sample}{' --top-k 3' * (task == Classification.name)}\n```",
        "Or with Dyntune:\n\n"
        + predicting(
            f'dyntune.open_export("path/to/this/folder"{trust})',
            clips=clip is not None,
            classes=classes,
            task=task,
        ),
    ]
    if config["precision"] != FP32:
        sections.append(
            f"{config['integer_products']} linear layers of the backbone compute in integers, with weights of "
            f"{config['weight_bits']} bits; gates, adapters and the head compute in fp32. "
            + " ".join(filter(None, (runtime.note(config), "" if config.get("check") else _UNCHECKED)))
        )
    if config.get("choice"):
        sections.append(f"## Why {config['runtime']}\n\n{config['choice']['reason']}")
    if config.get("check"):
        figures = {name: value for name, value in config["check"].items() if isinstance(value, int | float)}
        rows = "".join(f"| {name.replace('_', ' ')} | {value:.4g} |\n" for name, value in figures.items())
        sections.append(f"## Checked\n\n| figure | value |\n| --- | --- |\n{rows}".rstrip())
    return "\n\n".join(section.rstrip() for section in sections) + "\n"
