"""The README.md that lies beside a saved adapter: what it is, what it scores, how to run it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dyntune.backbones.origin import BackboneSource
from dyntune.core.texts import for_markdown, for_markdown_code
from dyntune.core.words import counted
from dyntune.model.tasks import Classification


def model_card(config: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Markdown with the metadata that model hubs read.

    Args:
        config: what ``dyntune.json`` holds.
        tensors: the saved tensors.
    """
    recorded = config["backbone"]
    source = BackboneSource(recorded["name"], {}, recorded["weights"], recorded["published"])
    count = sum(t.numel() for t in tensors.values())
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    results = "".join(f"| {name} | {value} |\n" for name, value in sorted(config["results"].items()))
    classes = config["classes"]
    more = f" and {len(classes) - 20} more" if classes and len(classes) > 20 else ""
    shown = ", ".join(map(for_markdown, classes[:20])) + more if classes else ""
    metadata = [
        "---",
        "library_name: dyntune",
        *([f"base_model: {base}", "base_model_relation: adapter"] if (base := source.repository) else []),
        f"pipeline_tag: {config['task']}",
        "tags: [dyntune, parameter-efficient-fine-tuning, token-skipping]",
        "---",
    ]
    sections = [
        "\n".join(metadata),
        f"# {for_markdown_code(config['spec'])} on {for_markdown_code(source.title)}",
        f"An adapter made with Dyntune {config['dyntune_version']}: {counted(count, 'trained value')}, {size:,} bytes. "
        + _whose(source, recorded["complete"]),
        predicting(
            f'dyntune.load("path/to/this/folder"{_given(source, recorded)})  # in eval mode',
            clips="clip" in config["preprocessing"],
            classes=classes,
            task=config["task"],
        ),
    ]
    if results:
        sections.append(f"## Measured\n\n| figure | value |\n| --- | --- |\n{results}".rstrip())
    if shown:
        sections.append(f"## Classes\n\n{len(classes)}: {shown}")
    return "\n\n".join(sections) + "\n"


def predicting(load: str, *, clips: bool, classes: Sequence[str] | None, task: str) -> str:
    """Python, in Markdown, from a file to the name of its class; of tasks other than classification, to the outputs.

    Args:
        load: the expression that gives the model.
        clips: whether it takes clips of videos.
        classes: their names; None if they are not known.
        task: its name.
    """
    reader, file = ("Video", "film.mp4") if clips else ("read_image", "photo.jpg")
    lines = [
        "import dyntune",
        f"from dyntune.data import {', '.join(sorted((reader, 'build_transform'), key=str.lower))}",
        "",
        f"model = {load}",
        "transform = build_transform(model.preprocessing)",
        f'outputs = model(transform({reader}("{file}"))[None])',
    ]
    if task == Classification.name:
        best = "outputs.argmax()"
        lines.append(f"print(model.classes[{best}])" if classes else f"print(int({best}))")
    code = "\n".join(lines)
    return f"```python\n{code}\n```"


def _whose(source: BackboneSource, complete: bool) -> str:
    """Where the weights of the backbone are."""
    if complete:
        return "Every weight of the backbone is among them."
    if source.known and source.name is not None:
        return "The backbone is not in this folder; it is built from its name or from a local weight file."
    return (
        "The backbone is not in this folder, and nobody knows where to have its weights: who loads it gives it, "
        "`model` below."
    )


def _given(source: BackboneSource, recorded: dict[str, Any]) -> str:
    """What ``load`` must be given beside the folder."""
    return "" if source.name is not None and (source.known or recorded["complete"]) else ", backbone=model"
