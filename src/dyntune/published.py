"""Checkpoints of the methods' public code: read under their tensor names into a tuned model."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from dyntune.errors import CheckpointError
from dyntune.registry import expand
from dyntune.tuned import TunedModel


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
    names = {pattern: ours for part in expand(model.parts) for pattern, ours in part.published.items()}
    own = dict(model.backbone.named_parameters())
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        renamed = next((re.sub(p, ours, name) for p, ours in names.items() if re.search(p, name)), f"host.{name}")
        if renamed not in own:
            raise CheckpointError(f"{name!r} of the checkpoint has no place in {model.spec}; are the methods the same?")
        if own[renamed].shape != tensor.shape:
            raise CheckpointError(
                f"{name!r} of the checkpoint is {tuple(tensor.shape)}, but {model.spec} needs "
                f"{tuple(own[renamed].shape)}; are the sizes the same?"
            )
        found[renamed] = tensor
    missing = sorted(model.tuned_state().keys() - found.keys())
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {', '.join(missing[:5])}{' and more' if len(missing) > 5 else ''}."
        )
    with torch.no_grad():
        for name, tensor in found.items():
            own[name].copy_(tensor)
