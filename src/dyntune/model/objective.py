"""The training loss of a tuned model: the task's loss plus what its token policies ask for."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.backbones.hosts import not_tuned, wrap
from dyntune.core.losses import feature_loss, trust
from dyntune.core.modes import evaluating
from dyntune.model.executions import Masked
from dyntune.model.features import features
from dyntune.model.forward import run
from dyntune.model.tasks import Classification, Task
from dyntune.model.tasks.classification import require_head
from dyntune.model.worth import fit_units, unit_worth
from dyntune.parts.policies.base import CompletePass, Fitting, Output, TokenPolicy, Weighing, learners
from dyntune.parts.spec import format_spec

log = logging.getLogger("dyntune")

Criterion = Callable[[Tensor, Tensor], Tensor]
"""Outputs, such as logits ``(B, classes)``, and targets to a scalar loss."""


@runtime_checkable
class Learner(Protocol):
    """What a loss must know of a tuned model."""

    backbone: Backbone
    policies: tuple[TokenPolicy, ...]
    task: Task
    training: bool

    def run(self, images: Tensor, *, complete: bool = False) -> Output:
        """See ``TunedModel.run``."""
        ...


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


def training_loss(
    model: Learner,
    images: Tensor,
    targets: Tensor,
    criterion: Criterion | None = None,
    *,
    teacher: nn.Module | None = None,
    epoch: float | None = None,
    step: int | None = None,
) -> Loss:
    """The loss that ``fit`` minimises, for training loops of your own.

    For ``dyt`` it is ``CE(dispatched, y) + w (mean gate - rate)^2 + CE(complete, y) + KL(complete || dispatched)``, w
    the ``rate_weight`` and each coefficient an option of the part; the complete model is a second forward pass with the
    same weights (DyT, equation 8). In the recipe ``steady`` the distance between the two models' features is one more
    term, as far as the complete one knows its images. ``docs/training_speed.md`` tells what the cost of the complete
    model may be lowered with.

    Args:
        model: in train mode.
        images: ``(B, 3, height, width)``, preprocessed.
        targets: what the task takes; for classification class indices ``(B,)``, or class shares ``(B, classes)``.
        criterion: another loss on outputs and targets than that of the model's task.
        teacher: a frozen model of the same task, tuned or a plain backbone, for policies that learn from one
            (DynamicViT); their terms are left out without it.
        epoch: epochs done, with the fraction of the running one, for what follows a schedule (EViT's keep rate).
        step: number of the step in the whole training, from 0, for a complete model that does not run in every step.
            Without it, steps in train mode are counted from ``TunedModel.begin_training`` on; where nobody has called
            that, the complete model runs in every step. Processes that train together must give the same number.

    Raises:
        SpecError: the model is not tuned.
        TrainingError: it has no head, and no criterion is given that learns from features.
    """
    if not isinstance(model, Learner):
        raise not_tuned(model, "training_loss")
    if criterion is None and isinstance(model.task, Classification):
        require_head(model.backbone, "no loss of classes")
    criterion = criterion or model.task.loss
    _warn_without_course(model)
    if model.training:
        model.backbone.begin_step(epoch, step)
        if step is None and model.backbone.steps is not None:
            step = model.backbone.step - 1
        look_at_units(model, lambda: images)
    output = model.run(images)
    terms: dict[str, Tensor] = {}

    def add(name: str, term: Tensor) -> None:
        terms[name] = terms[name] + term if name in terms else term

    add("task", criterion(output.logits, targets))
    taught = None
    if teacher is not None and learners(model.policies):
        taught = dense_output(teacher, images)
    for policy in model.policies:
        for name, term in policy.loss_terms(output, taught).items():
            add(name, term)
    asked = functools.reduce(
        CompletePass.joined, (policy.complete_pass(output) for policy in model.policies), CompletePass()
    )
    if asked.wanted and (step is None or step % asked.every == 0):
        factor = 1 if step is None else asked.every
        count = math.ceil(len(images) * asked.share)
        # A distillation lets no gradient into its teacher: without a loss of its own it needs no graph.
        with torch.set_grad_enabled(torch.is_grad_enabled() and asked.weight > 0):
            complete = model.run(images[:count], complete=True)
        missed = criterion(complete.logits, targets[:count])
        if asked.weight:
            add("complete", factor * asked.weight * missed)
        if asked.distill:
            taught_by = complete.logits.detach()
            add("distill", factor * asked.distill * model.task.distillation(output.logits[:count], taught_by))
        if asked.features:
            own, wanted = (features(model.backbone, each) for each in (output, complete))
            add("feature", factor * asked.features * trust(missed) * feature_loss(own[:count], wanted))
    return Loss(sum(terms.values(), start=terms["task"].new_zeros(())), terms, output)


def look_at_units(model: Learner, images: Callable[[], Tensor]) -> None:
    """Lets policies fit what stands in for units, and weigh these, on the first images that a training will show.

    ``training_loss`` does so on the first batch, unless it has been done.

    Args:
        model: in train mode, after ``begin_training``.
        images: called where a policy wants to look; gives ``(B, 3, height, width)``, preprocessed, in random order, of
            which at most ``worth.IMAGES`` are used.
    """
    for policy in model.policies:
        if isinstance(policy, Fitting) and (units := policy.unfitted(model.backbone)):
            with evaluating(model.backbone):
                fit_units(model.backbone, units, policy.passing, policy.fit, images())
        if isinstance(policy, Weighing) and (units := policy.unweighed(model.backbone)):
            with evaluating(model.backbone):
                policy.weigh(unit_worth(model.backbone, units, images()))


def _warn_without_course(model: Learner) -> None:
    """Says once that gates do not know how long they are trained."""
    if model.training and model.backbone.steps is None:
        for policy in model.policies:
            if policy.follows_length:
                _without_course(format_spec(policy))


@functools.cache
def _without_course(spec: str) -> None:
    log.warning(
        "%s trains its gates by the length of the training, which nobody has told: call "
        "model.begin_training(steps, lr) before the first step, or give recipe=published.",
        spec,
    )


@torch.no_grad()
def dense_output(teacher: nn.Module, images: Tensor) -> Output:
    """What a teacher, tuned or a plain backbone, makes of images; in eval mode, without gradient."""
    with evaluating(teacher):
        if isinstance(teacher, Learner):
            return teacher.run(images)
        return run(teacher if isinstance(teacher, Backbone) else wrap(teacher), (), images, Masked())
