"""What all kernels need to know about where they run."""

import importlib.util
import os

import torch
from torch import Tensor

_INSTALLED = importlib.util.find_spec("triton") is not None

_OLDEST = 8
"""Compute capability from which on Triton multiplies bf16 in tensor cores."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the kernels compute with; sums are always in fp32."""


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU; it reads the variable when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of NVIDIA's GPU ``device``; (0, 0) for what is none: ROCm counts otherwise."""
    if device.type != "cuda" or torch.version.hip:
        return 0, 0
    # Unlike get_device_capability it is a constant for torch.compile.
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


def unavailable(device: torch.device) -> str | None:
    """Why no kernel runs on ``device``; None if they do."""
    if not _INSTALLED:
        return "Triton is not installed: pip install triton"
    if interpreted():
        return None
    if device.type != "cuda":
        return f"the kernels need a CUDA device, and the model is on {device.type}"
    if torch.version.hip:
        return f"the kernels are for NVIDIA's GPUs, and this is {torch.cuda.get_device_properties(device).name} on ROCm"
    major, minor = capability(device)
    if major < _OLDEST:
        return (
            f"the kernels need a GPU of compute capability {_OLDEST}.0 or later, and "
            f"{torch.cuda.get_device_properties(device).name} has {major}.{minor}"
        )
    return None


def describable(*matrices: Tensor) -> bool:
    """Whether the copy engine of Hopper and later can fetch tiles of these row-major matrices."""
    if capability(matrices[0].device)[0] < 9:
        return False
    return all(
        matrix.element_size() == 2 and matrix.data_ptr() % 16 == 0 and matrix.shape[1] * 2 % 16 == 0
        for matrix in matrices
    )
