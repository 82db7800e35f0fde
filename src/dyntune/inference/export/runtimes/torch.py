"""torch.export: its own file, for processes that have PyTorch and nothing else of what the model was built with."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from dyntune.core.errors import ExportError, in_one_line
from dyntune.core.files import write_atomically
from dyntune.inference.export.runtimes.base import Runner, Runtime, Session


@dataclass(frozen=True)
class Torch(Runtime):
    """A ``.pt2`` file run by PyTorch, on a CPU.

    Open files that you trust only: a ``.pt2`` file is a graph for ``torch.export.load``, which unpickles parts of it,
    and what is unpickled may run code.
    """

    title = "torch.export"
    file = "model.pt2"
    writes_with = runs_with = ("torch",)
    install = "torch"
    runner = Runner(
        "torch",
        'torch.export.load(FOLDER / "model.pt2").module()',
        "model(torch.from_numpy(images))[0].numpy()",
    )
    needs_trust = True
    measured_as = "torch-export"

    def write(self, program: ExportedProgram, path: Path, spec: str) -> None:
        # In memory first: where a write fails beneath it, torch.export ends the process.
        written = io.BytesIO()
        torch.export.save(program, written)
        write_atomically(path, lambda temporary: temporary.write_bytes(written.getbuffer()))

    def open(self, path: Path, threads: int | None) -> Session:
        """Opens a file; ``threads`` are PyTorch's, for the whole process."""
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            return TorchSession(torch.export.load(path).module())
        except Exception as error:  # whatever PyTorch meets in a damaged file
            raise ExportError(f"{path} is not a program that this PyTorch can load: {in_one_line(error)}.") from error


class TorchSession(Session):
    """A program in PyTorch.

    Args:
        module: the program's.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @torch.inference_mode()
    def compute(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        logits, *masks = self._module(images)
        return logits, masks[0] if masks else None
