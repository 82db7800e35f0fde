"""Skipping tokens on a GPU without asking it how many remain: Triton kernels, and the execution that runs them.

Nothing here imports Triton before a kernel runs.
"""

from dyntune.inference.kernels.execution import DeviceCounts, supports
from dyntune.inference.kernels.graphs import capture

__all__ = ["DeviceCounts", "capture", "supports"]
