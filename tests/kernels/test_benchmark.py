"""benchmarks/gpu.py runs from end to end on the CPU, and says what it needs."""

import csv
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_smoke(tmp_path):
    out = tmp_path / "rows" / "gpu.csv"
    result = run("--smoke", "--rates", 0.5, "--out", out)
    assert result.returncode == 0, result.stderr[-3000:]
    with out.open(newline="") as file:
        rows = {row["candidate"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"dense eager", "gather eager", "ours eager", "grouped eager", "tome eager", "ours graph"}
    assert "CUDA" in rows.pop("ours graph")["failure"]
    for name, row in rows.items():
        assert not row["failure"], (name, row["failure"])
        assert float(row["milliseconds"]) > 0 and float(row["images_per_second"]) > 0
        efficiency = float(row["speedup"]) / float(row["macs_ratio"])
        assert float(row["skip_efficiency"]) == pytest.approx(efficiency)
    assert float(rows["ours eager"]["macs_ratio"]) > 1 and float(rows["dense eager"]["macs_ratio"]) == 1
    assert 0.3 < float(rows["ours eager"]["active"]) < 0.7


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_asks_for_a_gpu(tmp_path):
    result = run("--out", tmp_path / "gpu.csv")
    assert result.returncode == 1 and "CUDA" in result.stderr
    assert not list(tmp_path.iterdir())
