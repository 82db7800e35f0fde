"""What every runtime offers for a deployed model."""

from __future__ import annotations

import abc
from pathlib import Path

from torch import Tensor


class Runtime(abc.ABC):
    """A deployed model, opened from its file.

    Args:
        path: the file.
        threads: that one forward pass may use; None for as many as the runtime takes by itself.

    Raises:
        DeploymentError: the runtime is not installed, or cannot read the file.
    """

    @abc.abstractmethod
    def __init__(self, path: str | Path, threads: int | None = None) -> None: ...

    def __call__(self, images: Tensor) -> Tensor:
        """Images ``(B, 3, height, width)``, preprocessed, to logits ``(B, classes)``."""
        return self.run(images)[0]

    @abc.abstractmethod
    def run(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and which patches each gated unit computed, bool, ``(B, gates, patches)``; None if not exported."""
