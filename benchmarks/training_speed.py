"""What a step of DyT costs over the course of a training: seconds and peak memory on ViT-B/16, beside AdaptFormer's.

    python benchmarks/training_speed.py speed --out benchmarks/results/training_speed

A training is timed at five points of its course: before each, the gates are set so that they let through what the
recipe aims at there. Variants are timed in turns, with random weights; the peak memory of each is found in a process of
its own (Linux). What the variants do to accuracy is measured by ``vtab_mini.sh`` and ``recipe.sh``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch
from torch import Tensor

import dyntune
from dyntune.core.files import write_text
from dyntune.core.machine import machine, peak_memory
from dyntune.core.timing import Throughput, measure_throughput
from dyntune.studies.bench.peers import set_gates

ADAPTFORMER, CHECKPOINTED = "AdaptFormer", "steady, gradient checkpointing"
VARIANTS = {
    ADAPTFORMER: None,
    "published": "recipe=published",
    "steady": "",
    "explore=none": "explore=none",
    "complete_during=0/1": "complete_during=0/1",
    "complete_during=0.2/0.8": "complete_during=0.2/0.8",
    "complete_during=0.2/0.8, complete_share=0.5": "complete_during=0.2/0.8,complete_share=0.5",
    "complete_weight=0": "complete_weight=0",
    CHECKPOINTED: "",
}
"""Options of ``dyt``; those without a recipe are of steady. None is AdaptFormer alone."""

BATCH = 4
POINTS = 5
"""Steps that are timed of a training, in the middle of each fifth of it."""


def spec(variant: str) -> str:
    options = VARIANTS[variant]
    return "adaptformer:scale=1" if options is None else ",".join(filter(None, ["dyt:rate=0.5", options]))


class Course:
    """A training of ``POINTS`` steps, which may be repeated."""

    def __init__(self, variant: str, model_name: str, images: Tensor) -> None:
        torch.manual_seed(0)
        self.model = dyntune.tune(timm.create_model(model_name, num_classes=100), spec(variant))
        self.model.backbone.switch_gradient_checkpointing(variant == CHECKPOINTED)
        self.model.backbone.begin_training(2 * POINTS, travel=None)
        self.gates = [self._gates(point, images) for point in range(POINTS)]
        self.optimiser = torch.optim.AdamW(p for p in self.model.parameters() if p.requires_grad)

    def __call__(self, images: Tensor) -> None:
        labels = torch.arange(len(images))
        for point, gates in enumerate(self.gates):
            with torch.no_grad():
                for name, tensor in gates.items():
                    self.model.get_parameter(name).copy_(tensor)
            loss = dyntune.training_loss(self.model, images, labels, step=self._step(point))
            loss.total.backward()
            self.optimiser.step()
            self.optimiser.zero_grad()

    def _gates(self, point: int, images: Tensor) -> dict[str, Tensor]:
        """The gates' parameters at which they let through what they should at this point."""
        self.model.train().backbone.begin_step(step=self._step(point))
        with torch.no_grad():
            courses = [gate.course for gate in self.model.run(images).gates]
        target = next((course.target for course in courses if course is not None), None)
        set_gates(self.model, images, target)
        self.model.train()
        return {n: p.detach().clone() for n, p in self.model.named_parameters() if ".dispatcher." in n}

    @staticmethod
    def _step(point: int) -> int:
        return 2 * point + 1


def batch() -> Tensor:
    return torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(1))


def peak(variant: str, model_name: str) -> None:
    """Prints the MiB by which the memory of this process rises at most in steps, behind the first ones."""
    images = batch()
    course = Course(variant, model_name, images)
    course(images)
    rise = peak_memory(lambda: course(images), images.device)
    if rise is None:
        raise SystemExit("peak memory is not known without Linux's /proc.")
    print(rise / 2**20)


def peak_of(variant: str, model_name: str) -> float:
    """What ``peak`` prints in a process that gives every freed tensor back at once."""
    command = [sys.executable, __file__, "peak", variant, "--model", model_name]
    return float(subprocess.check_output(command, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}, text=True))


def speed(out: Path, model_name: str, rounds: int) -> None:
    images = batch()
    courses = {variant: Course(variant, model_name, images) for variant in VARIANTS}
    measured = measure_throughput(courses, images, reference=ADAPTFORMER, rounds=rounds)
    memory = {variant: peak_of(variant, model_name) for variant in VARIANTS}
    result = {
        "model": model_name,
        "batch_size": BATCH,
        "rounds": rounds,
        "machine": machine(),
        "measured": time.strftime("%Y-%m-%d"),
        "rows": [
            {"variant": variant, "spec": spec(variant), **per_step(measured[variant]), "peak_mib": memory[variant]}
            for variant in VARIANTS
        ],
    }
    write_text(out / "results.json", json.dumps(result, indent=2) + "\n")


def per_step(own: Throughput) -> dict[str, float]:
    """Mean seconds of a step, and over those of AdaptFormer the median and quartiles of the rounds."""
    return {
        "seconds": BATCH / (own.images_per_second * POINTS),
        "ratio": 1 / own.speedup,
        "ratio_low": 1 / own.speedup_high,
        "ratio_high": 1 / own.speedup_low,
    }


def table(out: Path) -> str:
    """Markdown of what is measured."""
    lines = ["| variant | seconds per step | over AdaptFormer | peak memory |", "| --- | ---: | ---: | ---: |"]
    for row in json.loads((out / "results.json").read_text())["rows"]:
        spread = f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
        lines.append(f"| {row['variant']} | {row['seconds']:.2f} | {spread} | {row['peak_mib']:.0f} MiB |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["speed", "peak"])
    parser.add_argument("variant", nargs="?", choices=list(VARIANTS), help="for peak")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.what == "peak":
        peak(options.variant, options.model)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    speed(options.out, options.model, options.rounds)
    write_text(options.out / "table.md", table(options.out))
    print(table(options.out))


if __name__ == "__main__":
    main()
