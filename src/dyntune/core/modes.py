"""Train and eval mode of modules, for as long as somebody looks at a model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model in eval mode for a while, to look at it, and each of its modules back in its own."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        # Older releases of PyTorch keep what autocast has cast without a graph, through which nothing learns.
        torch.clear_autocast_cache()
