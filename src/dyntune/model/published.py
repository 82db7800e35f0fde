"""Checkpoints of the methods' public code: read under their tensor names into a tuned model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dyntune.core.errors import CheckpointError
from dyntune.model.tuned import TunedModel
from dyntune.parts.registry import expand


def load_published(model: TunedModel, state: Mapping[str, Tensor]) -> None:
    """Fills a tuned model, backbone included, from a state dict of the public code of its methods.

    Each method and policy knows the names of its public code (``published``); the backbone's are timm's. Read the file
    with ``torch.load(path, weights_only=True)``.

    Args:
        model: with the same methods and sizes as the checkpoint; filled in place.
        state: tensors by their public names, the whole model or the tuned part of it.

    Raises:
        CheckpointError: a tensor has no place in the model or another shape, or a tuned tensor is missing.
    """
    own = dict(model.backbone.named_parameters())
    # A module that is changed by a method, or wrapped by PEFT, stands deeper than in the plain host.
    plain = {model.backbone.saved_name(name.replace(".base.", ".")): name for name in own if name.startswith("host.")}
    saved = {model.backbone.saved_name(name): name for name in own}
    parts = expand(model.parts)
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        called = model.backbone.published_name(name)
        mine = (ours for part in parts if (ours := part.from_published(name, tensor)) is not None)
        for own_name, value in next(mine, {plain.get(f"host.{called}", saved.get(name, name)): tensor}).items():
            if own_name not in own:
                raise CheckpointError(
                    f"{name!r} of the checkpoint has no place in {model.spec}; are the methods the same?"
                )
            if own[own_name].shape != value.shape:
                raise CheckpointError(
                    f"{name!r} of the checkpoint is {tuple(value.shape)}, but {model.spec} needs "
                    f"{tuple(own[own_name].shape)}; are the sizes the same?"
                )
            found[own_name] = value
    missing = sorted(model.tuned_state().keys() - found.keys())
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {', '.join(missing[:5])}{' and more' if len(missing) > 5 else ''}. Add what is "
            "missing to the state dict under these names without the leading host., for instance head.weight."
        )
    with torch.no_grad():
        for name, tensor in found.items():
            own[name].copy_(tensor)
