"""Procedural pictures of one white shape on black, after dSprites, whose place or direction is to be told."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw

from dyntune.core.errors import DataError, unknown_name
from dyntune.data.base import LabelledImages

CLASSES = 16
SIDE = 64
# A shape at scale 1 reaches RADIUS pixels from its centre; MARGIN keeps all of it inside the picture.
RADIUS, MARGIN = 13.0, 14.0
COLUMNS = 32
TURNS = 48
TASKS = {"location": ("square", "ellipse", "heart"), "orientation": ("heart", "drop", "kite")}
# Drawn this many times larger and averaged down, which antialiases the outline in steps of 1/64 of white.
OVERSAMPLING = 8
Outline = tuple[tuple[float, float], ...]
"""Corners (x, y) of a polygon: centre of area at the origin, farthest point at distance 1."""


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


@dataclass(frozen=True)
class Pose:
    """One shape: its outline's name, centre (x, y) in pixels from the top left, scale, and angle in radians.

    The angle is where the outline's first point (a heart's, drop's or kite's tip) lies, counted clockwise from right.
    """

    outline: str
    x: float
    y: float
    scale: float
    angle: float


def pose_corners(pose: Pose) -> list[tuple[float, float]]:
    """The outline's corners (x, y) on the enlarged canvas, OVERSAMPLING times SIDE wide."""
    cos, sin = math.cos(pose.angle), math.sin(pose.angle)
    reach = RADIUS * pose.scale
    return [
        (
            (pose.x + reach * (u * cos - v * sin)) * OVERSAMPLING - 0.5,
            (pose.y + reach * (u * sin + v * cos)) * OVERSAMPLING - 0.5,
        )
        for u, v in OUTLINES[pose.outline]()
    ]


def draw_pose(pose: Pose) -> Image.Image:
    """The shape as an antialiased RGB picture of 64x64 pixels."""
    canvas = Image.new("L", (SIDE * OVERSAMPLING,) * 2)
    ImageDraw.Draw(canvas).polygon(pose_corners(pose), fill=255)
    return canvas.reduce(OVERSAMPLING).convert("RGB")


class ShapeImages(LabelledImages):
    """Pictures drawn when they are read; picture ``index`` follows from task, split, seed and index alone.

    ``"location"``: 16 columns from left to right. As in dSprites there are squares, ellipses and hearts, 32 x
    positions, two to a class; y, scale (0.5 to 1) and angle vary freely.

    ``"orientation"``: 16 directions of the tip, clockwise from right. dSprites' squares look the same after a quarter
    turn and its ellipses after half a turn, so that their labels cannot be told from the picture; here all shapes
    (heart, drop, kite) have exactly one tip. There are 48 angles, three to a class, 7.5 degrees apart, rather than
    dSprites' 40, so that the classes are equally wide; place and scale vary freely.

    Args:
        task: ``"location"`` or ``"orientation"``.
        split: any word; another word gives other pictures.
        size: number of pictures; the classes take turns, so they are equally frequent.
        seed: another seed gives other pictures.

    Raises:
        DataError: there is no such task.

    Source: after dSprites (Matthey et al., 2017), and its 16-class location and orientation tasks in VTAB
    (Zhai et al., 2019, arXiv:1910.04867). The pictures are drawn here; none are taken from there.
    """

    def __init__(self, task: str, split: str, size: int, seed: int) -> None:
        if task not in TASKS:
            raise DataError(unknown_name("shapes task", task, TASKS))
        super().__init__([index % CLASSES for index in range(size)])
        self.task, self.split, self.seed = task, split, seed

    def pose(self, index: int) -> Pose:
        """The shape of picture ``index``; what the label does not fix is drawn from its whole range."""
        label = self.targets[index]
        # Seeding with a string, and random() itself, are the parts of this module that Python promises to keep.
        draw = random.Random(f"{self.task}/{self.split}/{self.seed}/{index % len(self)}").random
        outlines = TASKS[self.task]
        outline = outlines[int(draw() * len(outlines))]
        scale = 0.5 + 0.5 * draw()
        span = SIDE - 2 * MARGIN
        x, y, angle = MARGIN + span * draw(), MARGIN + span * draw(), 2 * math.pi * draw()
        step = draw()
        if self.task == "location":
            per_class = COLUMNS // CLASSES
            x = MARGIN + span * (label * per_class + int(step * per_class)) / (COLUMNS - 1)
        else:
            per_class = TURNS // CLASSES
            angle = 2 * math.pi * (label * per_class + int(step * per_class) + 0.5) / TURNS
        return Pose(outline, x, y, scale, angle)

    def read(self, index: int) -> Image.Image:
        return draw_pose(self.pose(index))

    def source(self, index: int) -> str:
        return f"shapes-{self.task} {self.split} picture {index}"
