"""The README.md that lies in a deployed model's folder: what it is, how to run it, what a check has found."""

from typing import Any

from dyntune.inference.export.runtimes.onnx import OPSET

_FIRST_READERS = {18: "1.15", 19: "1.15", 20: "1.17", 21: "1.18", 22: "1.21", 23: "1.23", 24: "1.24", 25: "1.24"}
"""The first ONNX Runtime that reads an opset, of those that Python 3.11 can install; each was tried."""
_BATCH = (
    "Activations are scaled by their range over the whole batch, so an image's logits depend a little on the images "
    "beside it; a batch of one, as in `run.py`, gives an image the same logits always. "
)


def deployment_card(config: dict[str, Any]) -> str:
    """Markdown.

    Args:
        config: what ``deploy.json`` holds.
    """
    height, width = config["preprocessing"]["size"]
    classes = config["classes"]
    trust = ", trust=True" if config["runtime"] == "torch" else ""
    opset = config.get("opset")
    written_in = f" (opset {opset})" if opset else ""
    sections = [
        f"# `{config['spec']}` on `{config['backbone']}`, for {config['runtime']}{written_in}",
        f"Written by Dyntune {config['dyntune_version']}. Images of {height} x {width} pixels"
        + (f", {len(classes)} classes" if classes else "")
        + f"; {config['macs'] / 1e9:.3f} G MACs per image where {config['activation']:.0%} of the patches are active "
        f"({config['macs'] / config['dense_macs']:.0%} of the dense backbone).",
        f"```bash\npip install {_package(config)} numpy pillow\npython run.py photo.jpg --top-k 3\n```",
        "Or with Dyntune:\n\n```python\nfrom dyntune.inference import open_runtime\n\n"
        f'model = open_runtime("path/to/this/folder"{trust})\nlogits = model(images)\n```',
    ]
    if config["precision"] == "int8":
        sections.append(
            f"{config['integer_products']} linear layers of the backbone compute in integers, with weights of "
            f"{config['weight_bits']} bits; gates, adapters and the head compute in fp32. "
            + (_BATCH if config["runtime"] == "onnx" else "")
            + ("" if config.get("check") else "**Its accuracy has not been checked.**")
        )
    if config.get("choice"):
        sections.append(f"## Why {config['runtime']}\n\n{config['choice']['reason']}")
    if config.get("check"):
        figures = {name: value for name, value in config["check"].items() if isinstance(value, int | float)}
        rows = "".join(f"| {name.replace('_', ' ')} | {value:.4g} |\n" for name, value in figures.items())
        sections.append(f"## Checked\n\n| figure | value |\n| --- | --- |\n{rows}".rstrip())
    return "\n\n".join(section.rstrip() for section in sections) + "\n"


def _package(config: dict[str, Any]) -> str:
    """What the runner needs, as pip takes it."""
    if config["runtime"] != "onnx":
        return str(config["runtime"])
    first = _FIRST_READERS.get(config.get("opset", OPSET))
    return f'"onnxruntime>={first}"' if first else "onnxruntime"
