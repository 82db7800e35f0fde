"""What every runtime offers for a deployed model."""

from __future__ import annotations

import abc
from pathlib import Path

import torch
from torch import Tensor

from dyntune.core.errors import DeploymentError, in_one_line


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

    def run(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and which patches each gated unit computed, bool, ``(B, gates, patches)``; None if not exported.

        Raises:
            DeploymentError: the images are not such as the model takes: on the CPU, in fp32 and of its size.
        """
        given = f"images {tuple(images.shape)} in {images.dtype} on {images.device}"
        if images.device.type != "cpu" or images.dtype is not torch.float32:
            raise DeploymentError(
                f"given {given}; a deployed model takes torch.float32 on the CPU: images.cpu().float()."
            )
        try:
            return self.compute(images.detach())
        except Exception as error:  # the runtimes' own errors have no common base
            raise DeploymentError(
                f"the deployed model cannot compute {given}: {in_one_line(error)}. It takes (B, 3, height, width), "
                "preprocessed."
            ) from error

    @abc.abstractmethod
    def compute(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """What ``run`` gives, for images on the CPU and in fp32."""
