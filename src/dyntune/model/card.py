"""The README.md that lies beside a saved adapter: what it is, what it scores, how to run it."""

from pathlib import Path
from typing import Any

from torch import Tensor

from dyntune.backbones.builtin import BUILTIN_BACKBONE
from dyntune.core.texts import for_markdown, for_markdown_code


def model_card(config: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Markdown with the metadata that model hubs read.

    Args:
        config: what ``dyntune.json`` holds.
        tensors: the saved tensors.
    """
    name = config["backbone"]["name"]
    backbone = name or "a custom model"
    count = sum(t.numel() for t in tensors.values())
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    results = "".join(f"| {name} | {value} |\n" for name, value in sorted(config["results"].items()))
    classes = config["classes"]
    more = f" and {len(classes) - 20} more" if classes and len(classes) > 20 else ""
    shown = ", ".join(map(for_markdown, classes[:20])) + more if classes else ""
    metadata = [
        "---",
        "library_name: dyntune",
        *([f"base_model: {base}", "base_model_relation: adapter"] if (base := _repository(name)) else []),
        f"pipeline_tag: {config['task']}",
        "tags: [dyntune, parameter-efficient-fine-tuning, token-skipping]",
        "---",
    ]
    sections = [
        "\n".join(metadata),
        f"# {for_markdown_code(config['spec'])} on {for_markdown_code(backbone)}",
        f"An adapter made with Dyntune {config['dyntune_version']}: {count:,} trained values, {size:,} bytes. "
        "The backbone is not in this folder; it is built from its name or from a local weight file.",
        '```python\nimport dyntune\n\nmodel = dyntune.load("path/to/this/folder")   # in eval mode\n'
        "logits = model(images)\n```",
    ]
    if results:
        sections.append(f"## Measured\n\n| figure | value |\n| --- | --- |\n{results}".rstrip())
    if shown:
        sections.append(f"## Classes\n\n{len(classes)}: {shown}")
    return "\n\n".join(sections) + "\n"


def _repository(name: str | None) -> str | None:
    """The repository on the hub that a backbone comes from, if it comes from one."""
    if name is None or name == BUILTIN_BACKBONE:
        return None
    library, colon, place = name.partition(":")
    if not colon:
        return f"timm/{name}"
    repository = library in ("hf", "hf-hub") and not Path(place).is_absolute()
    return place.partition("@")[0] if repository else None
