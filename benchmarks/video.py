"""DyT beside the dense host on clips, in torch and ONNX Runtime, in turns: an image ViT on each frame, and VideoMAE.

    python benchmarks/video.py --threads 2 --out benchmarks/results/video

Measured as ``hosts.py`` does: weights are random, the gates are set so that half of the patches of the timed clips are
active in every unit, and all models of a host take turns. On the joint host, where attention over the whole clip is a
quarter of all MACs, attention is dispatched as well as the MLPs.
"""

from __future__ import annotations

import timm
from deploy import BOTH, CLASSES
from hosts import Host, run
from torch import nn

import dyntune
from dyntune.backbones.families.space_time import SpaceTimeViT


def frames(depth: int) -> nn.Module:
    return dyntune.ClipClassifier(timm.create_model("vit_base_patch16_224", num_classes=CLASSES, depth=depth), frames=8)


def joint(depth: int) -> nn.Module:
    return SpaceTimeViT(CLASSES, frames=16, depth=depth)


HOSTS = {
    "ViT-B/16 on 8 frames": Host(frames),
    "VideoMAE-B, 16 frames, attn-mlp": Host(joint, BOTH),
}
"""ViT-B sizes at 224 pixels."""

if __name__ == "__main__":
    run(__doc__, HOSTS, batch_size=1, noun="clips", rounds=7, seconds=0.0)
