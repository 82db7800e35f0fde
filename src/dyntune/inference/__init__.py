"""From a tuned model to one that runs fast: exact optimisations in this process, and files for other runtimes."""

import warnings
from typing import Any

from dyntune.inference.optimized import OptimizedModel, folded_copy, optimize

__all__ = ["OptimizedModel", "folded_copy", "optimize"]


def __getattr__(name: str) -> Any:
    """``open_runtime`` is what the README of a folder of Dyntune 0.1 says."""
    if name == "open_runtime":
        from dyntune.inference.export.folder import open_export

        warnings.warn(
            "dyntune.inference.open_runtime is now called dyntune.open_export.", DeprecationWarning, stacklevel=2
        )
        return open_export
    raise AttributeError(f"module 'dyntune.inference' has no attribute {name!r}")
