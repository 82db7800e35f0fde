"""Folding: methods whose effect is a change of the host's weights become just that."""

from __future__ import annotations

import logging

from torch import nn

from dyntune.model.tuned import TunedModel
from dyntune.parts.methods.base import TuningMethod
from dyntune.parts.registry import expand
from dyntune.parts.spec import format_spec

log = logging.getLogger("dyntune")


def merge(model: TunedModel) -> nn.Module:
    """Folds what can be folded; see ``TunedModel.merge``."""
    if model.unmerged is None:
        for spec, reason in fold(model).items():
            log.warning("%s is not merged: %s.", spec, reason)
    return _result(model)


def fold(model: TunedModel) -> dict[str, str]:
    """Folds what can be folded into the backbone's weights, in place.

    Returns:
        What has to stay, by its spec, with the reason; ``model.unmerged`` afterwards.
    """
    if model.unmerged is not None:
        return model.unmerged
    backbone = model.backbone
    stays = backbone.fold()
    for module in list(backbone.modules()):
        fold_scale = getattr(module, "fold_scale", None)
        if fold_scale is not None:
            fold_scale()
    model.unmerged = dict(stays)
    for part in expand(model.parts):
        if isinstance(part, TuningMethod):
            if part.stays is not None or stays:
                model.unmerged[format_spec(part)] = part.stays or "the layers that it changes are not merged"
            elif part.name() in backbone.shared:
                del backbone.shared[part.name()]
        else:
            model.unmerged[format_spec(part)] = "which tokens a unit computes is decided anew for each image"
    return model.unmerged


def _result(model: TunedModel) -> nn.Module:
    """The plain host if it alone computes what the model computes."""
    return model if model.unmerged else model.backbone.host
