"""Which temporal heads see the order of frames, and what DyT costs and keeps there, on the drawn videos of ``motion``.

    python benchmarks/motion.py --out benchmarks/results/motion          # heads alone and tuned, three seeds

Clips are read once and kept, as the built-in backbone sees them; so every row of a seed is trained on the same 8 frames
of each video, its segments' middle ones. Each row is written when it is done; a second call goes on behind the last.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

import dyntune
from dyntune.backbones.builtin import BUILTIN_BACKBONE
from dyntune.core.files import write_json
from dyntune.core.machine import machine
from dyntune.data import build_transform, load_data
from dyntune.data.base import LabelledImages
from dyntune.data.clips import Sampling
from dyntune.data.drawn.motion import PAIRS
from dyntune.data.transforms import Preprocessing
from dyntune.model.tuned import TunedModel, build_tuned

FRAMES = 8
ROWS = (
    ("mean", "none", "linear"),
    ("attentive", "none", "linear"),
    ("attentive", "learned", "linear"),
    ("mixer", "learned", "linear"),
    ("attentive", "learned", "adaptformer"),
    ("attentive", "learned", "dyt:rate=0.5"),
)
"""Temporal head, its time, and the method."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--videos", type=int, help="of each split at most, to try the script")
    options = parser.parse_args()
    data = load_data("motion")
    preprocessing = Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", Sampling(FRAMES, sampling="segments"))
    train, val, test = (read(split, preprocessing, options.videos) for split in (data.train, data.val, data.test))
    file = options.out / "results.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else []
    done = {(row["temporal"], row["time"], row["method"], row["seed"]) for row in rows}
    for seed in range(options.seeds):
        for temporal, steps, method in ROWS:
            if (temporal, steps, method, seed) in done:
                continue
            torch.manual_seed(seed)
            arguments = {"frames": FRAMES, "temporal": temporal, "time": steps}
            model = build_tuned(f"frames:{BUILTIN_BACKBONE}", method, classes=data.classes, **arguments)
            began = time.perf_counter()
            settings = {"epochs": options.epochs, "lr": options.lr, "batch_size": 16, "seed": seed}
            dyntune.fit(model, train, val, **settings)
            row = {"temporal": temporal, "time": steps, "method": method, "seed": seed}
            rows.append(row | measure(model, test, data.classes) | {"seconds": round(time.perf_counter() - began)})
            about = {"epochs": options.epochs, "lr": options.lr, "train": len(train), "test": len(test)}
            write_json(file, {"machine": machine(), **about, "rows": rows})
            print(rows[-1], flush=True)


def read(split: LabelledImages | None, preprocessing: Preprocessing, most: int | None) -> TensorDataset:
    """The clips of a split, evenly of all classes, and their labels."""
    assert split is not None  # motion has all three
    places = range(0, len(split), 1 if most is None else max(1, len(split) // most))
    transform = build_transform(preprocessing)
    clips = torch.stack([transform(split.read(index)) for index in places])
    return TensorDataset(clips, torch.tensor([split.targets[index] for index in places]))


@torch.no_grad()
def measure(model: TunedModel, test: TensorDataset, classes: tuple[str, ...]) -> dict[str, float]:
    """Shares of clips whose class, and whose pair of classes, is right; and, of these, whose order is."""
    pair_of = [next(place for place, names in enumerate(PAIRS) if name in names) for name in classes]
    pairs = torch.tensor(pair_of)
    clips, labels = test.tensors
    found = torch.cat([model(batch) for batch in clips.split(16)]).argmax(1)
    right, pair = found == labels, pairs[found] == pairs[labels]
    result = dyntune.evaluate(model, test, batch_size=16)
    return {
        "accuracy": right.float().mean().item(),
        "pair": pair.float().mean().item(),
        "order": right[pair].float().mean().item() if pair.any() else 0.0,
        "activation": result.activation,
        "macs": result.macs or 0.0,
        "dense_macs": model.dense_macs,
    }


if __name__ == "__main__":
    main()
