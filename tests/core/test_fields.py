"""Descriptions and ranges of the fields of documented dataclasses and functions."""

from dataclasses import dataclass
from typing import Annotated

import pytest

from dyntune.core.errors import TrainingError
from dyntune.core.fields import Range, descriptions, ranges, require_ranges


@dataclass(frozen=True)
class Bounded:
    """Something.

    Args:
        low: at the bottom,
            in two lines.
        part: a share.
    """

    low: Annotated[int | None, Range(1)] = None
    part: Annotated[float, Range(0, 0.5)] = 0.0


def scaled(value: float, factor: Annotated[float, Range(2)] = 2.0) -> float:
    """Scales.

    Args:
        value: what is scaled.
        factor: by which.

    Returns:
        The product.
    """
    return value * factor


def test_classes_and_functions_have_descriptions_and_ranges():
    assert descriptions(Bounded) == {"low": "at the bottom, in two lines.", "part": "a share."}
    assert descriptions(scaled) == {"value": "what is scaled.", "factor": "by which."}
    assert ranges(Bounded) == {"low": Range(1), "part": Range(0, 0.5)}
    assert ranges(scaled) == {"factor": Range(2)}


@pytest.mark.parametrize("values", [{}, {"low": 1}, {"part": 0.5}, {"low": 10**9, "part": 0}])
def test_a_range_includes_its_ends_and_none_is_always_inside(values):
    require_ranges(Bounded(**values), TrainingError)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"low": 0}, "low=0: expected at least 1."),
        ({"part": 0.6}, "part=0.6: expected between 0 and 0.5."),
        ({"part": float("nan")}, "part=nan: expected between 0 and 0.5."),
    ],
)
def test_what_is_outside_is_named(values, message):
    with pytest.raises(TrainingError) as error:
        require_ranges(Bounded(**values), TrainingError)
    assert str(error.value) == message
