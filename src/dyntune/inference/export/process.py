"""A process with one exported model in it.

``python -m dyntune.inference.export.process FOLDER IMAGES.npy [THREADS]`` runs the model once for each line that it
reads, and answers with a line. Thread pools of torch, ONNX Runtime and OpenVINO would disturb each other in a process.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from dyntune.core.errors import ExportError
from dyntune.inference.export.folder import open_export

_READY = "ready"
_PATIENCE = 300.0
"""Seconds that one call may take; the first one opens the model too."""


class Candidate:
    """The parent's end of such a process; calling it runs the model once, on the images that it was started with.

    Args:
        folder: of an exported model; what the process has to say goes into a log beside it.
        images: a NumPy file, ``(B, 3, height, width)``.
        threads: that the runtime may use; None for as many as it takes by itself.
    """

    def __init__(self, folder: Path, images: Path, threads: int | None) -> None:
        self.folder = folder
        command = [sys.executable, "-m", __name__, str(folder), str(images), *([str(threads)] if threads else [])]
        self._log = folder.with_name(f"{folder.name}.log")  # a pipe that nobody reads would fill and stop the process
        with self._log.open("w") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def __call__(self, images: Tensor) -> None:
        """Runs the model once; ``images`` are those that the process has already.

        Raises:
            ExportError: the process has ended, or took so long that it was ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        began = time.monotonic()
        limit = threading.Timer(_PATIENCE, self._process.kill)
        limit.start()
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            limit.cancel()
        if answer.strip() != _READY:
            self._process.wait()
            if time.monotonic() - began >= _PATIENCE:
                raise ExportError(f"{self.folder.name} took longer than {_PATIENCE:g} seconds for one call here")
            said = self._log.read_text().strip().splitlines()
            raise ExportError(f"{self.folder.name} does not run here: {said[-1] if said else 'it ended'}")


def main(arguments: list[str]) -> None:
    """Opens the model, and runs it for each line on standard input."""
    folder, images = arguments[:2]
    threads = int(arguments[2]) if len(arguments) > 2 else None
    if threads is not None:
        torch.set_num_threads(threads)
    batch = torch.from_numpy(np.load(images, allow_pickle=False))
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the answers
        model = open_export(folder, threads, trust=True)
    for _ in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            model(batch)
        print(_READY, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
