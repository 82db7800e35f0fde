"""Dyntune: adapt pretrained Vision Transformers with few parameters, and skip the tokens that need no work.

Beside the names below, the configuration of every tuning method, token policy and preset is here under its class's
name, for instance ``dyntune.DyT`` and ``dyntune.AdaptFormer``.
"""

from typing import TYPE_CHECKING, Any

from dyntune.core.errors import DyntuneError
from dyntune.core.version import VERSION as __version__
from dyntune.inference import DeployedModel, deploy
from dyntune.model.checkpoint import load
from dyntune.model.cost import Cost, cost
from dyntune.model.macs import MacCounter
from dyntune.model.published import load_published
from dyntune.model.rates import Calibration, calibrate
from dyntune.model.tuned import TunedModel, tune
from dyntune.parts.registry import registered
from dyntune.training.objective import Loss, training_loss

if TYPE_CHECKING:
    from dyntune.training.evaluate import Evaluation, evaluate
    from dyntune.training.trainer import FitResult, fit

__all__ = [
    "Calibration",
    "Cost",
    "DeployedModel",
    "DyntuneError",
    "Evaluation",
    "FitResult",
    "Loss",
    "MacCounter",
    "TunedModel",
    "__version__",
    "calibrate",
    "cost",
    "deploy",
    "evaluate",
    "fit",
    "load",
    "load_published",
    "training_loss",
    "tune",
]

_TRAINING = {"fit": "trainer", "FitResult": "trainer", "evaluate": "evaluate", "Evaluation": "evaluate"}


def __dir__() -> list[str]:
    return sorted({*__all__, *(part.__name__ for part in registered().values())})


def __getattr__(name: str) -> Any:
    """Training brings Accelerate and TensorBoard along, which a server that only runs a model should not pay for."""
    if name in _TRAINING:
        from importlib import import_module

        return getattr(import_module(f"dyntune.training.{_TRAINING[name]}"), name)
    for part in registered().values():
        if part.__name__ == name:
            return part
    raise AttributeError(f"module 'dyntune' has no attribute {name!r}")
