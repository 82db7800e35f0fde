"""Where no kernel runs, the error says what to do; ``test_imports.py`` sees that nothing is imported for it."""

from types import SimpleNamespace

import pytest
import torch

from dyntune.core.errors import DyntuneError
from dyntune.inference.kernels import launch, ops


def test_a_cpu_without_the_interpreter_is_refused():
    x = torch.zeros(1, 2, 8)
    with pytest.raises(DyntuneError, match=r"CUDA device, and the model is on cpu.*compact"):
        ops.joint(x, x[0], x[0, :, 0], x[0])


@pytest.fixture
def gpu(monkeypatch):
    """Sets the GPU that PyTorch reports, without there being one."""

    def gpu(name, major, minor, hip=None):
        properties = SimpleNamespace(name=name, major=major, minor=minor)
        monkeypatch.setattr(launch, "_INSTALLED", True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
        monkeypatch.setattr(torch.version, "hip", hip)
        return torch.device("cuda", 0)

    return gpu


def test_old_gpus_are_refused_by_name(gpu):
    assert launch.unavailable(gpu("NVIDIA A100", 8, 0)) is None
    assert launch.unavailable(gpu("NVIDIA B200", 10, 0)) is None
    for name, major, minor in (("Tesla T4", 7, 5), ("Tesla P100", 6, 0)):
        said = launch.unavailable(gpu(name, major, minor))
        assert name in said and f"{major}.{minor}" in said and "8.0" in said


def test_rocm_is_refused_and_not_taken_for_hopper(gpu):
    pytest.importorskip("triton", reason="the grouped product needs Triton")
    from dyntune.inference.kernels.grouped import refusal

    matrix = SimpleNamespace(device=None, shape=(8, 8), element_size=lambda: 2, data_ptr=lambda: 0)
    matrix.device = gpu("NVIDIA H100", 9, 0)
    assert launch.describable(matrix) and refusal(matrix.device, torch.bfloat16) is None
    matrix.device = gpu("AMD Instinct MI300X", 9, 4, hip="6.4")
    assert not launch.describable(matrix) and "9.0" in refusal(matrix.device, torch.bfloat16)
    said = launch.unavailable(matrix.device)
    assert "MI300X" in said and "ROCm" in said


def test_missing_triton_says_what_to_install(monkeypatch):
    monkeypatch.setattr(launch, "_INSTALLED", False)
    assert "pip install triton" in launch.unavailable(torch.device("cuda"))
