"""What all kernels need to know about where they run."""

import importlib.util
import os

import torch
from torch import Tensor

_INSTALLED = importlib.util.find_spec("triton") is not None

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the kernels compute with; sums are always in fp32."""


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU; it reads the variable when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def unavailable(device: torch.device) -> str | None:
    """Why no kernel runs on ``device``; None if they do."""
    if not _INSTALLED:
        return "Triton is not installed: pip install triton"
    if device.type != "cuda" and not interpreted():
        return f"the kernels need a CUDA device, and the model is on {device.type}"
    return None


def describable(*matrices: Tensor) -> bool:
    """Whether the copy engine of Hopper and later can fetch tiles of these row-major matrices."""
    if matrices[0].device.type != "cuda" or torch.cuda.get_device_capability(matrices[0].device)[0] < 9:
        return False
    return all(
        matrix.element_size() == 2 and matrix.data_ptr() % 16 == 0 and matrix.shape[1] * 2 % 16 == 0
        for matrix in matrices
    )
