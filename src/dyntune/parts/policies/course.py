"""The course that the training of gates takes: their target, their noise and what holds them to the rate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dyntune.core.errors import CheckpointError
from dyntune.core.processes import mean_over_processes


class Course(nn.Module):
    """What the gates of one dispatch aim at, how noisy they decide, and what holds them to it, throughout a training.

    The target falls from 1, along half a cosine, to the rate; the noise falls linearly to none. Where nobody says how
    long the training is, the rate is the target and the noise stays whole, as published.

    From the beginning of the fall a multiplier on the distance between activation and target grows with it: the method
    of multipliers (Hestenes, 1969; Powell, 1969), beside the square that the rate loss is. The square alone comes to
    rest where it balances the task's gradient, at a distance.

    Args:
        rates: the rate twice, or the lowest and the highest of a range from which each training step draws one.
        falls: shares of the training until which the target is 1, and after which it is the rate.
        quiet: share of the training after which there is no noise; None for noise to the end.
        gain: by how much the multiplier grows in a whole training per unit of distance; None for no multiplier.
    """

    def __init__(
        self,
        rates: tuple[float, float],
        falls: tuple[float, float],
        quiet: float | None,
        gain: float | None = None,
    ) -> None:
        super().__init__()
        self.low, self.high = rates
        self.falls = falls
        self.quiet = quiet
        self.drawn = self.middle
        self.progress: float | None = None
        self.gain = gain
        self.steps: int | None = None
        self.multiplier = torch.zeros(())  # no buffer: it keeps its precision where the weights are in bf16

    @property
    def middle(self) -> float:
        """The rate halfway between the lowest and the highest."""
        return (self.low + self.high) / 2

    @property
    def rate(self) -> float:
        """The rate that holds now: in training that of the step, in evaluation the middle."""
        return self.drawn if self.training else self.middle

    @property
    def target(self) -> float:
        """What the activation is held to now."""
        return 1 + (self.rate - 1) * self._way if self.training else self.middle

    @property
    def noise(self) -> float:
        """Factor on the noise of decisions now."""
        if self.progress is None or self.quiet is None:
            return 1.0
        return max(0.0, 1 - self.progress / self.quiet) if self.quiet else 0.0

    @property
    def _way(self) -> float:
        """Share of the way from 1 to the rate that the target has gone."""
        if self.progress is None or self.progress >= self.falls[1]:
            return 1.0
        begin, end = self.falls
        done = (self.progress - begin) / (end - begin)
        return (1 - math.cos(math.pi * max(0.0, done))) / 2

    def begin_course(self, steps: int, travel: float | None) -> None:
        """A training of so many steps begins."""
        self.end_course()
        self.steps = steps

    def end_course(self) -> None:
        """From now on nobody knows how far a training is."""
        self.progress = self.steps = None
        self.multiplier = torch.zeros(())

    def course_state(self) -> dict[str, Tensor]:
        """The multiplier, where there is one."""
        return {} if self.gain is None else {"multiplier": self.multiplier}

    def resume_course(self, state: dict[str, Tensor]) -> None:
        """Takes up the multiplier.

        Raises:
            CheckpointError: it is none of a course.
        """
        for name, tensor in state.items():
            if name != "multiplier" or tensor.shape or not tensor.isfinite():
                raise CheckpointError(f"the course of a dispatch has one finite multiplier; given {name}.")
            self.multiplier = tensor

    def held(self, distance: Tensor) -> Tensor:
        """The multiplier's term of the loss of a step, and the multiplier's own step.

        Args:
            distance: of the mean activation to the target, a scalar.
        """
        if self.gain is None or self.steps is None or self.progress is None or self.progress < self.falls[0]:
            return distance.new_zeros(())
        step = mean_over_processes(distance.detach()) * (self.gain / self.steps)
        self.multiplier = self.multiplier.to(step.device) + step
        return self.multiplier * distance

    def begin_step(self, epoch: float | None = None, progress: float | None = None) -> None:
        """Moves to a training step; where there is a range, draws its rate from PyTorch's CPU generator, all alike."""
        self.progress = progress
        if self.low < self.high:
            self.drawn = self.low + (self.high - self.low) * torch.rand((), device="cpu").item()

    def distance(self) -> float:
        """How far the rate is from the middle, in logits."""
        return _logit(self.rate) - _logit(self.middle)


def _logit(rate: float) -> float:
    return math.log(rate / (1 - rate))
