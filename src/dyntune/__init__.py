"""Dyntune: adapt pretrained Vision Transformers with few parameters, and skip the tokens that need no work.

Beside the names below, the configuration of every tuning method, token policy and preset is here under its class's
name, for instance ``dyntune.DyT`` and ``dyntune.AdaptFormer``.
"""

import warnings
from typing import TYPE_CHECKING, Any

from dyntune.backbones.families.frames import ClipClassifier
from dyntune.backbones.families.inflated import InflatedViT
from dyntune.backbones.huggingface_models import add_classifier
from dyntune.core.errors import DyntuneError
from dyntune.core.version import VERSION as __version__
from dyntune.inference.optimized import OptimizedModel, optimize
from dyntune.model.calibrate import calibrate
from dyntune.model.cost import Cost, cost
from dyntune.model.load import load
from dyntune.model.macs import MacCounter
from dyntune.model.objective import Loss, training_loss
from dyntune.model.published import load_published
from dyntune.model.rates import Calibration
from dyntune.model.tune import tune
from dyntune.model.tuned import TunedModel
from dyntune.parts.registry import registered

if TYPE_CHECKING:
    from dyntune.inference.export.bundle import export
    from dyntune.inference.export.folder import open_export
    from dyntune.training.callback import CourseCallback
    from dyntune.training.evaluate import Evaluation, evaluate
    from dyntune.training.trainer import FitResult, fit

__all__ = [
    "Calibration",
    "ClipClassifier",
    "Cost",
    "CourseCallback",
    "DyntuneError",
    "Evaluation",
    "FitResult",
    "InflatedViT",
    "Loss",
    "MacCounter",
    "OptimizedModel",
    "TunedModel",
    "__version__",
    "add_classifier",
    "calibrate",
    "cost",
    "evaluate",
    "export",
    "fit",
    "load",
    "load_published",
    "open_export",
    "optimize",
    "training_loss",
    "tune",
]

_ON_DEMAND = {
    "fit": "training.trainer",
    "CourseCallback": "training.callback",
    "FitResult": "training.trainer",
    "evaluate": "training.evaluate",
    "Evaluation": "training.evaluate",
    "export": "inference.export.bundle",
    "open_export": "inference.export.folder",
}
_FORMER = {"deploy": "optimize", "DeployedModel": "OptimizedModel"}


def __dir__() -> list[str]:
    return sorted({*__all__, *(part.__name__ for part in registered().values())})


def __getattr__(name: str) -> Any:
    """Training brings Accelerate and TensorBoard along, which a server that only runs a model should not pay for."""
    if name in _ON_DEMAND:
        from importlib import import_module

        return getattr(import_module(f"dyntune.{_ON_DEMAND[name]}"), name)
    if name in _FORMER:
        warnings.warn(f"dyntune.{name} is now called dyntune.{_FORMER[name]}.", DeprecationWarning, stacklevel=2)
        return globals()[_FORMER[name]]
    for part in registered().values():
        if part.__name__ == name:
            return part
    raise AttributeError(f"module 'dyntune' has no attribute {name!r}")
