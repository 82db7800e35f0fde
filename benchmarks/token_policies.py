"""How fast each token policy runs and trains beside the dense model: one process, models in turns.

    python benchmarks/token_policies.py --out benchmarks/results/token_policies

Weights are random: how much these policies compute does not depend on them, but for the gates of dispatch. Their biases
are set so that half of the patches of the timed images are active in every block.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor

import dyntune
from dyntune.core.machine import machine
from dyntune.core.timing import measure_throughput
from dyntune.studies.bench.peers import set_gates

METHODS = (
    "adaptformer",
    "adaptformer+tome:r=8",
    "adaptformer+evit:keep=0.7,layers=3/6/9",
    "adaptformer+dynamicvit:keep=0.9/0.7/0.5,layers=3/6/9",
    "adaptformer+fpet:block=6",
    "lora+pyra:r=low",
    "lora+pyra:r=high",
    "dyt:rate=0.5,recipe=published",
    "dyt:rate=0.5,recipe=published+tome:r=7",
)
DENSE = "dense backbone"


def built(name: str, spec: str) -> dyntune.TunedModel:
    torch.manual_seed(0)
    return dyntune.tune(timm.create_model(name, num_classes=100), spec)


def train_step(model: dyntune.TunedModel, optimiser: torch.optim.Optimizer, labels: Tensor, images: Tensor) -> None:
    model.train()
    dyntune.training_loss(model, images, labels).total.backward()
    optimiser.step()
    optimiser.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--train-batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(1)
    device = torch.device(options.device)
    images = torch.randn(options.batch_size, 3, 224, 224, device=device)
    few = images[: options.train_batch_size]
    labels = torch.arange(len(few), device=device)
    models = {spec: built(options.model, spec).to(device).eval() for spec in options.methods}
    for model in models.values():
        set_gates(model, images, 0.5)
    active = {spec: [float(g.values.mean()) for g in model.run(images).gates] for spec, model in models.items()}
    macs = {}
    for spec, model in models.items():
        with dyntune.MacCounter() as counter, torch.inference_mode():
            model(images)
        macs[spec] = counter.macs / len(images)
    plain = timm.create_model(options.model, num_classes=100).to(device).eval()
    with torch.inference_mode():
        inference = measure_throughput({DENSE: plain, **models}, images, reference=DENSE, rounds=options.rounds)
    steps = {}
    for spec, model in models.items():
        optimiser = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        steps[spec] = partial(train_step, model, optimiser, labels)
    training = measure_throughput(steps, few, reference=options.methods[0], rounds=options.rounds)
    rows = [
        {
            "method": spec,
            "macs": macs[spec],
            "active": sum(active[spec]) / len(active[spec]) if active[spec] else None,
            "inference": inference[spec].to_dict(),
            "training": training[spec].to_dict(),
        }
        for spec in options.methods
    ]
    result = {
        "model": options.model,
        "machine": machine(),
        "batch_size": options.batch_size,
        "train_batch_size": len(few),
        "rounds": options.rounds,
        "dense": inference[DENSE].to_dict(),
        "measured": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    for row in rows:
        print(
            f"{row['method']:60} {row['macs'] / 1e9:7.3f} G  inference x{row['inference']['speedup']:.2f}"
            f"  training x{row['training']['speedup']:.2f}"
        )


if __name__ == "__main__":
    main()
