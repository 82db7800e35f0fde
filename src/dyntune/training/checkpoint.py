"""What a training keeps: the tensors of its best epoch, and in the run's folder the state that it can go on from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyntune.backbones.base import file_name
from dyntune.model.tuned import TunedModel
from dyntune.training.optimizer import fill_optimizer
from dyntune.training.run_folder import require_own_adapter, require_same_run
from dyntune.training.state import RunState


class Checkpoint:
    """The best epoch of a run, and where the run is.

    Args:
        model: that is trained.
        optimizer: that trains it.
        scaler: of its gradients under fp16; None without one.
        identity: what decides the run's outcome.

    Attributes:
        best: figure of merit of the epoch that is kept; minus infinity where there is none, or none was measured.
        best_epoch: that epoch, counted from 1; 0 where there is none.
        seconds: time spent on the run before it was stopped.
    """

    def __init__(self, model: TunedModel, optimizer: Any, scaler: Any, identity: dict[str, Any]) -> None:
        self.model, self.optimizer, self.scaler, self.identity = model, optimizer, scaler, identity
        self.best, self.best_epoch = -math.inf, 0
        self.seconds = 0.0
        self._best_tensors: dict[str, Tensor] = {}

    def keep(self, epoch: int, score: float | None) -> None:
        """Keeps the model as it is as that of the best epoch so far.

        Args:
            epoch: counted from 1.
            score: its figure of merit, where later epochs shall be compared with it.
        """
        self.best = -math.inf if score is None else score
        self.best_epoch = epoch
        self._best_tensors = {name: tensor.clone() for name, tensor in self._tensors().items()}

    def restore_best(self) -> None:
        """Gives the model the tensors of the best epoch."""
        self._fill(self._best_tensors)

    def write(self, out: Path, epoch: int, step: int, seconds: float) -> None:
        """Replaces the state in the run's folder.

        Args:
            out: the folder.
            epoch: epochs that are complete.
            step: steps done of the running epoch.
            seconds: time spent so far.
        """
        RunState(
            epoch=epoch,
            step=step,
            tensors=self._tensors(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict() if self.scaler else None,
            best=self.best,
            best_epoch=self.best_epoch,
            best_tensors=self._best_tensors,
            seconds=seconds,
            identity=self.identity,
            course={name: tensor.cpu() for name, tensor in self.model.backbone.course_state().items()},
        ).write(out)

    def resume(self, out: Path, epochs: int, steps_per_epoch: int) -> tuple[int, int]:
        """Fills model, optimiser and what is kept with the state in the run's folder.

        Args:
            out: the folder.
            epochs: of the whole run.
            steps_per_epoch: of each of them.

        Returns:
            Epochs that are complete, and steps done of the next one.

        Raises:
            TrainingError: the run was started with other options.
            CheckpointError: the state is damaged, or of another model; or the run's adapter is not there any more.
        """
        state = RunState.read(out)
        require_same_run(out, state, self.identity, steps_per_epoch, self.model)
        own = {file_name(name): tensor for name, tensor in self.model.course_tensors().items()}
        statistics = own.keys() - map(file_name, self.model.tuned_state())
        state.require_fit(own, statistics, out, epochs, steps_per_epoch)
        require_own_adapter(self.model, state, out)
        fill_optimizer(self.optimizer, state.optimizer)
        self._fill(state.tensors)
        self.model.backbone.resume_course(state.course)
        if state.scaler and self.scaler:
            self.scaler.load_state_dict(state.scaler)
        self.best, self.best_epoch = state.best, state.best_epoch
        self._best_tensors = state.best_tensors
        self.seconds = state.seconds
        return state.epoch, state.step

    def _tensors(self) -> dict[str, Tensor]:
        """What training changes, by its names in files."""
        return {file_name(name): p.detach().cpu() for name, p in self.model.course_tensors().items()}

    def _fill(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self.model.course_tensors().items():
                if file_name(name) in tensors:  # states of earlier versions lack statistics
                    tensor.copy_(tensors[file_name(name)])
