"""The picture of a search."""

import numpy as np
import pytest

from dyntune.parts.methods.noah import Subnet
from dyntune.studies.noah.evolution import Candidate
from dyntune.studies.pictures.search import search_figure
from dyntune.studies.pictures.style import save_figure

SCORES = (
    (0, 300_000, 0.5),
    (0, 200_000, 0.6),
    (1, 250_000, 0.55),
    (1, 100_000, 0.5),
    (2, 150_000, 0.8),
    (2, 140_000, 0.8),
)
FOUND = [Candidate(Subnet((i,), (i,), (i,)), *row[:1], "random", *row[1:]) for i, row in enumerate(SCORES)]


def lines(axes):
    return {line.get_label(): [round(float(y), 6) for y in line.get_ydata()] for line in axes.get_lines()}


def test_every_candidate_the_limit_and_the_best_are_shown():
    left, _ = search_figure(FOUND, 0.32, 0.09).axes
    dots, ring = left.collections
    expected = [[parameters / 1e6, 100 * accuracy] for _, parameters, accuracy in SCORES]
    np.testing.assert_allclose(dots.get_offsets(), expected)
    assert ring.get_offsets()[0].tolist() == pytest.approx([0.14, 80])
    assert ring.get_label() == "best: 80.0 %, 0.140 M"
    assert [float(line.get_xdata()[0]) for line in left.get_lines()] == [0.09, 0.32]


def test_a_limit_far_away_does_not_squeeze_the_candidates():
    left, _ = search_figure(FOUND, 64).axes
    assert not left.get_lines()


def test_mean_and_best_so_far_of_each_generation():
    _, right = search_figure(FOUND[:2] + FOUND[3:], 1).axes
    assert lines(right) == {"mean": [55, 50, 80], "best so far": [60, 60, 80]}
    places = [round(float(x)) for x, _ in right.collections[0].get_offsets()]
    assert places == [1, 1, 2, 3, 3]


def test_one_candidate_is_enough(tmp_path):
    for suffix in ("png", "svg"):
        assert save_figure(search_figure(FOUND[:1], 1), tmp_path / f"search.{suffix}").stat().st_size > 1000
