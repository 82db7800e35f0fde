"""A whole measurement: one process per runtime, one after the other, and what they found together."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyntune.core.errors import DyntuneError
from dyntune.core.files import write_json
from dyntune.core.timing import WARM_UP
from dyntune.studies.bench.measure import TOLERANCE, Row
from dyntune.studies.bench.plan import Plan
from dyntune.studies.bench.runtimes import is_exact
from dyntune.studies.bench.worker import Measured


@dataclass(frozen=True)
class Report:
    """What was measured; ``to_dict`` is the object that ``dyntune bench --json`` prints.

    Args:
        plan: what was asked for.
        measured: by runtime.
        date: day of the measurement.
    """

    plan: Plan
    measured: dict[str, Measured]
    date: str

    @property
    def rows(self) -> list[Row]:
        """Of all runtimes."""
        return [row for measured in self.measured.values() for row in measured.rows]

    @property
    def title(self) -> str:
        """The model and its backbone."""
        first = next(iter(self.measured.values()))
        return f"{first.method} on {first.model}"

    @property
    def notes(self) -> list[str]:
        """What a reader must know, each once: gates, images, threads, load, warm-up, checks."""
        plan, first = self.plan, next(iter(self.measured.values()))
        images = f"images: {plan.data}" if plan.data else "images: random noise"
        if plan.run is not None and plan.data is None:
            images += ", on which gates let other shares of the patches through than on images; give --data"
        largest = {name: max(row.difference for row in measured.rows) for name, measured in self.measured.items()}
        exact = [f"{name} {value:.1e}" for name, value in largest.items() if is_exact(name)]
        rough = [f"{name} {value:.1e}" for name, value in largest.items() if not is_exact(name)]
        loads = ", ".join(
            f"{name} {measured.threads} threads"
            + ("" if measured.other_load is None else f" and {measured.other_load:.2f} cores busy with other work")
            for name, measured in self.measured.items()
        )
        fast = "fast: every model, dense too but not gather, runs through the same exact optimisations"
        return [
            *dict.fromkeys(note for measured in self.measured.values() for note in measured.notes),
            images,
            f"{plan.rounds} rounds in turns, at least {plan.seconds:g} s each, after {WARM_UP + 1} warm-up calls",
            "speed-up: median over the rounds of the ratio to dense in the same round, runtime and batch [quartiles]",
            "skip efficiency: that speed-up over the ratio of the MACs, which are those of eager mode",
            *([fast] if "fast" in self.measured else []),
            *(
                [
                    f"of most images the logits are those of eager mode to {TOLERANCE:.0e} of the largest; the largest "
                    f"difference of an image, in which a rounding error may have moved a gate: {', '.join(exact)}"
                ]
                if exact
                else []
            ),
            *([f"difference of int8 logits to eager mode, nothing asked for: {', '.join(rough)}"] if rough else []),
            loads,
            f"measured on {self.date} on {first.machine}",
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        first = next(iter(self.measured.values()))
        return {
            "model": first.model,
            "method": first.method,
            "date": self.date,
            "machine": first.machine,
            "plan": self.plan.to_dict(),
            "warm_up_calls": WARM_UP + 1,
            "tolerance": TOLERANCE,
            "runtimes": {
                name: {"threads": measured.threads, "other_load": measured.other_load}
                for name, measured in self.measured.items()
            },
            "notes": self.notes,
            "rows": [row.to_dict() for row in self.rows],
        }


def bench(plan: Plan, progress: Callable[[str], object] | None = None) -> Report:
    """Measures every runtime of a plan in a process of its own.

    Args:
        plan: what is measured.
        progress: called with the name of each runtime before it is measured.

    Raises:
        DyntuneError: a model cannot be built in a runtime, or gives other logits there.
    """
    measured = {}
    with tempfile.TemporaryDirectory(prefix="dyntune-bench-") as folder:
        written = Path(folder) / "plan.json"
        write_json(written, plan.to_dict())
        for runtime in plan.runtimes:
            if progress:
                progress(runtime)
            measured[runtime] = _measured(written, runtime, Path(folder) / f"{runtime}.json")
    return Report(plan, measured, time.strftime("%Y-%m-%d"))


def _measured(plan: Path, runtime: str, result: Path) -> Measured:
    command = [sys.executable, "-m", "dyntune.studies.bench.worker", str(plan), runtime, str(result)]
    # What libraries print goes to standard error, so that standard output holds the report alone.
    status = subprocess.run(command, stdout=sys.__stderr__, check=False).returncode
    if not result.exists():
        raise DyntuneError(
            f"the process that measured {runtime} ended with status {status} without a result; what it printed stands "
            "above. A negative status is a signal: -9 mostly means that memory ran out, which a smaller --batch-size "
            "needs less of."
        )
    found = json.loads(result.read_text("utf-8"))
    if "error" in found:
        raise DyntuneError(found["error"])
    return Measured.from_dict(found)
