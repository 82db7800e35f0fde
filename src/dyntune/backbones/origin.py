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

from dyntune.backbones.builtin import BUILTIN_BACKBONE
from dyntune.core.digests import sample

OR_BUILT_IN = ", or use the built-in backbone (vit_mini_patch4_32.dyntune, what train does without --model)"
"""The end of what is advised to those who choose a backbone whose weights cannot be had."""
OR_BUILT = ", or the model itself (load(folder, backbone=model))"
"""The same for those who need that one."""
CLIPS, INFLATED = "frames:", "inflated:"
"""In front of the name of an image model that each frame of a clip goes through, or all together; they name no
place."""


@dataclass(frozen=True)
class BackboneSource:
    """All that is needed to build a backbone again.

    Args:
        name: model name, with the tag of its weights if it has one; None for a model that cannot be built from a name.
        arguments: keyword arguments for whoever builds it, ``timm.create_model`` for timm's models.
        weights: path of a local weight file; None without.
        published: whether the weights are known to be those that are had by ``name`` alone, because they were loaded
            so or compared with them. Without that and ``weights`` nobody knows where to have them.
    """

    name: str | None
    arguments: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    published: bool = False

    @property
    def known(self) -> bool:
        """Whether the weights can be had again."""
        return self.published or self.weights is not None

    @property
    def title(self) -> str:
        """The backbone in a heading: its name, and where its weights are not the published ones, whose they are."""
        if self.name is None:
            return "a custom model"
        if self.published:
            return self.name
        if self.weights is not None:
            return f"{self.name} with weights from {Path(self.weights).name}"
        return f"{self.architecture} with weights of unknown origin"

    @property
    def architecture(self) -> str:
        """The name without the tag of its weights."""
        name = self.name or "its backbone"
        return name if ":" in name else name.partition(".")[0]

    @property
    def repository(self) -> str | None:
        """The repository on a hub that the weights are known to be from, if they are from one."""
        if self.name is None or not self.published or self.name == BUILTIN_BACKBONE:
            return None
        library, colon, place = self.name.partition(":")
        if not colon:
            return f"timm/{self.name}"
        return place.partition("@")[0] if library in ("hf", "hf-hub") and not self._local else None

    @property
    def _own_name(self) -> str:
        """The name of the model itself, without what is put in front of an image model's for clips."""
        return (self.name or "").removeprefix(CLIPS).removeprefix(INFLATED)

    @property
    def _local(self) -> bool:
        """Whether the name is that of a folder."""
        place = self._own_name.partition(":")[2]
        return Path(place).is_absolute() or place.startswith(".")

    def without_paths(self) -> Self:
        """The same for others, who do not have the files of this machine and need not know where they lie."""
        if self._local:
            return type(self)(None)
        return replace(self, weights=None)

    def with_weights(self, weights: str | Path | None) -> Self:
        """The same source with its weights in a local file."""
        return replace(self, weights=None if weights is None else str(weights))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @property
    def places(self) -> tuple[str, ...]:
        """What it names beside models of timm's own list: hubs, folders, files."""
        name = (self._own_name,) if ":" in self._own_name else ()
        return name if self.weights is None else (*name, self.weights)

    @property
    def weights_in_words(self) -> str:
        """Where the weights come from."""
        library, colon, _ = self._own_name.partition(":")
        if self.weights is not None:
            return f"weights from {self.weights}"
        if self.name is None:
            return "weights as they were given"
        if not self.published:
            return "weights that are not known to be published"
        if self._own_name == BUILTIN_BACKBONE:
            return "weights that come with Dyntune"
        return f"weights from there ({library})" if colon else "weights that timm has for it"

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
