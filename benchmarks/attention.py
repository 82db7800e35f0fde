"""The attention operator beside its parts, in exported models whose gates let half of the patches into attention.

    python benchmarks/attention.py --out benchmarks/results/attention

Weights are random; each file runs in a process of its own, all in turns.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import torch
from deploy import BOTH, arguments, run, tuned
from torch import Tensor

from dyntune.core.timing import Turns, time_in_turns
from dyntune.inference.export.bundle import Export
from dyntune.inference.export.process import Candidate
from dyntune.inference.export.registry import configured

OPERATOR, PARTS, OLD = "one operator", "written out", "opset 18"
FILES = {
    f"onnx, {OPERATOR}": ("onnx", OPERATOR),
    f"onnx, {OLD}": ("onnx", OLD),
    f"onnx, {PARTS}": ("onnx", PARTS),
    f"openvino, {OPERATOR}": ("openvino", OPERATOR),
    f"openvino, {PARTS}": ("openvino", PARTS),
}
"""What is timed: the runtime, and how the file it reads states the attention."""


def written_out(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, dropout_p: float = 0.0) -> Tensor:
    """Attention as its parts, in place of PyTorch's function, from which exporters make one operator."""
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + attn_mask).softmax(-1) @ v


def measure(options: argparse.Namespace, images: Tensor, batch: Path, room: Path) -> list[dict]:
    """A row for each file: its images per second, and those over the one with the operator."""
    model = tuned(options.model, BOTH, images)
    exports = {OPERATOR: Export(model)}
    exports[OLD] = exports[OPERATOR]
    with patch("torch.nn.functional.scaled_dot_product_attention", written_out):
        exports[PARTS] = Export(model)
    with ExitStack() as stack, torch.inference_mode():
        running = {}
        for name, (runtime, form) in FILES.items():
            folder = room / name.replace(", ", "-").replace(" ", "-")
            with torch.inference_mode(False):
                exports[form].write(folder, configured(runtime, {"opset": 18} if form == OLD else {}))
            running[name] = stack.enter_context(Candidate(folder, batch, options.threads))
        turns = time_in_turns(running, images, rounds=options.rounds, seconds=options.seconds)
    return [described(name, turns, len(images)) for name in running]


def described(name: str, turns: dict[str, Turns], batch_size: int) -> dict:
    operator = f"{FILES[name][0]}, {OPERATOR}"
    return {
        "name": name,
        "batch_size": batch_size,
        "images_per_second": asdict(turns[name].images_per_second),
        "over_the_operator": asdict(turns[name].speedup(turns[operator])),
    }


def markdown(rows: list[dict]) -> str:
    lines = ["| batch | file | images/s | over the operator |", "| ---: | --- | ---: | ---: |"]
    for row in rows:
        over = row["over_the_operator"]
        speed = f"{row['images_per_second']['median']:.2f}"
        lines.append(
            f"| {row['batch_size']} | {row['name']} | {speed} "
            f"| {over['median']:.3f} [{over['low']:.3f} to {over['high']:.3f}] |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    run(arguments(__doc__, rounds=15, seconds=0.5).parse_args(), measure, markdown)


if __name__ == "__main__":
    main()
