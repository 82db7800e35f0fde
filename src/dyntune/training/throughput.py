"""Images per second of several models, measured in turns in one process so that their ratio can be trusted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


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


def measure_throughput(
    models: Mapping[str, Callable[[Tensor], Any]],
    images: Tensor,
    *,
    reference: str,
    rounds: int = 15,
    seconds: float = 0.2,
) -> dict[str, Throughput]:
    """Times models in turns: each round runs every model, in rotating order, and a ratio compares runs of one round.

    Args:
        models: name -> a model in eval mode, or any function of the images. Gradients are as the caller has set them.
        images: one batch, on the models' device.
        reference: the model that the others are compared with.
        rounds: turns; medians and quartiles are taken over them.
        seconds: least time that a model runs in each turn, so that a small model is not timed by a single short call.
    """
    names = list(models)
    repeats = {}
    for name in names:
        _timed(models[name], images, 2)  # warm-up
        once = _timed(models[name], images, 1)
        repeats[name] = max(1, round(seconds / once))
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(_timed(models[name], images, repeats[name]) / repeats[name])
    measured = {}
    for name in names:
        ratios = [base / own for base, own in zip(times[reference], times[name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        measured[name] = Throughput(len(images) / statistics.median(times[name]), middle, low, high)
    return measured


def _timed(model: Callable[[Tensor], Any], images: Tensor, repeats: int) -> float:
    """Seconds that ``repeats`` calls take, the device's queue included."""
    wait = torch.accelerator.synchronize if images.device.type != "cpu" else _nothing
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        model(images)
    wait()
    return time.perf_counter() - start


def _nothing() -> None:
    pass
