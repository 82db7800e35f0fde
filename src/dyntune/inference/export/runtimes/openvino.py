"""OpenVINO: writing a program as a file, and running the file."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram

from dyntune.core.errors import EXTRAS, ExportError, in_one_line
from dyntune.core.files import room_beside
from dyntune.core.limits import limits_named
from dyntune.inference.export.int8.openvino import save_quantized
from dyntune.inference.export.linears import BackboneLinears
from dyntune.inference.export.program import ACTIVE, INPUT, LOGITS, own_copy
from dyntune.inference.export.runtimes.base import FP32, Offer, Quantised, Runner, Runtime, Session


@dataclass(frozen=True)
class OpenVino(Runtime):
    """An OpenVINO file run on the CPU, in fp32 or int8."""

    title = "OpenVINO"
    file = "model.xml"
    writes_with = runs_with = ("openvino",)
    install = " ".join(EXTRAS["openvino"])
    runner = Runner(
        "openvino",
        'openvino.compile_model(FOLDER / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})',
        'model(images)["logits"]',
    )
    precisions: ClassVar[Mapping[str, Offer]] = {FP32: Offer(), "int8": Offer(packages=("nncf",), images=True)}

    def write(self, program: ExportedProgram, path: Path, spec: str) -> None:
        """Writes the graph to ``path``, an ``.xml`` file, and its weights to the ``.bin`` file beside it."""
        if path.suffix != ".xml":
            raise ExportError(f"OpenVINO writes a model to a file that ends in .xml; given {path.name}.")
        with self.importing("writing OpenVINO files", self.writes_with):
            import openvino
        assert program.example_inputs is not None  # those that it was traced with
        sizes = program.example_inputs[0][0].shape[1:]
        try:
            with _log_as_it_was():
                model = openvino.convert_model(own_copy(program).run_decompositions(_DECOMPOSITIONS))
            model.reshape([-1, *sizes])  # without them, OpenVINO would compute something for images of any size
        except Exception as error:  # whatever its translations meet
            raise ExportError(f"the model cannot be converted to OpenVINO: {in_one_line(error)}.") from error
        for port, name in zip((*model.inputs, *model.outputs), (INPUT, LOGITS, ACTIVE), strict=False):
            port.set_names({name})
        with limits_named(), room_beside(path) as room:
            temporary = room / path.name
            openvino.save_model(model, temporary, compress_to_fp16=False)
            for written in (temporary.with_suffix(".bin"), temporary):  # who sees the .xml finds its weights
                os.replace(written, path.with_name(written.name))

    def quantize(
        self, precision: str, exact: Path, path: Path, linears: BackboneLinears, images: Tensor | None
    ) -> Quantised:
        assert images is not None  # asked for in ``precisions``
        return Quantised(save_quantized(exact, path, images, linears), weight_bits=8)

    def open(self, path: Path, threads: int | None) -> Session:
        with self.importing("running OpenVINO files", self.runs_with):
            import openvino
        # Without the precision it computes in bf16 where the processor has that, and gates flip.
        settings: dict[str, str | int] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            core = openvino.Core()
            return OpenVinoSession(core.compile_model(core.read_model(path), "CPU", settings))
        except Exception as error:  # OpenVINO raises RuntimeError and its own kinds
            raise ExportError(f"OpenVINO cannot open {path}: {in_one_line(error)}.") from error


class OpenVinoSession(Session):
    """A compiled model.

    Args:
        model: ``openvino.CompiledModel``.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._of_thread = threading.local()

    def compute(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        # Calling the model itself shares one request among all threads, which then get each other's answers.
        if not hasattr(self._of_thread, "request"):
            self._of_thread.request = self._model.create_infer_request()
        logits, *masks = self._of_thread.request.infer(images.numpy(), share_inputs=True).values()
        return torch.from_numpy(logits), torch.from_numpy(masks[0]) if masks else None


@contextmanager
def _log_as_it_was() -> Iterator[None]:
    """Leaves the application's log alone: OpenVINO silences it, and where a conversion fails leaves it silent."""
    root = logging.getLogger()
    level, filters, handlers = root.level, list(root.filters), list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.filters[:], root.handlers[:] = filters, handlers


def _index_add(x: Tensor, dim: int, index: Tensor, added: Tensor) -> Tensor:
    """For an index without repetitions, as those of active tokens are."""
    return x.index_copy(dim, index, x.index_select(dim, index) + added)


_DECOMPOSITIONS = {torch.ops.aten.index_add.default: _index_add}
"""Of what OpenVINO does not translate."""
