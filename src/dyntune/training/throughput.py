"""How fast several models are: timed in turns in one process, so that their ratio can be trusted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3
"""Calls of each model before the first that is timed."""


@dataclass(frozen=True)
class Spread:
    """A figure over the rounds.

    Args:
        median: of the rounds.
        low: lower quartile.
        high: upper quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return cls(statistics.median(values), low, high)


@dataclass(frozen=True)
class Throughput:
    """How fast one model is beside the others that it was measured with.

    Args:
        images_per_second: median over the rounds.
        speedup: over the reference model, the median of the rounds' ratios.
        speedup_low: lower quartile of the rounds' ratios.
        speedup_high: upper quartile of the rounds' ratios.
    """

    images_per_second: float
    speedup: float
    speedup_low: float
    speedup_high: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Turns:
    """The times of one model.

    Args:
        calls: seconds of every call, by round.
        images: images in a call.
    """

    calls: tuple[tuple[float, ...], ...]
    images: int

    @property
    def images_per_second(self) -> Spread:
        """Over the rounds."""
        return Spread.of([self.images / statistics.fmean(turn) for turn in self.calls])

    def speedup(self, reference: Turns) -> Spread:
        """Over another model, from the ratio within each round."""
        pairs = zip(reference.calls, self.calls, strict=True)
        return Spread.of([statistics.fmean(base) / statistics.fmean(own) for base, own in pairs])


def time_in_turns(
    models: Mapping[str, Callable[[Tensor], Any]], images: Tensor, *, rounds: int = 15, seconds: float = 0.2
) -> dict[str, Turns]:
    """Times models in turns: each round runs every model, in rotating order, after ``WARM_UP`` calls of each.

    A call is over when the device has its result.

    Args:
        models: name -> a model in eval mode, or any function of the images. Gradients are as the caller has set them.
        images: one batch, on the models' device.
        rounds: turns of each model.
        seconds: least time that a model runs in each turn, so that a small model is not timed by a single short call.
    """
    names = list(models)
    for name in names:
        for _ in range(WARM_UP):
            _timed(models[name], images)
    calls: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            calls[name].append(_turn(models[name], images, seconds))
    return {name: Turns(tuple(calls[name]), len(images)) for name in names}


def measure_throughput(
    models: Mapping[str, Callable[[Tensor], Any]],
    images: Tensor,
    *,
    reference: str,
    rounds: int = 15,
    seconds: float = 0.2,
) -> dict[str, Throughput]:
    """Images per second of models timed in turns, and their speed beside one of them.

    Args:
        models: as for ``time_in_turns``.
        images: as for ``time_in_turns``.
        reference: the model that the others are compared with.
        rounds: turns; medians and quartiles are taken over them.
        seconds: least time that a model runs in each turn.
    """
    turns = time_in_turns(models, images, rounds=rounds, seconds=seconds)
    measured = {}
    for name, own in turns.items():
        speedup = own.speedup(turns[reference])
        measured[name] = Throughput(own.images_per_second.median, speedup.median, speedup.low, speedup.high)
    return measured


def _turn(model: Callable[[Tensor], Any], images: Tensor, seconds: float) -> tuple[float, ...]:
    """Seconds of each call, as many calls as take ``seconds`` together, at least one."""
    calls = [_timed(model, images)]
    while sum(calls) < seconds:
        calls.append(_timed(model, images))
    return tuple(calls)


def _timed(model: Callable[[Tensor], Any], images: Tensor) -> float:
    """Seconds that a call takes, the device's queue included."""
    wait = torch.accelerator.synchronize if images.device.type != "cpu" else _nothing
    wait()
    start = time.perf_counter()
    model(images)
    wait()
    return time.perf_counter() - start


def _nothing() -> None:
    pass
