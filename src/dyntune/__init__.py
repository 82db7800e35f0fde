"""Dyntune: adapt pretrained Vision Transformers with few parameters, and skip the tokens that need no work."""

__version__ = "0.1.0"

from dyntune.checkpoint import load
from dyntune.cost import Cost, MacCounter, cost
from dyntune.errors import DyntuneError
from dyntune.training.objective import Loss, training_loss
from dyntune.tuned import TunedModel, tune

__all__ = [
    "Cost",
    "DyntuneError",
    "Loss",
    "MacCounter",
    "TunedModel",
    "__version__",
    "cost",
    "load",
    "training_loss",
    "tune",
]
