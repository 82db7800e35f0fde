"""The runtimes that a model can be timed in, and how each is made from a tuned model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from dyntune.core.errors import DyntuneError, SpecError, unknown_name
from dyntune.inference import deploy
from dyntune.model.tuned import TunedModel

if TYPE_CHECKING:
    from dyntune.inference.export.folder import Precision, RuntimeName

IN_TORCH = ("eager", "fast")
"""Runtimes in the process's own torch, on any device."""
_LIBRARIES: dict[str, tuple[str, ...]] = {
    "eager": (),
    "fast": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "onnx-int8": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "openvino-int8": ("openvino", "nncf"),
    "torch-export": (),
}
_WRITTEN: dict[str, tuple[RuntimeName, Precision]] = {
    "onnx": ("onnx", "fp32"),
    "onnx-int8": ("onnx", "int8"),
    "openvino": ("openvino", "fp32"),
    "openvino-int8": ("openvino", "int8"),
    "torch-export": ("torch", "fp32"),
}
RUNTIMES = tuple(_LIBRARIES)


def check_runtime(runtime: str) -> None:
    """Checks that a runtime can be used here.

    Raises:
        SpecError: there is no such runtime.
        DyntuneError: a library is missing.
    """
    if runtime not in RUNTIMES:
        raise SpecError(unknown_name("runtime", runtime, RUNTIMES))
    missing = [name for name in _LIBRARIES[runtime] if importlib.util.find_spec(name) is None]
    if missing:
        raise DyntuneError(f"the runtime {runtime} needs {', '.join(missing)}: pip install {' '.join(missing)}")


def build(runtime: str, model: TunedModel, images: Tensor, *, threads: int, folder: Path) -> Callable[[Tensor], Tensor]:
    """A model as it runs in a runtime: images ``(B, 3, height, width)`` to logits ``(B, classes)``.

    Args:
        runtime: one of ``RUNTIMES``.
        model: in eval mode; left as it is.
        images: of the kind that it will see, preprocessed; int8 in OpenVINO takes its scales from them.
        threads: that a runtime outside of this process's torch may use.
        folder: where it writes its files to, which have to stay as long as the result is used; not there yet.

    Raises:
        DyntuneError: the model cannot run there.
    """
    if runtime == "eager":
        return model
    if runtime == "fast":
        return deploy(model)
    # Here, because the exporters need not be there, nor be loaded, for the runtimes in torch.
    from dyntune.inference.export.bundle import write
    from dyntune.inference.export.folder import open_runtime

    name, precision = _WRITTEN[runtime]
    scales = images if (name, precision) == ("openvino", "int8") else None
    write(model, folder, runtime=name, precision=precision, calibration_images=scales)
    return open_runtime(folder, threads=threads, trust=True)
