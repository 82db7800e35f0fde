"""Where a backbone comes from: its name, how it was built, and the file or hub that its weights were read from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class BackboneSource:
    """All that is needed to build a backbone again.

    Args:
        name: model name, with the tag of its weights if it has one; None for a model that cannot be built from a name.
        arguments: keyword arguments for whoever builds it, ``timm.create_model`` for timm's models.
        weights: path of a local weight file; None for the weights that are downloaded for ``name``.
    """

    name: str | None
    arguments: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None

    def with_weights(self, weights: str | Path | None) -> Self:
        """The same source with its weights in a local file."""
        return replace(self, weights=None if weights is None else str(weights))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A short digest of named tensors that tells two sets of weights apart, from 64 values of each tensor.

    It does not depend on device, and reading a few values keeps it quick for a backbone of several GB.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors):
        flat = tensor.detach().reshape(-1)
        picked = flat[torch.linspace(0, max(len(flat) - 1, 0), min(64, len(flat))).long().to(flat.device)]
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(picked.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
