"""What a gated unit's path says: which block it belongs to, and which part of the block it is."""

import re

KINDS = {"attn": "attention", "mlp": "MLP", "layer": "whole block"}
"""Kinds of units and how pictures name them, in the order in which a block computes them."""

_PATH = re.compile(r"(?:^|\.)blocks\.(\d+)(?:\.(attn|mlp))?$")


def split_path(path: str) -> tuple[int, str]:
    """``blocks.3.mlp`` to ``(3, "mlp")``, ``blocks.3`` to ``(3, "layer")``.

    Raises:
        ValueError: the path is not that of a block or of a block's sub-layer.
    """
    match = _PATH.search(path)
    if match is None:
        raise ValueError(f"{path!r} is no unit's path: expected blocks.3, blocks.3.attn or blocks.3.mlp.")
    return int(match[1]), match[2] or "layer"
