"""The attention operator beside its parts, in exported models whose gates let half of the patches into attention.

    python benchmarks/attention.py --out benchmarks/results/attention

Weights are random; each file runs in a process of its own, all in turns.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from deploy import BOTH, tuned
from torch import Tensor

from dyntune.inference.export.bundle import Export
from dyntune.inference.export.candidate import Candidate
from dyntune.inference.export.registry import configured
from dyntune.studies.report import machine
from dyntune.training.throughput import Turns, time_in_turns

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


def measure(options: argparse.Namespace, batch_size: int, room: Path) -> list[dict]:
    """A row for each file: its images per second, and those over the one with the operator."""
    images = torch.randn(batch_size, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    model = tuned(options.model, BOTH, images)
    exports = {OPERATOR: Export(model)}
    exports[OLD] = exports[OPERATOR]
    with patch("torch.nn.functional.scaled_dot_product_attention", written_out):
        exports[PARTS] = Export(model)
    batch = room / f"images{batch_size}.npy"
    np.save(batch, images.numpy())
    with ExitStack() as stack, torch.inference_mode():
        running = {}
        for name, (runtime, form) in FILES.items():
            folder = room / f"{name.replace(', ', '-').replace(' ', '-')}-{batch_size}"
            with torch.inference_mode(False):
                exports[form].write(folder, configured(runtime, {"opset": 18} if form == OLD else {}))
            running[name] = stack.enter_context(Candidate(folder, batch, options.threads))
        turns = time_in_turns(running, images, rounds=options.rounds, seconds=options.seconds)
    return [described(name, turns, batch_size) for name in running]


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    for batch_size in options.batch_size:
        with tempfile.TemporaryDirectory() as room:
            rows += measure(options, batch_size, Path(room))
        result = {"model": options.model, "machine": machine(), "threads": options.threads, "rounds": options.rounds}
        result |= {"measured": time.strftime("%Y-%m-%d"), "rows": rows}
        (options.out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
        (options.out / "table.md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
