"""The teacher of a run: a frozen model of the same task, for policies that learn from one, such as DynamicViT."""

from __future__ import annotations

import logging

import torch
from torch import nn

from dyntune.backbones.base import Backbone
from dyntune.backbones.hosts import wrap
from dyntune.backbones.origin import fingerprint
from dyntune.core.errors import TrainingError
from dyntune.core.words import counted
from dyntune.model.tuned import TunedModel
from dyntune.parts.policies.base import learners

log = logging.getLogger("dyntune")


def ready_teacher(model: TunedModel, teacher: nn.Module | None, device: torch.device) -> nn.Module | None:
    """The teacher, a plain one behind the backbone interface, on ``device`` and in eval mode.

    Returns:
        None where no policy of the model learns from one.

    Raises:
        TrainingError: it does not suit the model.
    """
    if teacher is not None and not isinstance(teacher, nn.Module):
        raise TrainingError(f"teacher={teacher!r} is no model; give one, for instance teacher=dyntune.load(folder).")
    if teacher is None or not learners(model.policies):
        return None
    backbone = teacher.backbone if isinstance(teacher, TunedModel) else wrap(teacher)
    if {*teacher.parameters()} & {*model.parameters()}:
        raise TrainingError("the teacher shares parameters with the model; build it on a backbone of its own.")
    if isinstance(teacher, TunedModel) and any(p.reduces(u) for p in teacher.policies for u in backbone.all_units()):
        raise TrainingError(
            f"the teacher, {teacher.spec}, merges or drops tokens, but a teacher has all of them. Give one that was "
            "tuned without such a policy."
        )
    if backbone.classes != model.backbone.classes:
        raise TrainingError(
            f"the teacher has {counted(backbone.classes, 'class')}, the model {model.backbone.classes}. Give a "
            "teacher that was trained on the same classes."
        )
    if isinstance(teacher, TunedModel):
        for what, taught, own in (
            ("task", teacher.task.name, model.task.name),
            ("classes", teacher.classes, model.classes),
            ("preprocessing", teacher.preprocessing, model.preprocessing),
        ):
            if None not in (taught, own) and taught != own:
                raise TrainingError(
                    f"the teacher was trained with {what} {taught}, the model has {own}. Give a teacher that was "
                    "trained on the same data with the same preprocessing."
                )
    else:
        _compare_pixels(model, backbone)
    for policy in learners(model.policies):
        policy.check_teacher(model.backbone, backbone)
    return (teacher if isinstance(teacher, TunedModel) else backbone).to(device).eval()


def _compare_pixels(model: TunedModel, teacher: Backbone) -> None:
    """Warns where a plain teacher was trained on pixels that were normalised otherwise, as far as it says so."""
    taught, own = teacher.preprocessing(), model.preprocessing
    if (taught.mean, taught.std) != (own.mean, own.std):
        log.warning(
            "the teacher says that it was trained on pixels with mean %s and deviation %s, and gets those of the "
            "model, with %s and %s.",
            *(taught.mean, taught.std, own.mean, own.std),
        )


def warn_about_teacher(model: TunedModel, teacher: nn.Module | None) -> None:
    """Logs a warning where policies learn from a teacher and there is none, or the other way round."""
    lacking = [policy.name() for policy in learners(model.policies)]
    if teacher is not None and not lacking:
        log.warning("the teacher is not used: %s has no token policy that learns from one (dynamicvit).", model.spec)
    if teacher is None and lacking:
        log.warning(
            "%s: no teacher is given, so the training loss lacks its distillation terms. Train a dense model on the "
            "same data first, and give it with fit(..., teacher=model) or --teacher RUN.",
            " and ".join(lacking),
        )


def teacher_identity(teacher: nn.Module | None) -> str | None:
    """Tells two teachers apart: what they are, and a digest of their weights."""
    if teacher is None:
        return None
    kind = teacher.spec if isinstance(teacher, TunedModel) else type(getattr(teacher, "host", teacher)).__name__
    weights = teacher.backbone if isinstance(teacher, TunedModel) else teacher
    return f"{kind} {fingerprint(weights.state_dict().items())}"
