"""A whole measurement: one process per runtime, one after the other, and what they found together."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dyntune.backbones.hosts import check_arguments, create_backbone, wrap
from dyntune.core.digests import DIGITS, pieces_digest, values_digest
from dyntune.core.errors import DyntuneError
from dyntune.core.files import alone_in, load_json, room_beside, write_json
from dyntune.core.machine import machine
from dyntune.core.shapes import shapes_only
from dyntune.core.texts import listed
from dyntune.core.threads import available_cores
from dyntune.core.timing import WARM_UP
from dyntune.core.words import counted
from dyntune.model.adapter_folder import read_config
from dyntune.model.macs import trace
from dyntune.studies.bench.measure import TOLERANCE, Row
from dyntune.studies.bench.peers import GATHER
from dyntune.studies.bench.plan import Plan
from dyntune.studies.bench.runtimes import IN_TORCH, is_exact
from dyntune.studies.bench.worker import Measured, error_file, is_error
from dyntune.training.interrupt import stop_requests

PLAN = "plan.json"
_SHOWN = 4
_START_SECONDS, _BUILD_SECONDS = 6.0, 4.0
"""What a process takes until it measures, and what writing and opening a model in another runtime takes."""
_TRIAL_SECONDS = 0.1
_OF_PEAK = 0.5
"""Share of the speed of large products that a ViT's come to."""


class MeasuringStopped(DyntuneError):
    """The user, or the system, stopped a measurement; what is done is kept."""


class OtherMeasurements(DyntuneError):
    """A folder holds measurements of something else, which would be lost or mixed up."""


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
            f"{name} {counted(measured.threads, 'thread')}"
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


def bench(
    plan: Plan, progress: Callable[[str], object] | None = None, *, keep: Path | None = None, resume: bool = False
) -> Report:
    """Measures every runtime of a plan in a process of its own.

    Args:
        plan: what is measured.
        progress: called with the name of each runtime before it is measured.
        keep: folder that each measurement is written to as it is made; nowhere by default.
        resume: leaves out what ``keep`` holds of the same plan, whose runtimes alone may differ.

    Raises:
        DyntuneError: a model cannot be built in a runtime, or gives other logits there.
        OtherMeasurements: ``keep`` holds measurements of another plan, run or machine, or any without ``resume``.
        MeasuringStopped: Ctrl-C or SIGTERM, with ``keep``.
    """
    measured = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_terminable())
        folder = keep or stack.enter_context(room_beside(Path(tempfile.gettempdir()) / "dyntune-bench"))
        if keep:
            refusal = DyntuneError(
                f"another process is measuring into {keep}. Wait for its end, or give another folder."
            )
            stack.enter_context(alone_in(keep, refusal))
        written = folder / PLAN
        asked = {"plan": plan.to_dict(), "of": _circumstances(plan)}
        _require_folder(folder, asked, resume)
        write_json(written, asked)
        for runtime in plan.runtimes:
            if progress:
                progress(runtime)
            try:
                measured[runtime] = _measured(written, runtime, folder / f"{runtime}.json")
            except KeyboardInterrupt:
                if keep is None:
                    raise
                raise MeasuringStopped(f"stopped while {runtime} was measured; what is done is in {folder}.") from None
    return Report(plan, measured, time.strftime("%Y-%m-%d"))


def estimate(plan: Plan) -> float:
    """About how many seconds a measurement takes, by the model's MACs and what this machine computes in a moment.

    Building models takes as long as is usual on a desktop; whatever cannot be known beforehand is left out.
    """
    image = _macs(plan) / _macs_per_second() if plan.device == "cpu" else 0.0
    total = 0.0
    for runtime in plan.runtimes:
        models = 1 + len([peer for peer in plan.against if peer != GATHER or runtime in IN_TORCH])
        build = 0.0 if runtime == "eager" else _BUILD_SECONDS
        total += _START_SECONDS
        for seconds in (size * image for size in plan.batch_sizes):
            total += models * (build + (WARM_UP + 3) * seconds + plan.rounds * max(plan.seconds, seconds))
    return total


def _macs(plan: Plan) -> float:
    """MACs of an image in the dense model; 0 where they cannot be had without its weights."""
    try:
        if plan.run is None:
            name, arguments = plan.model, dict[str, Any](num_classes=plan.classes)
        else:
            recorded = read_config(Path(plan.run))["backbone"]
            name, arguments = recorded["name"], check_arguments(recorded["name"], recorded["arguments"])
        with shapes_only():
            host = create_backbone(name, pretrained=False, **arguments)
            return trace(wrap(host), ()).macs
    except (DyntuneError, OSError, KeyError, TypeError, ValueError):
        return 0.0


def _macs_per_second() -> float:
    matrix = torch.ones(768, 768)
    matrix @ matrix
    began, products = time.perf_counter(), 0
    while time.perf_counter() < began + _TRIAL_SECONDS:
        matrix @ matrix
        products += 1
    return products * 768**3 / (time.perf_counter() - began) * _OF_PEAK


def _circumstances(plan: Plan) -> dict[str, Any]:
    """What figures depend on beside the plan: what is in the run and the weights, and the machine."""
    return {
        "run": None if plan.run is None else values_digest(read_config(Path(plan.run)))[:DIGITS],
        "weights": None if plan.weights is None else pieces_digest(Path(plan.weights)),
        "machine": machine(plan.threads or min(torch.get_num_threads(), available_cores())),
    }


def _require_folder(folder: Path, asked: dict[str, Any], resume: bool) -> None:
    """Makes sure that what ``folder`` holds is not lost, and that all of it is of what is asked for.

    Raises:
        OtherMeasurements: there are measurements of something else, any without ``resume``, or other files.
    """
    written = folder / PLAN
    held = sorted(file for file in folder.glob("*.json") if file != written and not is_error(file))
    if not held:
        return
    if not resume or not written.exists():
        known = "measurements, with which --resume goes on" if written.exists() else "something else than measurements"
        raise OtherMeasurements(
            f"{folder} holds {known} ({listed([file.name for file in held], _SHOWN)}). Give another folder, or remove "
            "this one."
        )
    try:
        before = load_json(written)
        plan, of = dict(before["plan"]), dict(before["of"])
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise OtherMeasurements(
            f"{written} cannot be read ({type(error).__name__}: {error}). Give another folder, or remove it."
        ) from error
    now = json.loads(json.dumps(asked))
    pairs = [(plan, name, value) for name, value in now["plan"].items() if name != "runtimes"]
    pairs += [(of, name, value) for name, value in now["of"].items()]
    changed = [f"{name} was {had.get(name)}, is {value}" for had, name, value in pairs if had.get(name) != value]
    if changed:
        raise OtherMeasurements(
            f"the measurements in {folder} are of another plan: {'; '.join(changed)}. Give the same options, or "
            "another folder."
        )


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Makes SIGTERM what Ctrl-C is, so that no process goes on measuring for nobody."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _measured(plan: Path, runtime: str, result: Path) -> Measured:
    command = [sys.executable, "-m", "dyntune.studies.bench.worker", str(plan), runtime, str(result)]
    # What libraries print goes to standard error, so that standard output holds the report alone.
    failed = error_file(result)
    failed.unlink(missing_ok=True)
    # In a session of its own, so that Ctrl-C reaches this process alone, which ends the other without its traceback.
    # Its standard input is closed when this process ends, even where nothing can be done any more (SIGKILL).
    process = None
    try:
        with stop_requests() as stop:  # for a signal in the midst of starting would leave a process that nobody knows
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.__stderr__, start_new_session=True)
        if stop.is_set():
            raise KeyboardInterrupt
        status = process.wait()
    except BaseException:
        if process is not None:
            process.terminate()
            process.wait()
        raise
    finally:
        if process is not None and process.stdin is not None:
            process.stdin.close()
    if failed.exists():
        error = load_json(failed)["error"]
        failed.unlink()
        raise DyntuneError(error)
    if status:
        raise DyntuneError(
            f"the process that measured {runtime} ended with status {status} without a result; what it printed stands "
            "above. A negative status is a signal: -9 mostly means that memory ran out, which a smaller --batch-size "
            "needs less of."
        )
    return Measured.from_dict(load_json(result))
