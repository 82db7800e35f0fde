"""benchmarks/gpu.py runs from end to end on the CPU, says what it needs, and survives what does not fit."""

import argparse
import csv
import importlib.util
import os
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def gpu():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu"]


PLAIN = ["dense eager", "gather eager"]
"""Candidates that need no kernel."""


@pytest.fixture
def options():
    return argparse.Namespace(
        dtype="bfloat16", seconds=600, rates=[0.5, 0.3], rounds=2, milliseconds=0.0, candidates=PLAIN
    )


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in the process of test_interpreter.py")
def test_smoke(tmp_path, monkeypatch):
    from dyntune.inference.kernels.grouped import refusal

    out = tmp_path / "rows" / "gpu.csv"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--rates", "0.5", "--out", str(out)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    alone = [row for row in read(out) if row["batch"] == "1"]
    assert [row["candidate"] for row in alone] == ["ours graph"] and "CUDA" in alone[0]["failure"]
    rows = {row["candidate"]: row for row in read(out) if row["batch"] == "2"}
    assert set(rows) == {"dense eager", "gather eager", "ours eager", "grouped eager", "tome eager", "ours graph"}
    assert "CUDA" in rows.pop("ours graph")["failure"]
    refused = refusal(torch.device("cpu"), torch.bfloat16)
    if refused:
        assert refused in rows.pop("grouped eager")["failure"]
    for name, row in rows.items():
        assert not row["failure"], (name, row["failure"])
        assert float(row["milliseconds"]) > 0 and float(row["images_per_second"]) > 0
        efficiency = float(row["speedup"]) / float(row["macs_ratio"])
        assert float(row["skip_efficiency"]) == pytest.approx(efficiency)
    assert float(rows["ours eager"]["macs_ratio"]) > 1 and float(rows["dense eager"]["macs_ratio"]) == 1
    assert 0.3 < float(rows["ours eager"]["active"]) < 0.7


def test_smoke_chooses_the_interpreter_before_anything_is_imported(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke"])
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "0")
    monkeypatch.setitem(sys.modules, "timm", None)  # the first that imports Triton; none can be imported
    with pytest.raises(ImportError):
        runpy.run_path(str(SCRIPT))
    assert os.environ["TRITON_INTERPRET"] == "1"


@torch.no_grad()
def test_what_does_not_fit_leaves_rows_and_the_rest_goes_on(gpu, options, tmp_path, monkeypatch):
    out = tmp_path / "gpu.csv"
    counted = gpu.macs

    def macs(model, images):
        if len(images) == 3:
            raise torch.OutOfMemoryError("no memory for three images")
        return counted(model, images)

    monkeypatch.setattr(gpu, "macs", macs)
    monkeypatch.setattr(gpu, "free", lambda device: None)  # what other tests hold is not to be searched through
    plan = (("no such model", 2, PLAIN), ("tiny", 3, PLAIN), ("tiny", 2, PLAIN))
    gpu.measure(plan, gpu.Table(out), options, torch.device("cpu"))
    found = {}
    for row in read(out):
        found.setdefault((row["model"], row["batch"]), []).append((row["candidate"], row["rate"], row["failure"]))
    unknown, large, small = found.values()
    assert [name for name, _, _ in unknown] == PLAIN and all(failure for *_, failure in unknown)
    every = [(name, rate) for rate in ("0.5", "0.3") for name in PLAIN]
    assert [row[:2] for row in large] == every and all("no memory" in failure for *_, failure in large)
    assert sorted(row[:2] for row in small) == sorted(every) and not any(failure for *_, failure in small)


@torch.no_grad()
def test_logits_without_a_measure_fail(gpu, options):
    models = gpu.Models("tiny", torch.device("cpu"), torch.bfloat16)
    images = torch.randn(4, 3, 32, 32).bfloat16()
    models.open(0.5, images)
    models.timed["dense"].head.bias.fill_(torch.nan)
    forwards = {name: models.forward(name, images) for name in PLAIN}
    base = partial(
        gpu.Row, measured="", gpu="", driver="", torch="", triton="", model="tiny", dtype="", batch=4, rate=0.5
    )
    rows = {row.candidate: row for row in gpu.rows_of(models, forwards, images, options, base)}
    assert "not finite" in rows["dense eager"].failure
    assert not rows["gather eager"].failure and rows["gather eager"].milliseconds > 0


def test_highest_logits_must_agree_as_the_dtype_allows(gpu):
    def passes(top1, plain, dtype):
        return not gpu.disagreement(0.01, top1, 0.01, plain, dtype, images=100)

    assert passes(0.9, 0.95, torch.bfloat16) and not passes(0.85, 0.95, torch.bfloat16)
    assert passes(0.5, 0.6, torch.bfloat16) and not passes(0.4, 0.6, torch.bfloat16)
    assert passes(0.9, 0.9, torch.float16) and not passes(0.8, 0.8, torch.float16)
    assert gpu.disagreement(0.2, 1.0, 0.01, 1.0, torch.float16, images=100)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_asks_for_a_gpu(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "gpu.csv")])
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main()
    assert not list(tmp_path.iterdir())
