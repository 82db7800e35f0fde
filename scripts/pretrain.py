"""Pretrain the built-in backbone on formula-driven images by regressing gradient-orientation histograms.

No label and no photograph is used. The encoder sees a random part of the patches. Its class token predicts, for the
whole image, the histograms of 4 x 4 cells and of all 8 x 8 patches, and the colour of 4 x 4 cells; each visible patch
token predicts the histograms of its own patch and of the eight patches around it, seen or not. The targets follow
MaskFeat (Wei et al., CVPR 2022, arXiv:2112.09133), the encoder on visible patches only follows MAE (He et al., CVPR
2022, arXiv:2111.06377). Heads are linear, so that what they predict lies open in the tokens.

    python scripts/pretrain.py --out pretraining --minutes 50 --seed 0 --threads 1
"""

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import dyntune.backbones.builtin  # noqa: F401  registers the architecture
from dyntune.data.drawn.procedural import render_batch, render_shape

BINS = 8
GRID = 8  # patches per side
WIDTH = 96
WEIGHTS = {"cells": 1.0, "fine": 0.25, "colour": 0.5, "near": 1.0}  # of each kind of target in the loss


def energies(images: Tensor) -> Tensor:
    """Gradient energy per patch and orientation (Dalal and Triggs, CVPR 2005): (n, 8, 8, 8) as bin, row, column.

    ``images`` are in [-1, 1], shape (n, 3, 32, 32). Each pixel counts with its strongest colour channel, and is shared
    between the two nearest of 8 orientations; opposite directions are the same orientation.
    """
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    dx = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    dy = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    square, channel = (dx.square() + dy.square()).max(dim=1, keepdim=True)
    angle = torch.atan2(dy.gather(1, channel), dx.gather(1, channel)) / math.pi * BINS
    distance = torch.remainder(angle - torch.arange(BINS).view(1, BINS, 1, 1) + BINS / 2, BINS) - BINS / 2
    return F.avg_pool2d(square.sqrt() * F.relu(1 - distance.abs()), 4)


def targets(images: Tensor) -> dict[str, Tensor]:
    """What the tokens have to predict of images in [-1, 1], shape (n, 3, 32, 32).

    Returns:
        For the class token "cells" (n, 128) and "fine" (n, 512), histograms relative to the energy of the image, and
        "colour" (n, 48); for the patches "near" (n, 64, 72), histograms relative to the energy of each patch where
        that is not faint. Histograms are square roots, so that weak edges count.
    """
    energy = energies(images)
    total = energy.sum(dim=1, keepdim=True)
    mean = total.mean(dim=(2, 3), keepdim=True)
    relative = energy / (mean + 0.01)
    own = (energy / (total + 0.5 * mean + 0.01)).sqrt()
    return {
        "cells": F.avg_pool2d(relative, 2).flatten(1).sqrt(),
        "fine": relative.flatten(1).sqrt(),
        "colour": F.avg_pool2d(images, 8).flatten(1),
        "near": F.unfold(own, 3, padding=1).transpose(1, 2),
    }


class Pretrainer(nn.Module):
    """The backbone with its linear prediction heads and the targets' means and deviations."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("vit_mini_patch4_32", pretrained=False, num_classes=0)
        sizes = {"cells": 16 * BINS, "fine": GRID * GRID * BINS, "colour": 48, "near": 9 * BINS}
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, size) for name, size in sizes.items()})
        for name, size in sizes.items():
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def fit_scales(self, images: Tensor) -> None:
        """Take the targets' means and deviations from ``images``."""
        for name, value in targets(images).items():
            rows = value.flatten(0, -2)
            getattr(self, f"{name}_mean").copy_(rows.mean(0))
            getattr(self, f"{name}_std").copy_(rows.std(0) + 1e-4)

    def encode(self, images: Tensor, kept: Tensor) -> Tensor:
        """Tokens after the last norm, class token first: (n, 1 + k, 96) from images and kept patch numbers (n, k)."""
        vit = self.backbone
        patches = vit.patch_embed(images) + vit.pos_embed[:, 1:]
        patches = patches.gather(1, kept.unsqueeze(2).expand(-1, -1, WIDTH))
        first = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(images), -1, -1)
        return vit.norm(vit.blocks(torch.cat([first, patches], dim=1)))

    def forward(self, images: Tensor, kept: Tensor) -> dict[str, Tensor]:
        """Mean squared error of every kind of target, in units of the target's variance."""
        tokens = self.encode(images, kept)
        losses = {}
        for name, value in targets(images).items():
            value = (value - getattr(self, f"{name}_mean")) / getattr(self, f"{name}_std")
            if name == "near":
                value = value.gather(1, kept.unsqueeze(2).expand(-1, -1, value.shape[2]))
                losses[name] = F.mse_loss(self.heads[name](tokens[:, 1:]), value)
            else:
                losses[name] = F.mse_loss(self.heads[name](tokens[:, 0]), value)
        return losses


def to_input(images: NDArray[np.uint8]) -> Tensor:
    """RGB bytes (n, 32, 32, 3) to the backbone's input in [-1, 1], shape (n, 3, 32, 32)."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def augment(images: Tensor) -> Tensor:
    """Mirror and transpose each eighth of the batch its own way, shuffle its colour channels, sometimes invert it."""
    parts = []
    for number, part in enumerate(images.chunk(8)):
        axes = [axis for bit, axis in ((1, 3), (2, 2)) if number & bit]
        part = part.flip(axes) if axes else part
        part = part.transpose(2, 3) if number & 4 else part
        part = part[:, torch.randperm(3)]
        parts.append(-part if torch.rand(()) < 0.3 else part)
    return torch.cat(parts)


def image_bank(folder: Path, seed: int, count: int) -> NDArray[np.uint8]:
    """``count`` drawn images, uint8 (count, 32, 32, 3), kept in ``folder``: each serves several times."""
    path = folder / f"bank-{seed}-{count}.npy"
    if not path.exists():
        partial = path.with_suffix(".partial.npy")
        np.save(partial, render_batch(seed, range(count)))
        os.replace(partial, path)
    return np.load(path, mmap_mode="r")


def start_values(vit: VisionTransformer) -> None:
    """Start from weights whose size fits the width (timm's 0.02 fits 768), and from sines and cosines as positions."""
    with torch.no_grad():
        for name, weight in vit.blocks.named_parameters():
            if weight.ndim == 2:
                residual = name.endswith(("attn.proj.weight", "fc2.weight"))
                std = (weight.shape[1] * (2 * len(vit.blocks) if residual else 1)) ** -0.5
                nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
        rates = 100 ** -(torch.arange(WIDTH // 4) / (WIDTH // 4))
        waves = torch.arange(float(GRID))[:, None] * rates
        axis = torch.cat([waves.sin(), waves.cos()], dim=1)
        rows, columns = axis[:, None].expand(-1, GRID, -1), axis[None].expand(GRID, -1, -1)
        vit.pos_embed[0, 1:] = 0.5 * torch.cat([rows, columns], dim=2).flatten(0, 1)


def digits_probe_data() -> tuple[Tensor, NDArray[np.int64]]:
    """scikit-learn's 1,797 digits as the backbone's input, in a fixed order: 1,000 train, 200 validation, 597 test."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    small = torch.tensor(digits.images[order], dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(small, 32, mode="bicubic").clamp(0, 1).mul(2).sub(1)
    return images.expand(-1, 3, -1, -1), digits.target[order]


def probe(vit: VisionTransformer, test: bool = False) -> dict[str, float]:
    """Accuracy in per cent of logistic regressions on the standardised class token.

    Digits: 1,000 train images, scored on the 200 of validation, or with ``test`` on the 597 of test. Shapes' place and
    direction, 16 classes each: 1,000 drawn train images, 500 scored; with ``test`` 2,000 others, and 1,000.
    """
    vit.eval()

    def score(images: Tensor, labels: NDArray[np.int64], train: int, scored: slice) -> float:
        with torch.inference_mode():
            tokens = torch.cat([vit.forward_features(part)[:, 0] for part in images.split(250)]).numpy()
        scaler = StandardScaler().fit(tokens[:train])
        model = LogisticRegression(max_iter=300).fit(scaler.transform(tokens[:train]), labels[:train])
        return round(100 * float(model.score(scaler.transform(tokens[scored]), labels[scored])), 1)

    digits, names = digits_probe_data()
    train, total = (2000, 3000) if test else (1000, 1500)
    drawn = [render_shape(1 if test else 0, index) for index in range(total)]
    shapes = to_input(np.stack([image for image, _, _ in drawn]))
    if not test:
        digits, names = digits[:1200], names[:1200]
    scores = {"digits": score(digits, names, 1000, slice(1200 if test else 1000, None))}
    for column, name in ((1, "place"), (2, "direction")):
        scores[name] = score(shapes, np.array([row[column] for row in drawn]), train, slice(train, None))
    vit.train()
    return scores


def export(vit: VisionTransformer, path: Path) -> None:
    """Write the backbone's tensors as float16 safetensors; a reader never meets half a file."""
    partial = path.with_suffix(".partial")
    save_file({name: value.detach().half().contiguous() for name, value in vit.state_dict().items()}, partial)
    partial.chmod(0o644)
    os.replace(partial, path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for images, checkpoint, log and weights")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="training time, over all resumptions")
    budget.add_argument("--images", type=int, help="images to train on (repeatable to the bit on one machine)")
    parser.add_argument("--bank", type=int, default=100_000, help="images drawn in advance and reused")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--keep", type=int, default=24, help="patches the encoder sees, of 64")
    parser.add_argument("--whole", type=float, default=0.12, help="last part of the training in which it sees all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--every", type=float, default=6, help="minutes from one probe and checkpoint to the next")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    return parser.parse_args()


def optimiser(model: nn.Module, rate: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, counts: dict[str, Any]) -> None:
    """Write a checkpoint from which the run goes on as if it had not stopped."""
    partial = path.with_suffix(".partial")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
    torch.save(state | {"counts": counts}, partial)
    os.replace(partial, path)


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    checkpoint = args.out / "checkpoint.pt"
    bank = image_bank(args.out, args.seed, args.bank)
    model = Pretrainer()
    start_values(model.backbone)
    model.fit_scales(to_input(bank[:2048]))
    optimizer = optimiser(model, args.lr)
    counts: dict[str, Any] = {"images": 0, "seconds": 0.0}

    def report(**values: Any) -> None:
        line = json.dumps({"images": counts["images"], "seconds": round(counts["seconds"])} | values)
        print(line, flush=True)
        with (args.out / "log.jsonl").open("a") as log:
            log.write(line + "\n")

    if args.resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        counts = state["counts"]
        report(event="resumed")
    else:
        report(event="start", probe=probe(model.backbone))
    clock = time.monotonic() - counts["seconds"]
    saved = counts["seconds"]
    while True:
        done = counts["images"] / args.images if args.images else counts["seconds"] / (60 * args.minutes)
        if done >= 1:
            break
        rate = args.lr * min(1.0, counts["images"] / (200 * args.batch)) * (0.5 + 0.5 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        drawn = torch.randint(len(bank), (args.batch,)).sort().values.numpy()
        images = augment(to_input(bank[drawn])[torch.randperm(args.batch)])
        keep = GRID * GRID if done > 1 - args.whole else args.keep
        losses = model(images, torch.rand(args.batch, GRID * GRID).argsort(dim=1)[:, :keep])
        loss = sum(WEIGHTS[name] * value for name, value in losses.items())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        counts["images"] += args.batch
        counts["seconds"] = time.monotonic() - clock
        if counts["seconds"] - saved > 60 * args.every:
            saved = counts["seconds"]
            save(checkpoint, model, optimizer, counts)
            export(model.backbone, args.out / "weights.safetensors")
            parts = {name: round(value.item(), 3) for name, value in losses.items()}
            report(rate=round(rate, 6), loss=parts, probe=probe(model.backbone))
    save(checkpoint, model, optimizer, counts)
    export(model.backbone, args.out / "weights.safetensors")
    report(event="end", probe=probe(model.backbone, test=True))


if __name__ == "__main__":
    main()
