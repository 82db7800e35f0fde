"""Table 5 of the DyT paper by our count, against its printed figures."""

import json
from math import ceil

import pytest

from dyntune.studies.table5 import ROWS

BACKBONE, ADAPTERS, PREDICTORS, DISPATCHERS = 85_798_656, 156_768, 2_885_190, 9_228
PARAMETERS = {
    "Full tuning": BACKBONE,
    "AdaptFormer": ADAPTERS,
    "DyT r=0.5": ADAPTERS + DISPATCHERS,
    "EViT": BACKBONE,
    "EViT + AdaptFormer": ADAPTERS,
    "Full tuning + ToMe": BACKBONE,
    "AdaptFormer + ToMe": ADAPTERS,
    "DyT r=0.5 + ToMe": ADAPTERS + DISPATCHERS,
    "DynamicViT": BACKBONE + PREDICTORS,
    "DynamicViT + AdaptFormer": ADAPTERS + PREDICTORS,
}


def dyt_macs(rate, width, r):
    """MACs of DyT with ToMe on ViT-B/16 at an activation."""
    total, tokens, dim = 196 * 768 * 768, 197, 768
    for _ in range(12):
        total += tokens * (4 * dim**2 + 2 * tokens * dim + 5 * dim)
        total += (tokens - 1) // 2 * ceil((tokens - 1) / 2) * 64 if r else 0
        tokens -= r
        total += (1 + rate * (tokens - 1)) * (8 * dim**2 + 5 * dim) + 2 * tokens * dim * width + (tokens - 1) * dim
    return total + 5 * tokens * dim


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_our_count_of_each_row(row):
    counted = row.to_dict()["counted"]
    json.dumps(counted)
    assert counted[0]["trainable_params"] == PARAMETERS[row.name]
    if row.name.startswith("DyT"):
        expected = [dyt_macs(0.5, width, 7 if row.tokens else 0) for width in (8, 64)]
        assert [figures["macs"] for figures in counted] == pytest.approx(expected, abs=1)
    else:  # alone the width is 8, with fewer tokens it is 64
        assert round(counted[0 if row.tokens is None else -1]["macs"] / 1e9, 2) == row.gmacs


@pytest.mark.parametrize(
    "name,r,rates",
    [
        ("DyT r=0.5", 0, ("54.3", "52.5")),
        ("DyT r=0.5 + ToMe", 7, ("54.9", "53.0")),
        ("DyT r=0.5 + ToMe", 8, ("59.6", "57.8")),
    ],
)
def test_the_notes_name_the_activation_that_the_printed_macs_mean(name, r, rates):
    row = next(row for row in ROWS if row.name == name)
    for width, rate in zip((8, 64), rates, strict=True):
        none, every = dyt_macs(0, width, r), dyt_macs(1, width, r)
        assert f"{100 * (row.gmacs * 1e9 - none) / (every - none):.1f}" == rate
        assert f"{rate} %" in row.note
