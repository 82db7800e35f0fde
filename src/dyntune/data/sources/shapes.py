"""Procedural pictures of one white shape on black, after dSprites, to tell its place or its direction from."""

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from dyntune.core.errors import DataError, unknown_name
from dyntune.data.base import DataSplits, LabelledImages
from dyntune.data.drawn.outlines import OUTLINES

CLASSES = 16
SIDE = 64
# A shape at scale 1 reaches RADIUS pixels from its centre; MARGIN keeps all of it inside the picture.
RADIUS, MARGIN = 13.0, 14.0
COLUMNS = 32
TURNS = 48
TASKS = {"location": ("square", "ellipse", "heart"), "orientation": ("heart", "drop", "kite")}
SIZES = {"train": 1000, "val": 200, "test": 1000}
# Drawn this many times larger and averaged down, which antialiases the outline in steps of 1/64 of white.
OVERSAMPLING = 8


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

    Args:
        task: ``"location"`` or ``"orientation"``.
        split: any word; another word gives other pictures.
        size: number of pictures; the classes take turns, so they are equally frequent.
        seed: another seed gives other pictures.

    Raises:
        DataError: there is no such task.
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


def load_shapes(task: str, *, seed: int = 0, sizes: dict[str, int] | None = None) -> DataSplits:
    """A task on procedural shapes: 1,000 pictures to train on, 200 to choose by, 1,000 to test on.

    ``"location"``: 16 columns from left to right. As in dSprites there are squares, ellipses and hearts, 32 x
    positions, two to a class; y, scale (0.5 to 1) and angle vary freely.

    ``"orientation"``: 16 directions of the tip, clockwise from right. dSprites' squares look the same after a quarter
    turn and its ellipses after half a turn, so that their labels cannot be told from the picture; here all shapes
    (heart, drop, kite) have exactly one tip. There are 48 angles, three to a class, 7.5 degrees apart, rather than
    dSprites' 40, so that the classes are equally wide; place and scale vary freely.

    Args:
        task: ``"location"`` or ``"orientation"``.
        seed: the pictures of every split follow from it.
        sizes: number of pictures by split, for those that should differ from the default.

    Raises:
        DataError: there is no such task.

    Source: after dSprites (Matthey et al., 2017), and its 16-class location and orientation tasks in VTAB
    (Zhai et al., 2019, arXiv:1910.04867). The pictures are drawn here; none are taken from there.
    """
    counts = SIZES | (sizes or {})
    train, val, test = (ShapeImages(task, split, counts[split], seed) for split in ("train", "val", "test"))
    word = "column" if task == "location" else "direction"
    return DataSplits(f"shapes-{task}", train, val, test, tuple(f"{word} {label}" for label in range(CLASSES)))
