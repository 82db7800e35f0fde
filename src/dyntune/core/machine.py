"""The machine that something is measured on: processor, devices, versions, peak memory, the load of other processes."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dyntune.core.words import counted

_PROC = Path("/proc")
_RESET_PEAK = "5"
"""What Linux's /proc/self/clear_refs takes to set the high-water mark of the resident set to the set's size."""


def machine(threads: int | None = None) -> str:
    """What figures were measured on: processor, cores, threads, GPU, versions.

    Args:
        threads: those that something runs in; by default torch's.
    """
    name = platform.processor() or platform.machine()
    cpuinfo = _PROC / "cpuinfo"
    if cpuinfo.exists():
        models = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    cores = f"{counted(os.cpu_count() or 1, 'core')}, {counted(threads or torch.get_num_threads(), 'thread')}"
    return f"{name}, {cores}{device}, torch {torch.__version__}, {platform.system()}"


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes by which memory in use rises at most while ``call`` runs.

    On a CUDA device that is what torch has allocated there; on the CPU the process's resident set, which includes what
    the runtime keeps for later calls. None where it cannot be had: without Linux's /proc, and on other devices.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - allocated
    before = _reset_peak() if device.type == "cpu" else None
    call()
    return None if before is None else max(0, _peak() - before)


def _reset_peak() -> int | None:
    """Sets the high-water mark of the resident set to its present size, in bytes; None where that cannot be done."""
    if not (_PROC / "self/clear_refs").exists():
        return None
    # Memory that was freed but not given back would be taken again without a rise.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
    try:
        (_PROC / "self/clear_refs").write_text(_RESET_PEAK)
        return _peak()
    except (OSError, LookupError):
        return None


def _peak() -> int:
    lines = dict(line.split(":", 1) for line in (_PROC / "self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


class OtherLoad:
    """The processor time that others take while ``with OtherLoad() as load`` runs.

    Attributes:
        cores: cores that other processes of the machine kept busy on average; None where /proc/stat does not say.
    """

    cores: float | None = None

    def __enter__(self) -> OtherLoad:
        self._start = time.perf_counter()
        self._before = _others()
        return self

    def __exit__(self, *_: object) -> None:
        after = _others()
        if self._before is not None and after is not None:
            self.cores = max(0.0, (after - self._before) / (time.perf_counter() - self._start))


def _others() -> float | None:
    """Seconds of processor time that all processes but this one have taken."""
    try:
        user, nice, system, _, _, irq, softirq, steal = map(int, (_PROC / "stat").read_text().split()[1:9])
    except (OSError, ValueError):
        return None
    own = os.times()
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own.user - own.system
