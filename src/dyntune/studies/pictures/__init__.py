"""Pictures of what a tuned model does with its tokens: how many each block computes, and which. Needs matplotlib."""

from dyntune.studies.pictures.activation_rates import activation_figure
from dyntune.studies.pictures.frames import by_slices, frames_animation, frames_figure, strip_blocks
from dyntune.studies.pictures.patches import blocks_in_words, gated_blocks
from dyntune.studies.pictures.reductions import reduction_figure
from dyntune.studies.pictures.style import save_figure
from dyntune.studies.pictures.tokens import token_figure

__all__ = [
    "activation_figure",
    "blocks_in_words",
    "by_slices",
    "frames_animation",
    "frames_figure",
    "gated_blocks",
    "reduction_figure",
    "save_figure",
    "strip_blocks",
    "token_figure",
]
