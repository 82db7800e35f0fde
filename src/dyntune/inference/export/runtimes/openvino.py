"""OpenVINO: writing a program as a file, and running the file."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from dyntune.core.errors import DeploymentError, in_one_line
from dyntune.inference.export.program import ACTIVE, INPUT, LOGITS, own_copy
from dyntune.inference.export.runtimes.base import Runtime

_INSTALL = "pip install 'dyntune[openvino]'"


def write_openvino(program: ExportedProgram, path: str | Path) -> None:
    """Writes a program in fp32 to ``path``, an ``.xml`` file, and its weights to the ``.bin`` file beside it.

    Inputs and outputs are named as in ``export_program``.

    Raises:
        DeploymentError: OpenVINO is not installed, the name is another, or an operator has no translation.
    """
    path = Path(path)
    if path.suffix != ".xml":
        raise DeploymentError(f"OpenVINO writes a model to a file that ends in .xml; given {path.name}.")
    try:
        import openvino
    except ImportError as error:
        raise DeploymentError(f"writing OpenVINO files needs openvino ({error}): {_INSTALL}.") from error
    assert program.example_inputs is not None  # those that it was traced with
    sizes = program.example_inputs[0][0].shape[1:]
    try:
        with _log_as_it_was():
            model = openvino.convert_model(own_copy(program).run_decompositions(_DECOMPOSITIONS))
        model.reshape([-1, *sizes])  # without them, OpenVINO would compute something for images of any size
    except Exception as error:  # whatever its translations meet
        raise DeploymentError(f"the model cannot be converted to OpenVINO: {in_one_line(error)}.") from error
    for port, name in zip((*model.inputs, *model.outputs), (INPUT, LOGITS, ACTIVE), strict=False):
        port.set_names({name})
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as room:
        temporary = Path(room) / path.name
        openvino.save_model(model, temporary, compress_to_fp16=False)
        for written in (temporary.with_suffix(".bin"), temporary):  # who sees the .xml finds its weights
            os.replace(written, path.with_name(written.name))


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


class OpenVinoRuntime(Runtime):
    """An OpenVINO file run on the CPU, in fp32.

    Args:
        path: of the ``.xml`` file; the ``.bin`` file lies beside it.
        threads: of one forward pass; None for one on each core.

    Raises:
        DeploymentError: OpenVINO is not installed, or the file cannot be read.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        try:
            import openvino
        except ImportError as error:
            raise DeploymentError(f"running OpenVINO files needs openvino ({error}): {_INSTALL}.") from error
        # Without the precision it computes in bf16 where the processor has that, and gates flip.
        settings: dict[str, str | int] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            core = openvino.Core()
            self._model = core.compile_model(core.read_model(path), "CPU", settings)
        except Exception as error:  # OpenVINO raises RuntimeError and its own kinds
            raise DeploymentError(f"OpenVINO cannot open {path}: {in_one_line(error)}.") from error

    def compute(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        logits, *masks = self._model(images.numpy()).values()
        return torch.from_numpy(logits), torch.from_numpy(masks[0]) if masks else None
