"""Outlines of shapes as polygons: centre of area at the origin, farthest point at distance 1."""

import math
from collections.abc import Callable
from functools import cache

Outline = tuple[tuple[float, float], ...]


def _centred(corners: list[tuple[float, float]]) -> Outline:
    """Move the centre of area to the origin, scale the reach to 1, and turn so that the first corner points right."""
    area = x_moment = y_moment = 0.0
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        cross = x0 * y1 - x1 * y0
        area += cross / 2
        x_moment += (x0 + x1) * cross / 6
        y_moment += (y0 + y1) * cross / 6
    moved = [(x - x_moment / area, y - y_moment / area) for x, y in corners]
    reach = max(math.hypot(x, y) for x, y in moved)
    first = math.hypot(*moved[0])
    cos, sin = moved[0][0] / first, moved[0][1] / first
    return tuple(((x * cos + y * sin) / reach, (y * cos - x * sin) / reach) for x, y in moved)


@cache
def square() -> Outline:
    """A square; looks the same after every quarter turn."""
    return _centred([(1, 1), (-1, 1), (-1, -1), (1, -1)])


@cache
def ellipse() -> Outline:
    """An ellipse half as wide as long; looks the same after half a turn."""
    angles = [2 * math.pi * step / 72 for step in range(72)]
    return _centred([(math.cos(angle), math.sin(angle) / 2) for angle in angles])


@cache
def heart() -> Outline:
    """A heart with its tip first; only a whole turn brings it back."""
    angles = [math.pi + 2 * math.pi * step / 96 for step in range(96)]
    return _centred(
        [
            (
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
                16 * math.sin(t) ** 3,
            )
            for t in angles
        ]
    )


@cache
def drop() -> Outline:
    """A disc drawn out to a tip, which comes first; only a whole turn brings it back."""
    # The tip lies 2.6 radii from the disc's centre; its two sides touch the disc at this angle from the axis.
    touch = math.acos(1 / 2.6)
    arc = [touch + (2 * math.pi - 2 * touch) * step / 64 for step in range(65)]
    return _centred([(2.6, 0.0), *((math.cos(angle), math.sin(angle)) for angle in arc)])


@cache
def kite() -> Outline:
    """A dart: a long tip, which comes first, two short wings and a notch; only a whole turn brings it back."""
    return _centred([(2.0, 0.0), (-1.0, 0.9), (-0.5, 0.0), (-1.0, -0.9)])


OUTLINES: dict[str, Callable[[], Outline]] = {
    "square": square,
    "ellipse": ellipse,
    "heart": heart,
    "drop": drop,
    "kite": kite,
}
