"""The state of an unfinished run in one file, so that it is always whole."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyntune.core.digests import values_digest
from dyntune.core.errors import CheckpointError, in_one_line
from dyntune.core.files import write_atomically
from dyntune.model.adapter_folder import STATE

_DIGEST = "sha256"
"""The entry with the digest of all others; states of earlier versions have none."""


@dataclass
class RunState:
    """Where a run is.

    Args:
        epoch: epochs that are complete.
        step: steps done of the running epoch.
        tensors: the trained tensors, and the statistics that modules keep.
        optimizer: the optimiser's state.
        scaler: the gradient scaler's state under fp16.
        best: figure of merit, such as accuracy, of the saved adapter, minus infinity before there is one.
        best_epoch: the epoch that it comes from, counted from 1.
        best_tensors: the same of that epoch.
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
        held = vars(self) | {_DIGEST: values_digest(vars(self))}
        write_atomically(folder / STATE, lambda path: torch.save(held, path))

    @classmethod
    def read(cls, folder: Path) -> RunState:
        """The state in ``folder``, read without running anything that it contains.

        Raises:
            CheckpointError: the file is damaged, or is none that ``write`` wrote.
        """
        path = folder / STATE
        try:
            if not path.is_file():
                raise ValueError("it is no file")
            held = torch.load(path, map_location="cpu", weights_only=True)
            if sum(_bytes(tensor) for tensor in _tensors(held)) > path.stat().st_size:
                raise ValueError("its tensors are larger than the file")
            digest = held.pop(_DIGEST, None)
            if digest is not None and digest != values_digest(held):
                raise ValueError("digests differ")
            state = cls(**held)
            state._require_sound()
            return state
        except Exception as error:  # whatever PyTorch meets in a damaged file
            # PyTorch's own words advise to load the file in a way that would run code from it.
            why = "it is no file of plain tensors" if isinstance(error, pickle.UnpicklingError) else in_one_line(error)
            raise CheckpointError(
                f"{path} is damaged ({why}). Start again with another output folder; the adapters that "
                f"were saved in {folder} are not touched by it."
            ) from error

    def require_fit(self, own: dict[str, Tensor], optional: set[str], folder: Path, epochs: int, steps: int) -> None:
        """Checks that the state is one of a model and a course.

        Args:
            own: what training changes, by name in files.
            optional: names among them that states of earlier versions lack.
            folder: where it was read.
            epochs: of the whole run.
            steps: of an epoch.

        Raises:
            CheckpointError: it is not.
        """
        problems = []
        for given in (self.tensors, self.best_tensors or self.tensors):  # before the first epoch's end none is the best
            names = sorted((own.keys() - optional - given.keys()) | (given.keys() - own.keys()))
            shapes = [name for name, p in own.items() if name in given and given[name].shape != p.shape]
            spoilt = [name for name, tensor in given.items() if not bool(tensor.isfinite().all())]
            problems += [
                f"{name} is missing, unknown, of another shape or not finite" for name in names + shapes + spoilt
            ]
        if not (0 <= self.epoch <= epochs and 0 <= self.step <= steps and 0 <= self.best_epoch <= self.epoch):
            problems.append(f"epoch {self.epoch} and step {self.step} are not of {epochs} epochs of {steps} steps")
        if problems:
            raise CheckpointError(
                f"{folder / STATE} is not the state of this run: {problems[0]}. Start again with another output folder."
            )

    def _require_sound(self) -> None:
        """Raises an exception unless every entry is of its kind."""
        for name in ("epoch", "step", "best_epoch"):
            if type(getattr(self, name)) is not int:
                raise TypeError(f"{name} is no whole number")
        if not (self.best < math.inf and math.isfinite(self.seconds)):  # which nan is not either
            raise ValueError("best or seconds is no number that it can be")
        for name in ("tensors", "best_tensors", "course"):
            named = getattr(self, name)
            if not all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in named.items()):
                raise TypeError(f"{name} are no tensors by name")
        if not isinstance(self.optimizer, dict) or not isinstance(self.identity, dict):
            raise TypeError("optimizer and identity must be dictionaries")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _bytes(tensor: Tensor) -> int:
    """What a tensor takes once it is written out, which may be more than it holds."""
    return tensor.numel() * tensor.element_size()
