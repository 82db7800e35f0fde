"""The course of a training, as modules on a backbone are told of it: it begins, each step of it, and it is over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from dyntune.core.errors import CheckpointError


@runtime_checkable
class Stepping(Protocol):
    """A module in ``Training.shared`` that is told when a training step begins."""

    def begin_step(self, epoch: float | None = None, progress: float | None = None) -> None:
        """See ``Training.begin_step``."""
        ...


@runtime_checkable
class Ending(Protocol):
    """A module that is told that a training is over."""

    def end_course(self) -> None:
        """See ``Training.end_training``."""
        ...


@runtime_checkable
class Paced(Ending, Protocol):
    """A module that is told how far a training goes, and may train other tensors meanwhile than it is read by."""

    def begin_course(self, travel: float | None) -> None:
        """See ``Training.begin_training``."""
        ...

    def course_state(self) -> dict[str, Tensor]:
        """What has to be kept of a training that is interrupted, beside the trained tensors."""
        ...

    def resume_course(self, state: dict[str, Tensor]) -> None:
        """Takes up what ``course_state`` gave, after ``begin_course``."""
        ...


class Training(nn.Module):
    """A module that is trained, and tells its modules that follow a course how far the training is."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.ModuleDict()
        """Modules that a method's places have in common, under the method's name."""
        self.steps: int | None = None
        """Steps of the training that runs, where somebody has said so."""
        self.step = 0
        """Steps of it that have begun."""

    def begin_training(self, steps: int, travel: float | None) -> None:
        """Tells modules that a training begins, and how far it goes, for what follows a course over the whole of it.

        Args:
            steps: how often ``begin_step`` will be called.
            travel: how far the optimiser could move a number in the whole training at its peak learning rate, where
                that can be said.
        """
        self.steps, self.step = steps, 0
        for _, module in self._paced():
            module.begin_course(travel)

    def end_training(self) -> None:
        """Tells modules that the training is over; another one may begin."""
        self.steps = None
        for module in self.modules():
            if module is not self and isinstance(module, Ending):
                module.end_course()

    def course_state(self) -> dict[str, Tensor]:
        """What has to be kept of a training that is interrupted, beside the trained tensors, by name."""
        return {f"{path}.{key}": t for path, module in self._paced() for key, t in module.course_state().items()}

    def resume_course(self, state: dict[str, Tensor]) -> None:
        """Takes up what ``course_state`` gave, after ``begin_training``.

        Raises:
            CheckpointError: it is the state of other modules.
        """
        left = dict(state)
        for path, module in self._paced():
            start = f"{path}."
            own = {name: left.pop(name) for name in [*left] if name.startswith(start)}
            module.resume_course({name.removeprefix(start): tensor for name, tensor in own.items()})
        if left:
            raise CheckpointError(f"the course of a training is not one of this model: it has {next(iter(left))}.")

    def _paced(self) -> Iterator[tuple[str, Paced]]:
        for path, module in self.named_modules():
            if module is not self and isinstance(module, Paced):
                yield path, module

    def begin_step(self, epoch: float | None = None, step: int | None = None) -> None:
        """Tells what the places have in common that a training step begins: its forward passes belong together.

        Args:
            epoch: epochs done, with the fraction of the running one; None where nobody counts them.
            step: number of the step in the training, from 0; counted here where it is not given.
        """
        progress = None
        if self.steps is not None:
            self.step = self.step + 1 if step is None else step + 1
            progress = min(1.0, (self.step - 1) / self.steps)
        for module in self.shared.values():
            if isinstance(module, Stepping):
                module.begin_step(epoch, progress)
