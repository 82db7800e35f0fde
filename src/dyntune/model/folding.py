"""Folding: methods whose effect is a change of the host's weights become just that."""

from __future__ import annotations

from collections.abc import Iterable

from dyntune.backbones.base import Backbone
from dyntune.parts.methods.base import TuningMethod
from dyntune.parts.registry import expand
from dyntune.parts.spec import Part, format_spec


def fold(backbone: Backbone, parts: Iterable[Part]) -> dict[str, str]:
    """Writes what can be folded into the host's weights, in place.

    Args:
        backbone: with the parts installed.
        parts: tuning methods, token policies and presets.

    Returns:
        What has to stay, by its spec, with the reason.
    """
    stays = backbone.fold()
    for unit in backbone.all_units():
        for module in unit.beside():
            module.fold_scale()
    unmerged = dict(stays)
    for part in expand(parts):
        if isinstance(part, TuningMethod):
            if part.stays is not None or stays:
                unmerged[format_spec(part)] = part.stays or "the layers that it changes are not merged"
            elif part.name() in backbone.shared:
                del backbone.shared[part.name()]
        else:
            unmerged[format_spec(part)] = "which tokens a unit computes is decided anew for each image"
    return unmerged
