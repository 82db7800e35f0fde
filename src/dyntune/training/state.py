"""The state of an unfinished run in one file, so that it is always whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyntune.core.errors import CheckpointError
from dyntune.core.files import write_atomically

STATE = "training_state.pt"


@dataclass
class RunState:
    """Where a run is.

    Args:
        epoch: epochs that are complete.
        step: steps done of the running epoch.
        tensors: the trained tensors.
        optimizer: the optimiser's state.
        scaler: the gradient scaler's state under fp16.
        best: figure of merit, such as accuracy, of the saved adapter, -1 before there is one.
        best_epoch: the epoch that it comes from, counted from 1.
        best_tensors: the trained tensors of that epoch.
        seconds: time spent so far.
        identity: what decides the run's outcome, to refuse resuming another run.
        course: what follows the course of the training, beside the trained tensors.
    """

    epoch: int
    step: int
    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None
    best: float
    best_epoch: int
    best_tensors: dict[str, Tensor]
    seconds: float
    identity: dict[str, Any]
    course: dict[str, Tensor] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Replaces the state in ``folder`` in one step."""
        write_atomically(folder / STATE, lambda path: torch.save(vars(self), path))

    @classmethod
    def read(cls, folder: Path) -> RunState:
        """The state in ``folder``, read without running anything that it contains.

        Raises:
            CheckpointError: the file is damaged.
        """
        try:
            return cls(**torch.load(folder / STATE, map_location="cpu", weights_only=True))
        except Exception as error:
            raise CheckpointError(
                f"{folder / STATE} cannot be read ({type(error).__name__}). Start again with another output folder."
            ) from error
