"""What lowers the cost of a DyT step: seconds and peak memory on ViT-B/16, accuracy on small tasks.

    python benchmarks/training_speed.py accuracy --data DIR --out benchmarks/results/training_speed
    python benchmarks/training_speed.py speed --out benchmarks/results/training_speed

``accuracy`` trains the built-in backbone with each variant, a row of ``accuracy.jsonl`` per training; the same command
goes on where it was stopped. ``speed`` times a step of each variant in turns, with random weights and gates set half
open, and finds its peak memory in a process of its own (Linux). Both rewrite ``table.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from statistics import fmean

import timm
import torch
from torch import Tensor

import dyntune
from dyntune.core.files import write_text
from dyntune.core.machine import machine, peak_memory
from dyntune.core.timing import Throughput, measure_throughput
from dyntune.data import load_data
from dyntune.model.tune import build_tuned
from dyntune.studies.bench.peers import set_gates

ADAPTFORMER, PUBLISHED, CHECKPOINTED = "AdaptFormer", "published", "published, gradient checkpointing"
EVERY = "complete_every=4"
VARIANTS = {
    ADAPTFORMER: None,
    PUBLISHED: "",
    "explore=1": "explore=1",
    "explore=0.1": "explore=0.1",
    "complete_weight=0": "complete_weight=0",
    EVERY: EVERY,
    "complete_share=0.25": "complete_share=0.25",
    "explore=1, complete_share=0.25": "explore=1,complete_share=0.25",
    "explore=0.1, complete_every=4": f"explore=0.1,{EVERY}",
    "explore=0.1, complete_share=0.25": "explore=0.1,complete_share=0.25",
    CHECKPOINTED: "",
}
"""Options of ``dyt`` beside its published values; None is AdaptFormer alone."""

BATCH = 4
SMALL = "vit_mini_patch4_32.dyntune"
RECIPE = "scale=1,rate_of=inference,rate_weight=10"
TRAINING = {
    "shapes_orientation": {"epochs": 5, "batch_size": 16, "lr": 1e-2},
    "digits": {"epochs": 4, "batch_size": 32, "lr": 5e-3},
    "materials": {"epochs": 5, "batch_size": 16, "lr": 5e-3},
}
SEEDS = (0, 1)


def spec(variant: str, base: str = "") -> str:
    options = VARIANTS[variant]
    if options is None:
        return "adaptformer" + (":scale=1" if base else "")
    return "dyt:" + ",".join(filter(None, ["rate=0.5,recipe=published", base, options]))


# accuracy ------------------------------------------------------------------------------------------------------------


def trained(variant: str, task: str, seed: int, data: Path) -> dict:
    """Trains one variant on one task; the last epoch is tested."""
    splits = load_data(task if task == "digits" else f"vtab:{data / task}")
    torch.manual_seed(seed)
    model = build_tuned(SMALL, spec(variant, RECIPE), classes=splits.classes)
    result = dyntune.fit(model, splits.train, seed=seed, device="cpu", **TRAINING[task])
    test = dyntune.evaluate(model, splits.test)
    return {
        "task": task,
        "seed": seed,
        "variant": variant,
        "spec": model.spec,
        "accuracy": test.accuracy,
        "activation": test.activation,
        "seconds": round(result.seconds, 1),
        "measured": time.strftime("%Y-%m-%d"),
    }


def accuracy(out: Path, data: Path, tasks: Sequence[str]) -> None:
    file = out / "accuracy.jsonl"
    for seed in SEEDS:
        for task in tasks:
            for variant in VARIANTS:
                done = {(row["task"], row["seed"], row["variant"]) for row in rows(file)}
                if variant != CHECKPOINTED and (task, seed, variant) not in done:
                    row = trained(variant, task, seed, data)
                    with file.open("a") as lines:
                        lines.write(json.dumps(row) + "\n")
                    print(f"{task} {seed} {variant}: {row['accuracy']:.1%}, {row['activation']:.0%} active")


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# speed ---------------------------------------------------------------------------------------------------------------


def step_of(variant: str, model_name: str, images: Tensor) -> tuple[Callable[[Tensor], None], int]:
    """A call that trains, and how many steps it takes: as many as bring the complete model's pass once."""
    torch.manual_seed(0)
    model = dyntune.tune(timm.create_model(model_name, num_classes=100), spec(variant)).eval()
    set_gates(model, images, 0.5)
    model.train().backbone.switch_gradient_checkpointing(variant == CHECKPOINTED)
    optimiser = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    steps = max((getattr(policy, "complete_every", 1) for policy in model.policies), default=1)
    return partial(take_steps, model, optimiser, count(), steps), steps


def take_steps(
    model: dyntune.TunedModel, optimiser: torch.optim.Optimizer, numbers: count, steps: int, images: Tensor
) -> None:
    for _ in range(steps):
        labels = torch.arange(len(images))
        dyntune.training_loss(model, images, labels, step=next(numbers)).total.backward()
        optimiser.step()
        optimiser.zero_grad()


def batch() -> Tensor:
    return torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(1))


def peak(variant: str, model_name: str) -> None:
    """Prints the MiB by which the memory of this process rises at most in steps, behind the first ones."""
    images = batch()
    call, _ = step_of(variant, model_name, images)
    call(images)
    rise = peak_memory(lambda: call(images), images.device)
    if rise is None:
        raise SystemExit("peak memory is not known without Linux's /proc.")
    print(rise / 2**20)


def peak_of(variant: str, model_name: str) -> float:
    """What ``peak`` prints in a process that gives every freed tensor back at once."""
    command = [sys.executable, __file__, "peak", variant, "--model", model_name]
    return float(subprocess.check_output(command, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}, text=True))


def speed(out: Path, model_name: str, rounds: int) -> None:
    images = batch()
    calls = {variant: step_of(variant, model_name, images) for variant in VARIANTS}
    measured = measure_throughput(
        {variant: call for variant, (call, _) in calls.items()}, images, reference=ADAPTFORMER, rounds=rounds
    )
    memory = {variant: peak_of(variant, model_name) for variant in VARIANTS}
    result = {
        "model": model_name,
        "batch_size": BATCH,
        "rounds": rounds,
        "machine": machine(),
        "measured": time.strftime("%Y-%m-%d"),
        "rows": [
            {
                "variant": variant,
                "spec": spec(variant),
                **per_step(measured[variant], calls[variant][1]),
                "peak_mib": memory[variant],
            }
            for variant in VARIANTS
        ],
    }
    write_text(out / "results.json", json.dumps(result, indent=2) + "\n")


def per_step(own: Throughput, steps: int) -> dict[str, float]:
    """Seconds of a step, and over those of AdaptFormer the median and quartiles of the rounds."""
    return {
        "seconds": BATCH / (own.images_per_second * steps),
        "ratio": 1 / (own.speedup * steps),
        "ratio_low": 1 / (own.speedup_high * steps),
        "ratio_high": 1 / (own.speedup_low * steps),
    }


# table ---------------------------------------------------------------------------------------------------------------


def table(out: Path) -> str:
    """Markdown of whatever is measured so far."""
    scored = rows(out / "accuracy.jsonl")
    tasks = [task for task in TRAINING if any(row["task"] == task for row in scored)]
    file = out / "results.json"
    timed = {row["variant"]: row for row in json.loads(file.read_text())["rows"]} if file.exists() else {}
    heads = ["variant", "seconds per step", "over AdaptFormer", "peak memory", *tasks, "active"]
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    for variant in VARIANTS:
        cells = ["-"] * 3
        if variant in timed:
            row = timed[variant]
            spread = f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
            cells = [f"{row['seconds']:.2f}", spread, f"{row['peak_mib']:.0f} MiB"]
        own = [row for row in scored if row["variant"] == variant]
        for task in tasks:
            found = [f"{100 * row['accuracy']:.1f}" for row in own if row["task"] == task]
            cells.append(" / ".join(found) or "-")
        cells.append(f"{fmean(row['activation'] for row in own):.0%}" if own else "-")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["accuracy", "speed", "peak", "table"])
    parser.add_argument("variant", nargs="?", choices=list(VARIANTS), help="for peak")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--data", type=Path, help="vtab-mini, written with data seed 1")
    parser.add_argument("--tasks", nargs="+", default=list(TRAINING), choices=list(TRAINING))
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.what == "peak":
        peak(options.variant, options.model)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    if options.what == "accuracy":
        accuracy(options.out, options.data, options.tasks)
    elif options.what == "speed":
        speed(options.out, options.model, options.rounds)
    write_text(options.out / "table.md", table(options.out))
    print(table(options.out))


if __name__ == "__main__":
    main()
