"""What skipping costs before anything is trained for it, with surrogates of several ranks: images of ``real.py``.

    python benchmarks/real.py prepare OUT; python benchmarks/real.py run OUT
    python benchmarks/surrogate.py OUT

A linear probe of ``real.py run`` (seed 0) answers test images while a random half of the patches, another one in every
block, skips the MLP, or all patches skip it in the later half of the blocks. Surrogates are fitted to 32 training
images, as they are before the first step of a training. Writes OUT/results/surrogate.json and prints a table.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import dyntune
from dyntune.backbones.units import Unit
from dyntune.core.files import write_json
from dyntune.core.machine import machine
from dyntune.core.tokens import Tokens
from dyntune.data.transforms import build_transform
from dyntune.data.vtab import load_vtab_task
from dyntune.model.executions import Compact
from dyntune.parts.policies.base import Gate
from dyntune.parts.policies.gating import GatingPolicy
from dyntune.studies.vtab.plan import Job
from dyntune.studies.vtab.results import RESULT

TASKS = {"fashion_mnist": "Fashion-MNIST", "stamps": "Photographs"}
SHARES = (None, 0.005, 0.02, 0.04, 0.08, 1.0)
"""Ranks as shares of the width, as the option ``surrogate`` takes them."""


class Skipping(Compact):
    """Decides without gates: a random share of the patches goes through each of the units that it is told of."""

    def __init__(self, shares: dict[str, float]) -> None:
        self.shares = shares
        self.random = torch.Generator().manual_seed(0)

    def gated(self, unit: Unit, tokens: Tokens, policy: GatingPolicy) -> tuple[Tokens, Gate]:
        gate = policy.gate(unit, tokens)
        draws = torch.rand(gate.values.shape, generator=self.random)
        gate = replace(gate, values=(draws < self.shares.get(unit.path, 1.0)).to(gate.values.dtype))
        return tokens.with_x(self.computed(unit, tokens, gate)), gate


def fitted(out: Path, task: str, share: float | None, images: Tensor) -> dyntune.TunedModel:
    """The linear probe's backbone and head with dispatch, and surrogates that have seen ``images``."""
    folder = Job("linear", task, 0).folder(out / "runs")
    if not (folder / RESULT).exists():
        raise SystemExit(f"{folder} holds no finished training: python benchmarks/real.py run {out}")
    host = dyntune.load(folder / "run").merge()
    model = dyntune.tune(host, f"dispatch:surrogate={'none' if share is None else share}").train()
    model.begin_training(1, 1e-3)
    dyntune.training_loss(model, images, torch.zeros(len(images), dtype=torch.long), step=0)
    model.end_training()
    return model.eval()


@torch.inference_mode()
def accuracy(model: dyntune.TunedModel, images: Tensor, labels: Tensor, shares: dict[str, float]) -> float:
    execution = Skipping(shares)
    right = 0
    for batch, own in zip(images.split(50), labels.split(50), strict=True):
        right += int((model.run(batch, execution=execution).logits.argmax(-1) == own).sum())
    return 100 * right / len(images)


def measure(out: Path, task: str, count: int) -> list[dict]:
    data = load_vtab_task(out / "data" / task)
    test = data.test
    assert test is not None  # every task has one
    rows = []
    for share in SHARES:
        seen = build_transform(dyntune.load(Job("linear", task, 0).folder(out / "runs") / "run").preprocessing)
        model = fitted(out, task, share, torch.stack([seen(data.train.read(index)) for index in range(32)]))
        images = torch.stack([seen(test.read(index)) for index in range(count)])
        labels = torch.tensor([test.targets[index] for index in range(count)])
        blocks = model.backbone.blocks
        half = {block.mlp.path: 0.5 for block in blocks}
        later = {block.mlp.path: 0.0 for block in blocks[len(blocks) // 2 :]}
        stand_in = blocks[0].mlp.surrogate
        row = {"task": task, "share": share, "rank": 0 if stand_in is None else len(stand_in.down)}
        row |= {name: accuracy(model, images, labels, own) for name, own in (("half", half), ("later", later))}
        row["dense"] = accuracy(model, images, labels, {})
        rows.append(row)
        print(row, flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """Markdown."""
    titles = [f"{title}, {what}" for title in TASKS.values() for what in ("half skip", "all skip later MLPs")]
    lines = [f"| surrogate | rank | {' | '.join(titles)} |", f"| --- | ---: |{' ---: |' * len(titles)}"]
    for share in SHARES:
        own = {row["task"]: row for row in rows if row["share"] == share}
        cells = [f"{own[task][what]:.1f}" for task in TASKS for what in ("half", "later")]
        rank = next(iter(own.values()))["rank"]
        lines.append(f"| {'none' if share is None else f'{share:g}'} | {rank} | {' | '.join(cells)} |")
    dense = [f"{next(row['dense'] for row in rows if row['task'] == task):.1f}" for task in TASKS for _ in range(2)]
    return "\n".join([*lines, f"| *nothing skips* | | {' | '.join(dense)} |"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of real.py")
    parser.add_argument("--images", type=int, default=500, help="test images of each task")
    options = parser.parse_args()
    rows = [row for task in TASKS for row in measure(options.out, task, options.images)]
    write_json(options.out / "results" / "surrogate.json", {"machine": machine(), "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
