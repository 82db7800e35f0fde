"""Which temporal heads see the order of frames, and what DyT costs and keeps there, on the drawn videos of ``motion``.

    python benchmarks/motion.py --out benchmarks/results/motion          # heads alone and tuned, three seeds

The built-in backbone on 4 frames of each video. Heads alone are trained on the frozen backbone's tokens of the
segments' middle frames, which are computed once. What is tuned starts from the head that its seed has trained alone,
with a third of its learning rate, and sees other frames of the segments in every epoch. All are tested behind their
last epoch: nothing is chosen by any video. Each row is written when it is done; a second call goes on behind the last.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dyntune
from dyntune.backbones.builtin import BUILTIN_BACKBONE
from dyntune.core.files import write_json
from dyntune.core.machine import machine
from dyntune.core.tokens import Tokens
from dyntune.data import build_transform, load_data
from dyntune.data.base import ImageSubset, LabelledImages
from dyntune.data.clips import Sampling
from dyntune.data.drawn.motion import PAIRS
from dyntune.data.transforms import Preprocessing
from dyntune.model.activation import MeanActivation
from dyntune.model.tune import build_tuned
from dyntune.model.tuned import TunedModel

FRAMES, BATCH = 4, 16
CLIPS = Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", Sampling(FRAMES, sampling="segments", flip=0.0))
ALONE = "linear"
ROWS = (
    ("mean", "none", ALONE),
    ("attentive", "none", ALONE),
    ("attentive", "learned", ALONE),
    ("mixer", "learned", ALONE),
    ("attentive", "learned", "adaptformer"),
    ("attentive", "learned", "dyt:rate=0.5"),
)
"""Temporal head, its time, and the method."""


class Features:
    """The frozen backbone's tokens of all training clips, computed when they are first asked for.

    Args:
        data: the videos.
    """

    def __init__(self, data: LabelledImages) -> None:
        self.data = data
        self.labels = torch.tensor(data.targets)
        self._tokens: Tensor | None = None

    @torch.no_grad()
    def tokens(self, model: TunedModel) -> Tensor:
        """Of each clip, ``(clips, T, N, C)``."""
        if self._tokens is None:
            found = []
            for batch in clips(self.data).split(BATCH):
                tokens = model.backbone.embed(batch)
                for block in model.backbone.blocks:
                    tokens = block.enter(tokens)
                    tokens = tokens.with_x(tokens.x + block.update(tokens))
                found.append(model.backbone.finish(tokens).x.unflatten(0, (-1, FRAMES)))
            self._tokens = torch.cat(found)
        return self._tokens


def train_head(model: TunedModel, features: Features, epochs: int, lr: float, seed: int) -> None:
    """Trains temporal head and classifier in place; AdamW, with a cosine behind a tenth of warm-up, as ``fit`` does."""
    tokens, order = features.tokens(model), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr, weight_decay=1e-4)
    steps = epochs * -(-len(tokens) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.1)
    for _ in range(epochs):
        for picked in torch.randperm(len(tokens), generator=order).split(BATCH):
            read = Tokens(tokens[picked].flatten(0, 1), 1, model.backbone.grid)
            loss = F.cross_entropy(model.backbone.readout(read), features.labels[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def build(temporal: str, steps: str, method: str, classes: tuple[str, ...], seed: int) -> TunedModel:
    torch.manual_seed(seed)
    arguments = {"frames": FRAMES, "temporal": temporal, "time": steps}
    model = build_tuned(f"frames:{BUILTIN_BACKBONE}", method, classes=classes, **arguments)
    model.preprocessing = CLIPS
    return model


def heads_of(model: TunedModel) -> dict[str, Tensor]:
    """Temporal head and classifier."""
    own = [*model.backbone.necks, *model.backbone.heads]
    return {f"{place}.{name}": p for place, module in enumerate(own) for name, p in module.named_parameters()}


def clips(data: LabelledImages) -> Tensor:
    """The segments' middle frames of each video, ``(videos, T, 3, H, W)``."""
    transform = build_transform(CLIPS)
    return torch.stack([transform(data.read(index)) for index in range(len(data))])


@torch.inference_mode()
def measure(model: TunedModel, test: LabelledImages) -> dict[str, float]:
    """Shares of clips whose class, and whose pair of classes, is right; and, of these, whose order is."""
    pairs = torch.tensor([next(place for place, names in enumerate(PAIRS) if name in names) for name in model.classes])
    labels, batches = torch.tensor(test.targets), clips(test).split(BATCH)
    with dyntune.MacCounter() as counter, counter.watching(model.backbone):
        outputs = [model.run(batch) for batch in batches]
    found = torch.cat([output.logits for output in outputs]).argmax(1)
    active = MeanActivation()
    for batch, output in zip(batches, outputs, strict=True):
        active.add(output.gates, len(batch))
    right, pair = found == labels, pairs[found] == pairs[labels]
    return {
        "accuracy": right.float().mean().item(),
        "pair": pair.float().mean().item(),
        "order": right[pair].float().mean().item() if pair.any() else 0.0,
        "activation": active.mean,
        "macs": (counter.macs - counter.head_macs) / len(test),
        "dense_macs": model.dense_macs,
    }


def evenly(data: LabelledImages, most: int | None) -> LabelledImages:
    """Some videos of a split, of all classes alike."""
    step = 1 if most is None else max(1, len(data) // most)
    return ImageSubset(data, range(0, len(data), step))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10, help="of what is tuned")
    parser.add_argument("--head-epochs", type=int, default=20, help="of heads alone")
    parser.add_argument("--lr", type=float, default=3e-3, help="of heads alone")
    parser.add_argument("--videos", type=int, help="of each split at most, to try the script")
    options = parser.parse_args()
    data = load_data("motion")
    assert data.test is not None  # motion has all three
    train, test = evenly(data.train, options.videos), evenly(data.test, options.videos)
    features = Features(train)
    about = {"machine": machine(), "frames": FRAMES, "batch_size": BATCH, "train": len(train), "test": len(test)}
    about |= {"epochs": options.epochs, "head_epochs": options.head_epochs, "lr": options.lr}
    file = options.out / "results.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else []
    done = {(row["temporal"], row["time"], row["method"], row["seed"]) for row in rows}
    for seed in range(options.seeds):
        for temporal, steps, method in ROWS:
            if (temporal, steps, method, seed) in done:
                continue
            began = time.process_time()
            model = build(temporal, steps, ALONE, data.classes, seed)
            train_head(model, features, options.head_epochs, options.lr, seed)
            if method != ALONE:
                head, model = heads_of(model), build(temporal, steps, method, data.classes, seed)
                with torch.no_grad():
                    for name, parameter in heads_of(model).items():
                        parameter.copy_(head[name])
                settings = {"epochs": options.epochs, "lr": options.lr / 3, "batch_size": BATCH, "seed": seed}
                dyntune.fit(model, train, **settings)
            row = {"temporal": temporal, "time": steps, "method": method, "seed": seed} | measure(model, test)
            rows.append(row | {"cpu_seconds": round(time.process_time() - began)})
            write_json(file, about | {"rows": rows})
            print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
