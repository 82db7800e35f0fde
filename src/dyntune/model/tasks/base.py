"""The interface of tasks: all that training, evaluation and prediction ask about a model's outputs."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from dyntune.core.errors import TrainingError


class TargetSettings(Protocol):
    """The options of a training run that concern its targets, of which ``TrainSettings`` is one implementation."""

    @property
    def label_smoothing(self) -> float:
        """Share of the target spread over all classes."""

    @property
    def mixup(self) -> float:
        """Alpha of mixup, 0 for none."""

    @property
    def cutmix(self) -> float:
        """Alpha of CutMix, 0 for none."""


class Metric(abc.ABC):
    """Figures of a model's outputs, counted over any number of batches.

    Args:
        size: of ``sums``.

    Attributes:
        sums: ``(size,)``, float64, on the CPU: all that has been counted. Processes that share the images add theirs.
    """

    def __init__(self, size: int) -> None:
        self.sums = torch.zeros(size, dtype=torch.float64)

    @abc.abstractmethod
    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Counts a batch; ``outputs`` are in fp32."""

    @abc.abstractmethod
    def figures(self) -> dict[str, float]:
        """What has been counted, by name; the task's figure of merit is among them."""


class Task(abc.ABC):
    """What a model's outputs mean, how they are learned, measured, and read.

    ``model.task`` is ``Classification`` unless another one is put there after ``tune``; ``load`` is given it again. A
    task keeps no state of a run. *Outputs* are what the model gives for a batch, ``(B, outputs, ...)``; *targets* are
    what the data set gives beside the images, ``(B, ...)``; *names* are those of the outputs, ``model.classes``.
    """

    name: ClassVar[str]
    """As adapters are saved with it, and as the model card's ``pipeline_tag``; the hub's name where it has one."""
    merit: ClassVar[str]
    """The metric's figure that picks the saved epoch and that logs and reports show: from 0 to 1, the higher the
    better."""

    def initialise(self, head: nn.Module) -> None:
        """Gives a module of a new head its initial values, in place.

        By default as the DyT code does: truncated normal weights of deviation 0.01, zero biases.
        """
        if isinstance(head, nn.Linear):
            nn.init.trunc_normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    def mix(self, images: Tensor, targets: Tensor, outputs: int, settings: TargetSettings) -> tuple[Tensor, Tensor]:
        """A training batch, mixed as mixup and CutMix ask for; by default neither is defined.

        Args:
            images: ``(B, 3, height, width)``; may be changed in place.
            targets: of the images.
            outputs: number of the model's outputs.
            settings: of the run.

        Returns:
            Images, and targets as ``loss`` takes them.
        """
        if settings.mixup or settings.cutmix:
            raise TrainingError(f"mixup and CutMix are not defined for {self.name}; leave mixup and cutmix at 0.")
        return images, targets

    @abc.abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor, settings: TargetSettings | None = None) -> Tensor:
        """The training loss of a batch, mean over its images, as a scalar; ``settings`` are those of the run."""

    @abc.abstractmethod
    def distillation(self, outputs: Tensor, taught: Tensor) -> Tensor:
        """How far outputs are from those of a teacher, as a scalar; no gradient reaches ``taught``."""

    @abc.abstractmethod
    def metric(self, outputs: int) -> Metric:
        """A metric that has counted nothing yet, of a model with so many outputs."""

    def score(self, outputs: Tensor, targets: Tensor) -> float:
        """The figure of merit of one training batch, before mixing, as progress and logs show it."""
        metric = self.metric(outputs.shape[1])
        metric.update(outputs.float(), targets)
        return metric.figures()[self.merit]

    def averaged(self, outputs: Tensor, average: str) -> Tensor:
        """Outputs of several views of each input, ``(B, V, outputs, ...)``, as those of one, ``(B, outputs, ...)``.

        Args:
            outputs: of the model.
            average: what users asked to be averaged, ``logits`` or ``probabilities``; see ``Sampling``.
        """
        return outputs.mean(1)

    @abc.abstractmethod
    def predictions(self, outputs: Tensor, names: Sequence[str] | None, most: int) -> list[dict[str, Any]]:
        """What is predicted for each image, as plain JSON values; of alternatives, at most ``most``."""

    @abc.abstractmethod
    def cells(self, prediction: dict[str, Any]) -> dict[str, str]:
        """A prediction as people read it: cells of a table, by the title of their column."""

    @abc.abstractmethod
    def agreement(self, outputs: Tensor, others: Tensor) -> Tensor:
        """How far the predictions of two models agree, for each image: ``(B,)``, from 0 to 1."""
