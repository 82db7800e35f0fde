"""The course that the training of gates takes: their target and their noise."""

from __future__ import annotations

import math

import torch
from torch import nn


class Course(nn.Module):
    """What the gates of one dispatch aim at, and how noisy they decide, at each point of a training.

    The target falls from 1, along half a cosine, to the rate; the noise falls linearly to none. Where nobody says how
    long the training is, the rate is the target and the noise stays whole, as published.

    Args:
        rates: the rate twice, or the lowest and the highest of a range from which each training step draws one.
        falls: shares of the training until which the target is 1, and after which it is the rate.
        quiet: share of the training after which there is no noise; None for noise to the end.
    """

    def __init__(self, rates: tuple[float, float], falls: tuple[float, float], quiet: float | None) -> None:
        super().__init__()
        self.low, self.high = rates
        self.falls = falls
        self.quiet = quiet
        self.drawn = self.middle
        self.progress: float | None = None

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
        if self.progress < begin:
            return 0.0
        return (1 - math.cos(math.pi * (self.progress - begin) / (end - begin))) / 2

    @property
    def late(self) -> float:
        """Share of what follows the fall that is done; 0 before, and where nobody says how long the training is."""
        end = self.falls[1]
        if self.progress is None or self.progress <= end:
            return 0.0
        return (self.progress - end) / (1 - end)

    def between(self, first: float, last: float) -> bool:
        """Whether a training is between two shares of it; always in evaluation, or of unknown length."""
        if not self.training or self.progress is None:
            return True
        return first <= self.progress and (self.progress < last or last == 1)

    def end_course(self) -> None:
        """From now on nobody knows how far a training is."""
        self.progress = None

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
