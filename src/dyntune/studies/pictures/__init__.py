"""Pictures of what a tuned model does with its tokens, and of studies. Needs matplotlib, which comes with the first."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dyntune.studies.pictures.accuracy_macs import Point, accuracy_macs_figure, tradeoff_figure
    from dyntune.studies.pictures.activation_rates import activation_figure
    from dyntune.studies.pictures.frames import by_slices, frames_animation, frames_figure, of_clip, strip_blocks
    from dyntune.studies.pictures.patches import blocks_in_words, gated_blocks
    from dyntune.studies.pictures.reductions import reduction_figure
    from dyntune.studies.pictures.search import search_figure
    from dyntune.studies.pictures.style import save_figure
    from dyntune.studies.pictures.tokens import token_figure

__all__ = [
    "Point",
    "accuracy_macs_figure",
    "activation_figure",
    "blocks_in_words",
    "by_slices",
    "frames_animation",
    "frames_figure",
    "gated_blocks",
    "of_clip",
    "reduction_figure",
    "save_figure",
    "search_figure",
    "strip_blocks",
    "token_figure",
    "tradeoff_figure",
]

_FILES = {
    "Point": "accuracy_macs",
    "accuracy_macs_figure": "accuracy_macs",
    "activation_figure": "activation_rates",
    "blocks_in_words": "patches",
    "by_slices": "frames",
    "frames_animation": "frames",
    "frames_figure": "frames",
    "gated_blocks": "patches",
    "of_clip": "frames",
    "reduction_figure": "reductions",
    "save_figure": "style",
    "search_figure": "search",
    "strip_blocks": "frames",
    "token_figure": "tokens",
    "tradeoff_figure": "accuracy_macs",
}


def __getattr__(name: str) -> Any:
    """A picture is imported when it is drawn: who asks a command for its help does not wait for matplotlib."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
