"""The training loss of a tuned model: the task's loss plus what its token policies ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dyntune.losses import distillation_loss
from dyntune.policies.base import Output
from dyntune.tuned import TunedModel

Criterion = Callable[[Tensor, Tensor], Tensor]
"""Logits ``(B, classes)`` and targets to a scalar loss."""


@dataclass(frozen=True)
class Loss:
    """One step's loss.

    Args:
        total: scalar to call ``backward`` on; the sum of ``terms``.
        terms: each term with its coefficient applied; ``task`` is always among them.
        output: logits and gates of the training pass.
    """

    total: Tensor
    terms: dict[str, Tensor]
    output: Output


def training_loss(model: TunedModel, images: Tensor, targets: Tensor, criterion: Criterion = F.cross_entropy) -> Loss:
    """The loss that ``fit`` minimises, for training loops of your own.

    For ``dyt`` it is ``CE(dispatched, y) + 2 (mean gate - rate)^2 + CE(complete, y) + KL(complete || dispatched)``,
    each coefficient an option of the part; the complete model is a second forward pass with the same weights (DyT,
    equation 8).

    Args:
        model: in train mode.
        images: ``(B, 3, height, width)``, preprocessed.
        targets: class indices ``(B,)``, or class shares ``(B, classes)`` under mixup.
        criterion: the task's loss on logits and targets.
    """
    model.backbone.begin_step()
    output = model.run(images)
    terms = {"task": criterion(output.logits, targets)}
    for policy in model.policies:
        for name, term in policy.loss_terms(output).items():
            terms[name] = terms[name] + term if name in terms else term
    weights = [policy.complete_weights() for policy in model.policies]
    complete_weight = max((own for own, _ in weights), default=0.0)
    distill_weight = max((distill for _, distill in weights), default=0.0)
    if complete_weight or distill_weight:
        complete = model.run(images, complete=True).logits
        if complete_weight:
            terms["complete"] = complete_weight * criterion(complete, targets)
        if distill_weight:
            terms["distill"] = distill_weight * distillation_loss(output.logits, complete)
    return Loss(sum(terms.values(), start=terms["task"].new_zeros(())), terms, output)
