"""Rate loss, distillation losses and the noise of decisions, as pure functions; a task has losses of its own."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def rate_loss(gates: Sequence[Tensor], target: float) -> Tensor:
    """``(mean of all gates - target)^2``: one scalar for the batch, not one per image or block (DyT, equation 5).

    Args:
        gates: one tensor in {0, 1} per gated unit, of any shape. Where their sizes differ, each unit counts alike.
        target: the wished share of active patches.
    """
    return (torch.stack([gate.float().mean() for gate in gates]).mean() - target).square()


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``KL(teacher || student)`` at temperature 1, mean over the batch; no gradient reaches the teacher (DyT, equation
    6).

    Args:
        student: logits of the dispatched model, ``(B, classes)``.
        teacher: logits of the complete model, ``(B, classes)``.
    """
    teacher_log = F.log_softmax(teacher.detach().float(), dim=-1)
    return F.kl_div(F.log_softmax(student.float(), dim=-1), teacher_log, reduction="batchmean", log_target=True)


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``max(0, |student - teacher|^2 / |teacher|^2 - 0.04)``, mean over the batch; no gradient reaches the teacher.

    Below 4 % a model that skips patches is left alone: it has to differ somewhere. The figure is ours.

    Args:
        student: features of the dispatched model, ``(B, ..., C)``.
        teacher: those of the complete model.
    """
    student, teacher = (features.float().flatten(1) for features in (student, teacher.detach()))
    missed = (student - teacher).square().sum(1)
    return (missed / teacher.square().sum(1).clamp_min(1e-6) - 0.04).clamp_min(0).mean()


def trust(loss: Tensor) -> Tensor:
    """``exp(-6 loss)``: how far another model should be held to the features of one with this loss; without gradient.

    With a cross-entropy it is 1 for a model that knows its images by heart, and 0.016 for one that gives their classes
    a probability of a half: its features are still on their way, and holding another to them costs accuracy.

    It falls short of 1 where targets are soft (mixup, label smoothing), whose loss has a floor. The factor 6 is ours.

    Args:
        loss: scalar, a mean over images or pixels.
    """
    return torch.exp(-6 * loss.detach().float().clamp_min(0))


def gumbel_difference(logits: Tensor) -> Tensor:
    """``g1 - g2`` with g1, g2 ~ Gumbel(0, 1), for each of the logits: the noise of a random choice between two."""
    first = -torch.empty_like(logits).exponential_().log()
    second = -torch.empty_like(logits).exponential_().log()
    return first - second
