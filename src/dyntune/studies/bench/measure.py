"""The figures of one runtime: its candidates run in turns, and everything is counted on the same images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dyntune.core.errors import DyntuneError
from dyntune.core.machine import peak_memory
from dyntune.core.timing import Latency, Spread, Turns, time_in_turns
from dyntune.model.activation import activation_rates
from dyntune.model.macs import MacCounter
from dyntune.studies.bench.peers import DENSE, Candidate

TOLERANCE = 1e-3
"""Largest difference of an image's logits to those in eager mode, over the largest eager logit."""


@dataclass(frozen=True)
class Row:
    """One candidate in one runtime at one batch size.

    Args:
        runtime: where it ran.
        device: on which device.
        batch_size: images per call.
        name: of the candidate.
        macs: MACs per image without the head that eager mode executes, counted on the timed images.
        macs_ratio: MACs of ``dense`` over these.
        active: share of the patches that the gates let through on the timed images; None without gates.
        images_per_second: over the rounds.
        latency: of a call.
        peak_memory: bytes by which memory rose in the first call; None where that is not known.
        speedups: over every other candidate, from the ratios within each round.
        skip_efficiency: speed-up over ``dense`` divided by ``macs_ratio``.
        difference: largest difference of a logit to eager mode, over the largest eager logit.
    """

    runtime: str
    device: str
    batch_size: int
    name: str
    macs: float
    macs_ratio: float
    active: float | None
    images_per_second: Spread
    latency: Latency
    peak_memory: int | None
    speedups: dict[str, Spread]
    skip_efficiency: float
    difference: float

    @property
    def speedup(self) -> Spread:
        """Over ``dense``; 1 for itself."""
        return self.speedups.get(DENSE, Spread(1.0, 1.0, 1.0))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """The row that ``to_dict`` wrote."""
        made = {
            "images_per_second": Spread(**values["images_per_second"]),
            "latency": Latency(**values["latency"]),
            "speedups": {name: Spread(**speedup) for name, speedup in values["speedups"].items()},
        }
        return cls(**(values | made))


@dataclass(frozen=True)
class _Checked:
    """What is known of a candidate before it is timed."""

    macs: float
    active: float | None
    peak_memory: int | None
    difference: float


@torch.inference_mode()
def measure(
    entries: Sequence[tuple[Candidate, Callable[[Tensor], Tensor]]],
    images: Tensor,
    *,
    runtime: str,
    exact: bool = True,
    rounds: int = 15,
    seconds: float = 0.2,
) -> list[Row]:
    """Checks the logits of each candidate, counts its MACs, and times all of them in turns.

    Args:
        entries: each candidate, ``dense`` among them, and how it runs here: images to logits.
        images: one batch, on the device of the models.
        runtime: its name, for the rows and errors.
        exact: whether logits must be those of eager mode, up to ``TOLERANCE``.
        rounds: turns of each.
        seconds: least time of a turn.

    Raises:
        DyntuneError: logits differ from those of eager mode. A rounding error may flip a gate, and with it what
            becomes of an image, so that the median over the images decides.
    """
    checked = {candidate.name: _check(candidate, call, images, runtime, exact) for candidate, call in entries}
    turns = time_in_turns({c.name: call for c, call in entries}, images, rounds=rounds, seconds=seconds)
    return [_row(name, runtime, images, checked, turns) for name in checked]


def _row(name: str, runtime: str, images: Tensor, checked: dict[str, _Checked], turns: dict[str, Turns]) -> Row:
    own, seen = turns[name], checked[name]
    row = Row(
        runtime=runtime,
        device=images.device.type,
        batch_size=len(images),
        name=name,
        macs=seen.macs,
        macs_ratio=checked[DENSE].macs / seen.macs,
        active=seen.active,
        images_per_second=own.images_per_second,
        latency=own.latency,
        peak_memory=seen.peak_memory,
        speedups={other: own.speedup(turns[other]) for other in turns if other != name},
        skip_efficiency=1.0,
        difference=seen.difference,
    )
    return replace(row, skip_efficiency=row.speedup.median / row.macs_ratio)


def _check(
    candidate: Candidate, call: Callable[[Tensor], Tensor], images: Tensor, runtime: str, exact: bool
) -> _Checked:
    with MacCounter() as counter, counter.watching(candidate.model.backbone):
        output = candidate.model.run(images)
    logits: list[Tensor] = []
    peak = peak_memory(lambda: logits.append(call(images)), images.device)
    expected = output.logits.float()
    if logits[0].shape != expected.shape:
        raise DyntuneError(
            f"{candidate.name} in {runtime} gave logits of shape {tuple(logits[0].shape)}; expected "
            f"{tuple(expected.shape)}."
        )
    errors = (logits[0].to(expected) - expected).abs().amax(1) / expected.abs().max()
    off = int((errors > TOLERANCE).sum()) + int(errors.isnan().sum())
    if exact and 2 * off > len(images):
        raise DyntuneError(
            f"{candidate.name} in {runtime} gave other logits than eager mode: {off} of {len(images)} images are off "
            f"by more than {TOLERANCE:.0e} of the largest logit, the worst by {float(errors.max()):.1e}."
        )
    return _Checked(
        macs=(counter.macs - counter.head_macs) / len(images),
        active=float(activation_rates(output.gates).mean()) if output.gates else None,
        peak_memory=peak,
        difference=float(errors.max()),
    )
