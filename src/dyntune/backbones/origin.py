"""Where a backbone comes from: its name, how it was built, and the file or hub that its weights were read from.

Names beyond timm's own and paths are followed on this machine once its user has given them here; a saved adapter may
come from a stranger, and does not decide what is fetched, or read outside its folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from dyntune.core.digests import sample

CLIPS, INFLATED = "frames:", "inflated:"
"""In front of the name of an image model that each frame of a clip goes through, or all together; they name no
place."""


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

    @property
    def places(self) -> tuple[str, ...]:
        """What it names beside models of timm's own list: hubs, folders, files."""
        own = (self.name or "").removeprefix(CLIPS).removeprefix(INFLATED)
        name = (own,) if ":" in own else ()
        return name if self.weights is None else (*name, self.weights)

    def remember(self) -> None:
        """Notes for this user of this machine that the places were given here, so that saved models may name them."""
        for place in self.places:
            with contextlib.suppress(OSError):  # without a home to note it in, load is told each time
                note = _note(place)
                note.parent.mkdir(parents=True, exist_ok=True)
                note.touch()

    def unknown(self, folder: Path | None = None) -> tuple[str, ...]:
        """The places that were not given on this machine and do not lie in ``folder``."""
        return tuple(place for place in self.places if not _note(place).is_file() and not _lies_in(place, folder))


def _note(place: str) -> Path:
    """The file that says that a place was given here."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "dyntune" / "backbones" / hashlib.sha256(place.encode("utf-8", "surrogatepass")).hexdigest()


def _lies_in(place: str, folder: Path | None) -> bool:
    path = Path(place.partition(":")[2] or place)
    try:
        return folder is not None and path.is_absolute() and path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # no path at all, or links in a circle
        return False


def fingerprint(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> str:
    """A short digest of named tensors that tells two sets of weights apart, from 64 values of each tensor.

    It does not depend on device, and reading a few values keeps it quick for a backbone of several GB.

    Args:
        tensors: by name.
        dtype: take them as if they were converted to it; None as they are.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        values = sample(tensor)
        digest.update(values.to(dtype or values.dtype).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
