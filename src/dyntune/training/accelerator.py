"""The Accelerate object of a run: device, precision, gradient accumulation, and the processes that take part."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from dyntune.core.errors import TrainingError
from dyntune.training.settings import TrainSettings

log = logging.getLogger("dyntune")

_TURN = threading.RLock()
_GLOBAL = (AcceleratorState, GradientState, PartialState)


def make_accelerator(settings: TrainSettings) -> Accelerator:
    """Raises TrainingError when the machine does not have what the settings ask for."""
    precision = {"fp32": "no"}.get(settings.precision, settings.precision)
    # Without being told, Accelerate takes several processes without a GPU for as many separate runs.
    cpu = settings.device == "cpu" or (settings.device == "auto" and not torch.accelerator.is_available())
    accelerator = Accelerator(cpu=cpu, mixed_precision=precision, gradient_accumulation_steps=settings.accumulate)
    if settings.device in ("cuda", "mps") and accelerator.device.type != settings.device:
        raise TrainingError(f"device={settings.device}: there is none; this machine offers {accelerator.device.type}.")
    if settings.precision == "fp16" and accelerator.device.type == "cpu":
        raise TrainingError("precision=fp16 needs a GPU; on a CPU use fp32 or bf16.")
    started = launched_processes()
    if accelerator.num_processes != started:
        raise TrainingError(
            f"{started} processes were started, but on {accelerator.device.type} they do not train together: each "
            "would train a model of its own. Start one, or use device=cpu or GPUs that torchrun can connect."
        )
    return accelerator


def pick_device(name: str) -> torch.device:
    """The device that ``--device`` names; ``auto`` takes an accelerator if there is one."""
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    if name not in ("cpu", "cuda", "mps"):
        raise TrainingError(f"device {name!r}: expected auto, cpu, cuda or mps.")
    if name != "cpu" and not getattr(torch, name).is_available():
        raise TrainingError(f"device {name!r} is not available on this machine; use auto or cpu.")
    return torch.device(name)


def launched_processes() -> int:
    """How many processes torchrun or accelerate launch has started to do the same together; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process is the one that writes and speaks, once a run has connected the processes."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """A run's own Accelerate state and random numbers, of which a process has one: afterwards they are as before.

    Accelerate keeps precision, device and accumulation for the whole process. A second run in another thread waits for
    the first one to end; it would draw from the same random numbers.
    """
    if not _TURN.acquire(blocking=False):
        log.warning(
            "another fit runs in this process; this one waits for its end. Processes of their own run together."
        )
        _TURN.acquire()
    try:
        before = [dict(state._shared_state) for state in _GLOBAL]
        connected = PartialState._shared_state.get("num_processes", 1) > 1
        for state in _GLOBAL:
            if state is not PartialState or not connected:  # a group of processes is made once
                state._shared_state.clear()
        try:
            yield
        finally:
            # Into the same dictionaries: the caller's objects refer to them.
            for state, kept in zip(_GLOBAL, before, strict=True):
                state._shared_state.clear()
                state._shared_state.update(kept)
    finally:
        _TURN.release()
