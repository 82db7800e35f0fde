"""The runtimes that a model can be timed in, and how each is made from a tuned model."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from dyntune.core.errors import DyntuneError, SpecError, unknown_name
from dyntune.inference.export.bundle import export
from dyntune.inference.export.folder import open_export
from dyntune.inference.export.registry import registered
from dyntune.inference.export.runtimes.base import FP32, Runtime
from dyntune.inference.optimized import optimize
from dyntune.model.tuned import TunedModel

IN_TORCH = ("eager", "fast")
"""Runtimes in the process's own torch, on any device."""


@functools.cache
def exported() -> dict[str, tuple[type[Runtime], str]]:
    """The runtimes that have files, in each precision that they offer, by the name that a measurement gives them."""
    return {
        (runtime.measured_as or name) + ("" if precision == FP32 else f"-{precision}"): (runtime, precision)
        for name, runtime in registered().items()
        for precision in runtime.precisions
    }


def known_runtimes() -> tuple[str, ...]:
    """Every runtime that a model can be timed in."""
    return (*IN_TORCH, *exported())


def is_exact(runtime: str) -> bool:
    """Whether a runtime computes in fp32, so that its logits must be those of eager mode."""
    return runtime in IN_TORCH or exported()[runtime][1] == FP32


def check_runtime(runtime: str) -> None:
    """Checks that a runtime can be used here.

    Raises:
        SpecError: there is no such runtime.
        DyntuneError: a library is missing.
    """
    if runtime not in known_runtimes():
        raise SpecError(unknown_name("runtime", runtime, known_runtimes()))
    if runtime in IN_TORCH:
        return
    kind, precision = exported()[runtime]
    packages = dict.fromkeys((*kind.writes_with, *kind.runs_with, *kind.precisions[precision].packages))
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise DyntuneError(f"the runtime {runtime} needs {', '.join(missing)}: pip install {' '.join(missing)}")


def build(runtime: str, model: TunedModel, images: Tensor, *, threads: int, folder: Path) -> Callable[[Tensor], Tensor]:
    """A model as it runs in a runtime: images ``(B, 3, height, width)`` to logits ``(B, classes)``.

    Args:
        runtime: one of ``known_runtimes()``.
        model: in eval mode; left as it is.
        images: of the kind that it will see, preprocessed; a precision that needs scales takes them from these.
        threads: that a runtime outside of this process's torch may use.
        folder: where it writes its files to, which have to stay as long as the result is used; not there yet.

    Raises:
        DyntuneError: the model cannot run there.
    """
    if runtime == "eager":
        return model
    if runtime == "fast":
        return optimize(model)
    kind, precision = exported()[runtime]
    scales = images if kind.precisions[precision].images else None
    export(model, folder, runtime=kind.name(), precision=precision, calibration_images=scales)
    return open_export(folder, threads=threads, trust=True)
