"""The process that measures one runtime: ``python -m dyntune.studies.bench.worker PLAN.json RUNTIME RESULT.json``.

Thread pools of torch, ONNX Runtime and OpenVINO keep their cores busy for a while after each call, so that they would
disturb each other in one process.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyntune.core.errors import DataError, DyntuneError, SpecError
from dyntune.core.files import load_json, room_beside, write_json
from dyntune.core.limits import limits_named
from dyntune.core.machine import OtherLoad, machine
from dyntune.core.threads import available_cores, take_threads
from dyntune.core.words import counted
from dyntune.data import load_held
from dyntune.model.load import load
from dyntune.model.tuned import TunedModel
from dyntune.studies.bench.measure import Row, measure
from dyntune.studies.bench.peers import GATHER, Candidate, candidates, fresh, set_gates
from dyntune.studies.bench.plan import Plan
from dyntune.studies.bench.runtimes import IN_TORCH, build, is_exact
from dyntune.training.inputs import spread_batch

_ERROR = ".error.json"


@dataclass(frozen=True)
class Measured:
    """What was measured in one runtime.

    Args:
        rows: every candidate at every batch size.
        model: name of the backbone.
        method: spec of the model, which is the candidate of that name.
        machine: processor, versions.
        threads: of the runtime.
        other_load: cores that other processes kept busy meanwhile; None where that is not known.
        notes: what a reader must know of these figures.
    """

    rows: tuple[Row, ...]
    model: str
    method: str
    machine: str
    threads: int
    other_load: float | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Measured:
        """What ``to_dict`` wrote."""
        made = {"rows": tuple(map(Row.from_dict, values["rows"])), "notes": tuple(values["notes"])}
        return cls(**(values | made))


def measure_runtime(
    plan: Plan,
    runtime: str,
    folder: Path,
    before: Measured | None = None,
    keep: Callable[[Measured], object] | None = None,
) -> Measured:
    """Measures all candidates of a plan in one runtime, in this process, whose number of threads it sets.

    Args:
        plan: what is measured.
        runtime: one of its runtimes.
        folder: where models of other runtimes are written to.
        before: what was measured already, of some of the batch sizes.
        keep: is given all that has been measured so far, after each batch size.
    """
    threads = plan.threads or min(torch.get_num_threads(), available_cores())
    take_threads(threads)
    device = torch.device(plan.device if runtime in IN_TORCH else "cpu")
    torch.manual_seed(plan.seed)
    model, notes = _subject(plan)
    name = model.spec if plan.run is not None else "+".join(plan.parts)
    taking_part = [
        candidate
        for candidate in candidates(name, model, plan.against, trained=plan.run is not None)
        if candidate.name != GATHER or runtime in IN_TORCH
    ]
    if plan.rate is not None and plan.run is None and not any(map(_sets_gates, taking_part)):
        raise SpecError(f"rate {plan.rate:g}: none of these models has gates. Leave it out.")
    images = _images(plan, model).to(device)
    if model.preprocessing.clip is not None:
        notes.append(f"an image here is a clip of {counted(model.preprocessing.shape[0], 'frame')}")
    for candidate in taking_part:
        candidate.model.to(device)
        if _sets_gates(candidate):
            notes.append(f"{candidate.name}: {_gates_note(candidate, plan.rate)}")
    if plan.run is not None and plan.rate is not None:
        own = model.calibration is None
        model.set_rate(plan.rate, images if own else None)
        notes.append(f"{name}: set to a rate of {plan.rate:.0%}" + (", calibrated on the timed images" if own else ""))
    built: dict[str, Callable[[Tensor], Tensor]] = {}
    backbone = model.backbone_name or type(model.backbone.host).__name__
    done = before or Measured((), backbone, name, machine(), threads, None, tuple(notes))
    for number, batch_size in enumerate(plan.batch_sizes):
        if any(row.batch_size == batch_size for row in done.rows):
            continue
        with OtherLoad() as load:
            batch = images[:batch_size]
            for place, candidate in enumerate(taking_part):
                if _sets_gates(candidate):
                    set_gates(candidate.model, batch, plan.rate)
                # Anew for each batch size, for memory that one has taken is not taken again.
                into = folder / f"{place}-{batch_size}"
                built[candidate.name] = _call(candidate, runtime, batch, threads, into)
            rows = measure(
                [(candidate, built[candidate.name]) for candidate in taking_part],
                batch,
                runtime=runtime,
                exact=is_exact(runtime),
                rounds=plan.rounds,
                seconds=plan.seconds,
            )
        loads = [done.other_load] * number + [load.cores]
        known = [cores for cores in loads if cores is not None]
        mean = statistics.fmean(known) if known else None
        done = replace(done, rows=(*done.rows, *rows), other_load=mean, notes=tuple(notes))
        if keep:
            keep(done)
    return done


def _subject(plan: Plan) -> tuple[TunedModel, list[str]]:
    """The model, and what must be said about its weights."""
    if plan.run is not None:
        policy = "+".join(plan.parts) or None
        return load(plan.run, weights=plan.weights, policy=policy), []
    model = fresh(plan.model, plan.parts, classes=plan.classes, weights=plan.weights, pretrained=plan.pretrained)
    given = plan.pretrained or plan.weights is not None
    return model, ["methods untrained" if given else "random weights, methods untrained"]


def _images(plan: Plan, model: TunedModel) -> Tensor:
    """As many images as the largest batch, of the data's test split, or noise."""
    count = max(plan.batch_sizes)
    if plan.data is None:
        generator = torch.Generator().manual_seed(plan.seed + 1)
        return torch.randn(count, *model.backbone.input_shape, generator=generator)
    # Whose classes they are does not matter: nobody looks at the labels.
    held = load_held(plan.data, on_corrupt=plan.on_corrupt)
    test = held.images("test") if "test" in held.splits else None
    if test is None or len(test) < count:
        raise DataError(
            f"{plan.data} has {0 if test is None else len(test)} test images; a batch of {count} was asked for. "
            "Give a smaller --batch-size or other data."
        )
    return spread_batch(test, model, count)


def _sets_gates(candidate: Candidate) -> bool:
    return candidate.gated and not candidate.trained and candidate.name != GATHER


def _call(candidate: Candidate, runtime: str, images: Tensor, threads: int, folder: Path) -> Callable[[Tensor], Tensor]:
    if runtime == "eager" or candidate.name == GATHER:
        return candidate.eager
    return build(runtime, candidate.model, images, threads=threads, folder=folder)


def _gates_note(candidate: Candidate, rate: float | None) -> str:
    return f"gates set to {candidate.model.target_rate if rate is None else rate:.0%} of the patches, untrained"


def _kept(result: Path) -> Measured:
    try:
        return Measured.from_dict(load_json(result))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        result.unlink()
        raise DyntuneError(
            f"{result} cannot be read ({type(error).__name__}) and is removed. Give the same again: with --resume what "
            "it held is measured anew."
        ) from error


def error_file(result: Path) -> Path:
    """Where an error is written to, beside a result file: what that holds already was measured and stays."""
    return result.with_name(f"{result.stem}{_ERROR}")


def is_error(file: Path) -> bool:
    """Whether a file is one of ``error_file``."""
    return file.name.endswith(_ERROR)


def main(arguments: list[str]) -> int:
    """Writes what was measured to the result file, an error to ``error_file``; returns the exit status."""
    plan, runtime, result = Path(arguments[0]), arguments[1], Path(arguments[2])
    try:
        before = _kept(result) if result.exists() else None

        def keep(measured: Measured) -> None:
            write_json(result, measured.to_dict())
            last = measured.rows[-1].batch_size
            rates = (
                f"{row.name} {row.images_per_second.median:,.1f}" for row in measured.rows if row.batch_size == last
            )
            print(f"{runtime}, batch {last}, images per second: {', '.join(rates)}", file=sys.stderr, flush=True)

        with limits_named(), room_beside(Path(tempfile.gettempdir()) / "dyntune-models") as folder:
            asked = Plan.from_dict(load_json(plan)["plan"])
            measured = measure_runtime(asked, runtime, folder, before, keep)
    except (DyntuneError, OSError) as error:
        write_json(error_file(result), {"error": str(error)})
        return 1
    write_json(result, measured.to_dict())
    return 0


def _end_with_the_other() -> None:
    """Ends this process when that which started it has ended, however: nobody reads what it would measure."""

    def wait() -> None:
        os.read(0, 1)  # returns when the other end of the pipe is closed
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    _end_with_the_other()
    sys.exit(main(sys.argv[1:]))
