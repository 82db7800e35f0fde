"""What a benchmark says before its first job, and how long it says that the jobs will take."""

import io
import re

from rich.console import Console

from dyntune.backbones.builtin import BUILTIN_BACKBONE
from dyntune.studies.vtab import run


def test_a_benchmark_begins_with_it(make_plan, tmp_path, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(run, "run_jobs", lambda *given: None)
    plan = make_plan(tmp_path / "run", specs=("linear", "lora"), seeds=(0, 1))
    run.run_benchmark(plan, console=Console(file=screen, width=300))
    first, data, *methods, device, training = screen.getvalue().splitlines()[:6]
    assert first.startswith(f"backbone  {BUILTIN_BACKBONE}, weights that come with Dyntune; 32 x 32 pixels, 65 tokens")
    assert ": 2 tasks of " in data and "16 training and 8 validation images each" in data
    assert [line.split()[1] for line in methods] == ["linear:", "lora:"]
    assert device.startswith("device    cpu") and "8 jobs of 2 epochs (2 seeds)" in training


def test_a_benchmark_says_how_long_its_jobs_will_take_after_the_first_epoch(make_plan, tmp_path, monkeypatch):
    plan, screen = make_plan(tmp_path / "run", seeds=(0, 1)), io.StringIO()
    jobs = plan.jobs()
    clock = iter((0.0, 60.0, 120.0))
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    with run.JobDisplay(plan, jobs, jobs, 1, Console(file=screen, width=200)) as display:
        display.begun(jobs[0])
        for share in (0.0, 0.5, 0.75):
            display.share(jobs[0], share)
    assert re.findall("about .*", screen.getvalue()) == [f"about 8 min for 4 jobs, if all are like {jobs[0]}"]


def test_photographs_on_a_small_backbone_are_warned_of(make_plan, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "too_small", lambda model, images: [f"{len(images)} are too large"])
    plan = make_plan(tmp_path / "run")
    header = run.benchmark_header(plan, run.check_methods(plan))
    assert header.warnings == ("Digits: 16 are too large",)
