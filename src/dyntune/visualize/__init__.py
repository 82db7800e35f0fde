"""Pictures of what a tuned model does: how many patches each block computes, and which ones. Needs matplotlib."""

from dyntune.visualize.activation import activation_figure
from dyntune.visualize.save import save_figure
from dyntune.visualize.tokens import token_figure

__all__ = ["activation_figure", "save_figure", "token_figure"]
