"""Where no kernel runs: nothing is imported for it, and the error says what to do."""

import subprocess
import sys

import pytest
import torch

from dyntune.errors import DyntuneError
from dyntune.kernels import launch, ops


def test_no_kernel_is_imported_before_it_runs():
    program = "import sys, dyntune.kernels; print(*(name for name in sys.modules if 'dyntune.kernels.' in name))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names = {name.removeprefix("dyntune.kernels.") for name in result.stdout.split()}
    assert "execution" in names
    assert not names & {"arithmetic", "compaction", "gathering", "grouped", "joint", "product"}


def test_a_cpu_without_the_interpreter_is_refused():
    x = torch.zeros(1, 2, 8)
    with pytest.raises(DyntuneError, match=r"CUDA device, and the model is on cpu.*compact"):
        ops.joint(x, x[0], x[0, :, 0], x[0])


def test_missing_triton_says_what_to_install(monkeypatch):
    monkeypatch.setattr(launch, "_INSTALLED", False)
    assert "pip install triton" in launch.unavailable(torch.device("cuda"))
