"""Image classification: its loss, accuracy, mixing of targets, and predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor

from dyntune.backbones.base import Backbone
from dyntune.core.errors import DyntuneError, TrainingError
from dyntune.core.losses import distillation_loss
from dyntune.core.words import counted
from dyntune.model.tasks.base import Metric, TargetSettings, Task


class ClassificationMetric(Metric):
    """``accuracy``, the share of images whose highest logit is the right class; ``loss``, the mean cross-entropy."""

    def __init__(self) -> None:
        super().__init__(3)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        targets = _as_indices(targets)
        if targets.shape not in (outputs.shape, outputs.shape[:1]):
            raise TrainingError(
                f"{len(outputs)} images have targets of shape {tuple(targets.shape)}. Expected class indices "
                f"({len(outputs)},), or class shares {tuple(outputs.shape)}."
            )
        right = targets.argmax(-1) if targets.dim() > 1 else targets
        correct = int((outputs.argmax(-1) == right).sum())
        loss = float(F.cross_entropy(outputs, targets, reduction="sum"))
        self.sums += torch.tensor([len(outputs), correct, loss], dtype=self.sums.dtype)

    def figures(self) -> dict[str, float]:
        images, correct, loss = self.sums.tolist()
        return {"accuracy": correct / images, "loss": loss / images}


class Classification(Task):
    """Outputs are logits ``(B, classes)``, targets class indices ``(B,)``; mixed, class shares ``(B, classes)``."""

    name = "image-classification"
    merit = "accuracy"

    def mix(self, images: Tensor, targets: Tensor, outputs: int, settings: TargetSettings) -> tuple[Tensor, Tensor]:
        """Mixes each image with its mirror in the batch, by timm; of an odd number, the last image stays as it is.

        Of clips all frames are mixed alike.
        """
        if not settings.mixup and not settings.cutmix:
            return images, targets
        shape, images = images.shape, images.flatten(1, -3)  # frames of a clip lie side by side, as channels do
        smoothing = settings.label_smoothing
        mixup = Mixup(settings.mixup, settings.cutmix, label_smoothing=smoothing, num_classes=outputs)
        even = len(images) - len(images) % 2
        parts = [mixup(images[:even], targets[:even])] if even else []
        if even < len(images):
            parts.append((images[even:], mixup_target(targets[even:], outputs, 1.0, smoothing)))
        return torch.cat([x for x, _ in parts]).view(shape), torch.cat([y for _, y in parts])

    def loss(self, outputs: Tensor, targets: Tensor, settings: TargetSettings | None = None) -> Tensor:
        """Cross-entropy, in fp32. Targets that are mixed are smoothed already.

        Raises:
            TrainingError: there is one output, whose cross-entropy is 0 whatever it is.
        """
        if outputs.shape[-1] < 2:
            raise TrainingError(
                f"the model has {outputs.shape[-1]} output, from which classification learns nothing. Expected one for "
                "each of at least two classes (num_classes=2, num_labels=2). For another task than one label for each "
                "image, such as a regression, set model.task to one of your own."
            )
        outputs, targets = outputs.float(), _as_indices(targets)
        if settings is None or settings.mixup or settings.cutmix:
            return F.cross_entropy(outputs, targets)
        return F.cross_entropy(outputs, targets, label_smoothing=settings.label_smoothing)

    def distillation(self, outputs: Tensor, taught: Tensor) -> Tensor:
        return distillation_loss(outputs, taught)

    def metric(self, outputs: int) -> ClassificationMetric:
        return ClassificationMetric()

    def score(self, outputs: Tensor, targets: Tensor) -> float:
        """The accuracy, without the loss, which training has computed already."""
        return float((outputs.argmax(-1) == targets).float().mean())

    def averaged(self, outputs: Tensor, average: str) -> Tensor:
        """As the base's; with ``probabilities``, the logarithm of the mean probability."""
        if average == "logits":
            return outputs.mean(1)
        # As a sum of logarithms, which stay finite where a probability is too small for its type.
        return outputs.float().log_softmax(-1).logsumexp(1) - math.log(outputs.shape[1])

    def predictions(self, outputs: Tensor, names: Sequence[str] | None, most: int) -> list[dict[str, Any]]:
        """``top``: the classes with their labels and probabilities, the most probable first.

        Raises:
            DyntuneError: an output is not finite, or there are other names than outputs.
        """
        if not bool(outputs.isfinite().all()):
            raise DyntuneError(
                "the model's outputs are not finite, so they say nothing about the image. Its numbers are too large "
                "for its precision: use fp32, or weights from before the step that spoilt them."
            )
        if names and len(names) != outputs.shape[-1]:
            raise DyntuneError(
                f"the model has {outputs.shape[-1]} outputs and names for {counted(len(names), 'class')}."
            )
        probabilities, labels = outputs.float().softmax(-1).topk(min(most, outputs.shape[-1]))
        return [
            {
                "top": [
                    {"class": names[label] if names else str(label), "label": label, "probability": probability}
                    for probability, label in zip(ps, ls, strict=True)
                ]
            }
            for ps, ls in zip(probabilities.tolist(), labels.tolist(), strict=True)
        ]

    def cells(self, prediction: dict[str, Any]) -> dict[str, str]:
        return {
            f"top {place}": f"{top['class']} {top['probability']:.1%}" for place, top in enumerate(prediction["top"], 1)
        }

    def agreement(self, outputs: Tensor, others: Tensor) -> Tensor:
        """1 where both put the image into the same class."""
        return (outputs.argmax(-1) == others.argmax(-1)).float()


def require_head(backbone: Backbone, why: str) -> None:
    """Refuses a model whose outputs are features.

    Args:
        why: what cannot be done, such as ``nothing to train``.

    Raises:
        TrainingError: it has no head.
    """
    if not any(True for module in backbone.heads for _ in module.parameters()):
        raise TrainingError(
            f"{why}: the model has no head. Create it with num_classes=<number of classes>, or put one on a "
            "tower of transformers: dyntune.add_classifier(tower, <number of classes>)."
        )


def _as_indices(targets: Tensor) -> Tensor:
    """Labels of any integer type as PyTorch's losses take them; shares of classes as they are."""
    return targets if targets.is_floating_point() else targets.long()
