"""Unit paths are read as block number and kind of unit."""

import pytest

from dyntune.studies.pictures.units import split_path


def test_unit_paths() -> None:
    assert [split_path(path) for path in ("blocks.3.mlp", "blocks.11.attn", "blocks.0")] == [
        (3, "mlp"),
        (11, "attn"),
        (0, "layer"),
    ]
    with pytest.raises(ValueError, match=r"'head' is no unit's path: expected blocks\.3"):
        split_path("head")
