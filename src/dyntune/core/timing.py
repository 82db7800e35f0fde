"""How long models take: timed in turns in one process, so that their ratios can be trusted, and what the times say."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

WARM_UP = 3
"""Calls of each model before the first that is timed."""
_LEAST_ROUNDS = 3
"""However slow the models are: a median of fewer is a matter of luck."""

T = TypeVar("T")


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
class Latency:
    """Percentiles over single calls, in seconds.

    Args:
        p50: median.
        p90: 90 % of the calls were as quick or quicker.
        p99: 99 % of the calls.
        calls: how many there were; p99 says little about fewer than some hundreds.
    """

    p50: float
    p90: float
    p99: float
    calls: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        """The percentiles of at least one call, interpolated linearly."""
        cuts = statistics.quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 99
        return cls(cuts[49], cuts[89], cuts[98], len(seconds))


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
        calls: seconds of every call, by round; of calls that were queued, one mean for each round.
        images: images in a call.
    """

    calls: tuple[tuple[float, ...], ...]
    images: int

    @property
    def seconds(self) -> list[float]:
        """Of a call, the mean of each round."""
        return [statistics.fmean(turn) for turn in self.calls]

    @property
    def latency(self) -> Latency:
        """Of all calls."""
        return Latency.of([second for turn in self.calls for second in turn])

    @property
    def images_per_second(self) -> Spread:
        """Over the rounds."""
        return Spread.of([self.images / second for second in self.seconds])

    def speedup(self, reference: Turns) -> Spread:
        """Over another model, from the ratio within each round."""
        return Spread.of([base / own for base, own in zip(reference.seconds, self.seconds, strict=True)])


def time_in_turns(
    models: Mapping[str, Callable[[Tensor], Any]],
    images: Tensor,
    *,
    rounds: int = 15,
    seconds: float = 0.2,
    limit: float | None = None,
) -> dict[str, Turns]:
    """Times models in turns: each round runs every model, in rotating order, after ``WARM_UP`` calls of each.

    A call is over when the device has its result.

    Args:
        models: name -> a model in eval mode, or any function of the images. Gradients are as the caller has set them.
        images: one batch, on the models' device.
        rounds: turns of each model.
        seconds: least time that a model runs in each turn, so that a small model is not timed by a single short call.
        limit: seconds of a model after which slow ones are warm, with a tenth of it, and no further round begins, but
            for the third; None for all calls and rounds however long they take.
    """
    for model in models.values():
        warming = 0.0
        for _ in range(WARM_UP):
            warming += _timed(model, images)
            if limit is not None and warming > limit / 10:
                break
    whole = None if limit is None else limit * len(models)
    calls = _in_turns({name: partial(_turn, model, images, seconds) for name, model in models.items()}, rounds, whole)
    return {name: Turns(tuple(turns), len(images)) for name, turns in calls.items()}


def time_queued(
    models: Mapping[str, Callable[[Tensor], Any]], images: Tensor, *, rounds: int = 15, seconds: float = 0.04
) -> dict[str, Turns]:
    """Times models in turns as ``time_in_turns`` does, but nothing waits between the calls of a turn.

    On a CUDA device they queue up, so that Python's part is hidden where the device is the slower one, and the
    device's own clock is read. Each model runs three times before the first turn; the last of these calls decides how
    many a turn has, the same number in all of them.

    Args:
        models: as for ``time_in_turns``.
        images: as for ``time_in_turns``.
        rounds: turns of each model.
        seconds: about the time that a model runs in each turn, at least one call.
    """
    ways = {}
    for name, model in models.items():
        _queued(model, images, WARM_UP - 1)
        repeats = max(1, round(seconds / _queued(model, images, 1)))
        ways[name] = partial(_queued, model, images, repeats)
    means = _in_turns(ways, rounds)
    return {name: Turns(tuple((mean,) for mean in own), len(images)) for name, own in means.items()}


def measure_throughput(
    models: Mapping[str, Callable[[Tensor], Any]],
    images: Tensor,
    *,
    reference: str,
    rounds: int = 15,
    seconds: float = 0.2,
    limit: float | None = None,
) -> dict[str, Throughput]:
    """Images per second of models timed in turns, and their speed beside one of them.

    Args:
        models: as for ``time_in_turns``.
        images: as for ``time_in_turns``.
        reference: the model that the others are compared with.
        rounds: turns; medians and quartiles are taken over them.
        seconds: least time that a model runs in each turn.
        limit: as for ``time_in_turns``.
    """
    turns = time_in_turns(models, images, rounds=rounds, seconds=seconds, limit=limit)
    measured = {}
    for name, own in turns.items():
        speedup = own.speedup(turns[reference])
        measured[name] = Throughput(own.images_per_second.median, speedup.median, speedup.low, speedup.high)
    return measured


def best_of_few(ways: Mapping[str, Callable[[Tensor], Any]], x: Tensor, *, rounds: int = 5) -> dict[str, float]:
    """Seconds of the quickest call of each way, in turns and without a warm-up: for a decision that must cost little.

    Args:
        ways: name -> a function of ``x``.
        x: what it is given, on the device that it computes on.
        rounds: calls of each.
    """
    calls = _in_turns({name: partial(_timed, way, x) for name, way in ways.items()}, rounds)
    return {name: min(seconds) for name, seconds in calls.items()}


def _in_turns(ways: Mapping[str, Callable[[], T]], rounds: int, limit: float | None = None) -> dict[str, list[T]]:
    """What each way gives in each round; the one that begins changes from round to round.

    After ``limit`` seconds no further round begins, once there have been ``_LEAST_ROUNDS``.
    """
    names = list(ways)
    given: dict[str, list[T]] = {name: [] for name in names}
    began = time.perf_counter()
    for turn in range(rounds):
        if limit is not None and turn >= _LEAST_ROUNDS and time.perf_counter() - began > limit:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            given[name].append(ways[name]())
    return given


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


def _queued(model: Callable[[Tensor], Any], images: Tensor, repeats: int) -> float:
    """Seconds of one of ``repeats`` calls in a row, on CUDA by the device's clock."""

    def calls(images: Tensor) -> None:
        for _ in range(repeats):
            model(images)

    if images.device.type != "cuda":
        return _timed(calls, images) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    calls(images)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / repeats


def _nothing() -> None:
    pass
