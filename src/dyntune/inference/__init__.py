"""From a tuned model to one that runs fast: exact optimisations in this process, and files for other runtimes."""

import sys
import types
import warnings
from typing import Any

from dyntune.inference.optimized import OptimizedModel, folded_copy, optimize

__all__ = ["OptimizedModel", "folded_copy", "optimize"]


def _former(name: str) -> Any:
    """What the README of a folder says that was written before: ``from dyntune.deployment import open_runtime``."""
    if name != "open_runtime":
        raise AttributeError(f"module 'dyntune.deployment' has no attribute {name!r}; it is dyntune.inference now")
    from dyntune.inference.export.folder import open_export

    warnings.warn(
        "dyntune.deployment.open_runtime is now called dyntune.open_export.", DeprecationWarning, stacklevel=2
    )
    return open_export


_deployment = types.ModuleType("dyntune.deployment")
_deployment.__getattr__ = _former  # type: ignore[method-assign]
sys.modules[_deployment.__name__] = _deployment
