"""The machine in words; peak memory and the load of others, as the operating system tells them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dyntune.core import machine
from dyntune.core.machine import OtherLoad, peak_memory
from dyntune.core.words import counted

CPU = torch.device("cpu")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells")
def test_memory_that_is_freed_again_counts():
    size = 64 << 20
    peak_memory(lambda: None, CPU)
    peak = peak_memory(lambda: torch.ones(size, dtype=torch.uint8), CPU)
    # Where memory is short, the system may take back pages of files that are mapped meanwhile.
    assert 0.5 * size < peak < 1.5 * size
    assert peak_memory(lambda: None, CPU) < size / 4, "the mark is set back for each call"


def test_without_proc_the_call_runs_and_nothing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    ran = []
    assert peak_memory(lambda: ran.append(1), CPU) is None and ran == [1]
    with OtherLoad() as load:
        pass
    assert load.cores is None


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux tells")
def test_load_of_another_process_is_seen():
    spin = "import time\nend = time.time() + 60\nwhile time.time() < end: pass"
    other = subprocess.Popen([sys.executable, "-c", spin])
    try:
        with OtherLoad() as load:
            time.sleep(1.5)
    finally:
        other.kill()
        other.wait()
    assert load.cores > 0.1


def test_own_time_is_left_out(monkeypatch, tmp_path):
    """Between two readings the machine was busy for 5 s, 3 of them ours, within 4 s."""
    ticks = os.sysconf("SC_CLK_TCK")
    own = iter([(10.0, 1.0), (12.0, 2.0)])
    clock = iter([100.0, 104.0])
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    monkeypatch.setattr(machine.os, "times", lambda: os.times_result((*next(own), 0, 0, 0)))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    stat = tmp_path / "stat"
    stat.write_text(f"cpu {50 * ticks} 0 {10 * ticks} 900 7 0 0 0 0 0\n")
    with OtherLoad() as load:
        stat.write_text(f"cpu {53 * ticks} {1 * ticks} {10 * ticks} 999 9 0 {1 * ticks} 0 0 0\n")
    assert load.cores == pytest.approx(0.5)


def test_the_machine_in_words(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nmodel name\t: A CPU @ 2 GHz: fast\nprocessor : 1\nmodel name\t: B\n")
    words = machine.machine()
    threads = counted(torch.get_num_threads(), "thread")
    assert words.startswith(f"A CPU @ 2 GHz: fast, {counted(os.cpu_count(), 'core')}, {threads}")
    assert f"torch {torch.__version__}" in words
    file.unlink()
    assert "A CPU" not in machine.machine() and " cores, " in machine.machine()
