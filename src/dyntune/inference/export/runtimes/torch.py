"""torch.export's own file, for processes that have PyTorch and nothing else of what the model was built with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from dyntune.core.errors import DeploymentError, in_one_line
from dyntune.core.files import write_atomically
from dyntune.inference.export.runtimes.base import Runtime


def write_torch(program: ExportedProgram, path: str | Path) -> None:
    """Writes a program to a ``.pt2`` file."""

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            torch.export.save(program, file)

    write_atomically(Path(path), save)


class TorchRuntime(Runtime):
    """A ``.pt2`` file run by PyTorch, on a CPU.

    Open files that you trust only: a ``.pt2`` file is a graph for ``torch.export.load``, which unpickles parts of it,
    and what is unpickled may run code.

    Args:
        path: of the file.
        threads: PyTorch's threads, for the whole process; None leaves them as they are.

    Raises:
        DeploymentError: the file cannot be read.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            self._module = torch.export.load(path).module()
        except Exception as error:  # whatever PyTorch meets in a damaged file
            raise DeploymentError(
                f"{path} is not a program that this PyTorch can load: {in_one_line(error)}."
            ) from error

    @torch.inference_mode()
    def compute(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        logits, *masks = self._module(images)
        return logits, masks[0] if masks else None
