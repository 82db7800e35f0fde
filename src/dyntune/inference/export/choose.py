"""Which runtime is fastest for a model on this machine: every candidate is timed, in a process of its own, in turns."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dyntune.core.errors import DyntuneError, ExportError
from dyntune.core.timing import Spread, time_in_turns
from dyntune.inference.export.bundle import Export
from dyntune.inference.export.process import Candidate
from dyntune.inference.export.runtimes.base import FP32, Runtime

ROUNDS = 9


@dataclass(frozen=True)
class Choice:
    """Which runtime was taken, and why.

    Args:
        runtime: the one with the most images per second.
        reason: in words, with every candidate's figures.
        batch_size: images per forward pass.
        images_per_second: of each candidate that ran, over the rounds.
        refused: why the others are none.
    """

    runtime: str
    reason: str
    batch_size: int
    images_per_second: dict[str, Spread]
    refused: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def choose(
    export: Export,
    room: Path,
    images: Tensor,
    runtimes: Sequence[Runtime],
    *,
    precision: str = FP32,
    threads: int | None = None,
    calibration_images: Tensor | None = None,
    rounds: int = ROUNDS,
) -> Choice:
    """Writes a model for every runtime that can have it here, times them in turns, and takes the fastest.

    Args:
        export: the model.
        room: a folder in which each candidate gets one, named as its runtime; the fastest one is ready to use.
        images: one batch, preprocessed, ``(B, 3, height, width)``. How many tokens are skipped, and so the speed,
            depends on them.
        runtimes: the candidates, see ``every``.
        precision: of the backbone's linear layers, the same for all.
        threads: that a runtime may use; None for as many as it takes by itself.
        calibration_images: as for ``export``.
        rounds: turns of each candidate.

    Raises:
        ExportError: there is no candidate; the message says why.
    """
    refused: dict[str, str] = {}
    batch = room / "images.npy"
    np.save(batch, images.detach().cpu().float().numpy())
    with ExitStack() as stack:
        running: dict[str, Candidate] = {}
        for runtime in runtimes:
            folder = room / runtime.name()
            try:
                export.write(folder, runtime, precision, calibration_images)
                candidate = stack.enter_context(Candidate(folder, batch, threads))
                candidate(images)
            except DyntuneError as error:
                refused[runtime.name()] = str(error)
            else:
                running[runtime.name()] = candidate
        if not running:
            raise ExportError(f"no runtime can take this model in {precision}. {_listed(refused)}")
        turns = time_in_turns(running, images, rounds=rounds)
    speeds = {name: turns[name].images_per_second for name in running}
    fastest = max(speeds, key=lambda name: speeds[name].median)
    figures = ", ".join(f"{name} {s.median:.1f} (quartiles {s.low:.1f} to {s.high:.1f})" for name, s in speeds.items())
    left_out = f" Not among them: {_listed(refused)}" if refused else ""
    many = f"{len(speeds)} runtimes" if len(speeds) > 1 else "the only runtime"
    reason = (
        f"{fastest} had the most images per second of {many} in {precision}, in batches of {len(images)} on "
        f"{threads or 'all'} threads of this machine: {figures}.{left_out}"
    )
    return Choice(fastest, reason, len(images), speeds, refused)


def _listed(refused: dict[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in refused.items())
