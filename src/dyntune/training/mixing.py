"""mixup and CutMix of a batch, by timm; batches of any size."""

import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor

from dyntune.training.settings import TrainSettings


def make_mixup(settings: TrainSettings, classes: int) -> Mixup | None:
    """timm's mixing of images and targets, or None if the settings ask for none."""
    if not settings.mixup and not settings.cutmix:
        return None
    return Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        label_smoothing=settings.label_smoothing,
        num_classes=classes,
    )


def mixed(mixup: Mixup, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mixes each image with its mirror in the batch; of an odd number, the last image stays as it is.

    Args:
        mixup: from ``make_mixup``.
        images: ``(B, 3, height, width)``; changed in place.
        labels: class indices ``(B,)``.

    Returns:
        Images, and targets as class shares ``(B, classes)``.
    """
    even = len(images) - len(images) % 2
    parts = [mixup(images[:even], labels[:even])] if even else []
    if even < len(images):
        parts.append((images[even:], mixup_target(labels[even:], mixup.num_classes, 1.0, mixup.label_smoothing)))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
