"""How many threads torch takes on a CPU: what the user has set, else what a short trial finds quickest."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dyntune.core.words import counted

SECONDS = 1.0
"""That a trial takes, unless a single call takes longer."""
_ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_BETTER = 1.05
"""More threads must be so much quicker to be taken: on a busy machine they wait for each other."""
_AT_FIRST = torch.get_num_threads()
_settled = False


def available_cores() -> int:
    """Cores that this process may use: those that it may run on, and no more than the quotas of its cgroups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(quota) for quota in _quotas())]))


def _quotas() -> Iterator[float]:
    """The cores that each cgroup around this process grants, of either version of cgroups."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        lines = []
    groups = {"": Path("/"), "cpu": Path("/")}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        groups |= {name: Path(path) for name in ("", "cpu") if name in controllers.split(",")}
    for folder in _upwards(_CGROUPS, groups[""]):
        words = _words(folder / "cpu.max")
        if len(words) == 2 and words[0] != "max":
            yield int(words[0]) / int(words[1])
    for folder in _upwards(_CGROUPS / "cpu", groups["cpu"]):
        quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
        if quota and period and int(quota[0]) > 0:
            yield int(quota[0]) / int(period[0])


def _upwards(root: Path, path: Path) -> Iterator[Path]:
    """The folders of a cgroup and of those around it; a container sees its own as the root."""
    return (root / part.relative_to("/") for part in (path, *path.parents))


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def chosen_by_user() -> bool:
    """Whether somebody has set the number of threads: in the environment, or in this process."""
    return _settled or torch.get_num_threads() != _AT_FIRST or any(os.environ.get(name) for name in _ENVIRONMENT)


def take_threads(count: int) -> None:
    """Sets the number of threads for good: no trial changes it any more."""
    global _settled
    torch.set_num_threads(count)
    _settled = True


def settle_threads(call: Callable[[], Any], seconds: float = SECONDS) -> str | None:
    """Takes the number of threads with which ``call`` runs quickest, unless somebody has set one.

    Args:
        call: what will be done again and again, a piece of it that takes milliseconds.
        seconds: to spend on the trial.

    Returns:
        What was taken, for people; None where the user has chosen.
    """
    if chosen_by_user():
        return None
    cores = available_cores()
    counts = sorted({min(2**power, cores) for power in range(cores.bit_length() + 1)})
    if len(counts) == 1:
        take_threads(1)
        return "1 thread: the process may use one core"
    rates = {}
    best = 1
    for count in counts:
        torch.set_num_threads(count)
        rates[count] = _rate(call, seconds / len(counts))
        if rates[count] > _BETTER * rates[best]:
            best = count
        elif count > 2 * best:  # twice as many gained nothing, and four times as many did not either
            break
    take_threads(best)
    others = ", ".join(f"{count}: {rate / rates[best]:.2f}" for count, rate in rates.items() if count != best)
    return f"{best} of {counted(cores, 'thread')}, quickest in a trial (of its speed had {others})"


def _rate(call: Callable[[], Any], seconds: float) -> float:
    """Calls per second; not the quickest one's, for what disturbs some of them is what is to be found out."""
    call()
    began = now = time.perf_counter()
    calls = 0
    while now < began + seconds:
        call()
        calls, now = calls + 1, time.perf_counter()
    return calls / (now - began)
