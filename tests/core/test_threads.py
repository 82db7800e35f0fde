"""Threads of torch: what the user has set, what cgroups grant, and what a trial takes."""

from types import SimpleNamespace

import pytest
import torch

from dyntune.core import threads


@pytest.fixture
def untouched(monkeypatch):
    """A process in which nobody has set a number of threads, with four cores."""
    before = torch.get_num_threads()
    for name in threads._ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_settled", False)
    monkeypatch.setattr(threads, "_AT_FIRST", before)
    monkeypatch.setattr(threads, "available_cores", lambda: 4)
    yield monkeypatch
    torch.set_num_threads(before)


@pytest.fixture
def takes(untouched):
    """Makes a call that takes so many seconds with one, two and four threads, by a clock that nothing else moves."""
    now = 0.0

    def make(**seconds):
        def call():
            nonlocal now
            now += seconds[f"with_{torch.get_num_threads()}"]

        return call

    untouched.setattr(threads, "time", SimpleNamespace(perf_counter=lambda: now))
    return make


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({"with_1": 4e-3, "with_2": 2e-3, "with_4": 1e-3}, 4),
        ({"with_1": 2e-3, "with_2": 1e-3, "with_4": 30e-3}, 2),
        ({"with_1": 1e-3, "with_2": 20e-3, "with_4": 40e-3}, 1),
    ],
)
def test_the_quickest_number_is_taken_and_said(takes, seconds, best):
    assert threads.settle_threads(takes(**seconds), 0.15).startswith(f"{best} of 4 threads, quickest in a trial")
    assert torch.get_num_threads() == best
    assert threads.settle_threads(lambda: pytest.fail("tried again")) is None


def test_of_equals_the_fewest_are_taken(takes):
    assert threads.settle_threads(takes(with_1=3e-3, with_2=3e-3, with_4=3e-3), 0.1).startswith("1 of 4")


@pytest.mark.parametrize("name", threads._ENVIRONMENT)
def test_what_the_user_has_set_stays(untouched, name):
    untouched.setenv(name, "3")
    assert threads.settle_threads(lambda: pytest.fail("tried")) is None


def test_what_the_program_has_set_stays(untouched):
    torch.set_num_threads(torch.get_num_threads() + 1)
    assert threads.settle_threads(lambda: pytest.fail("tried")) is None


def test_one_core_needs_no_trial(untouched):
    untouched.setattr(threads, "available_cores", lambda: 1)
    assert "one core" in threads.settle_threads(lambda: pytest.fail("tried"))
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("files", "own", "cores"),
    [
        ({}, None, 16),
        ({"cpu.max": "max 100000"}, "0::/", 16),
        ({"cpu.max": "200000 100000"}, "0::/", 2),
        ({"cpu.max": "150000 100000"}, "0::/", 2),
        ({"cpu.max": "20000 100000"}, "0::/", 1),
        ({"job/cpu.max": "300000 100000", "job/step/cpu.max": "max 100000"}, "0::/job/step", 3),
        ({"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/", 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/", 16),
        ({"cpu.max": "3200000 100000"}, "0::/outside/of/this/namespace", 16),
    ],
)
def test_quotas_of_containers_are_honoured(monkeypatch, tmp_path, files, own, cores):
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(threads, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(threads, "_OWN_GROUPS", tmp_path / "own")
    for name, text in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text + "\n")
    if own is not None:
        (tmp_path / "own").write_text(own + "\n")
    assert threads.available_cores() == cores
