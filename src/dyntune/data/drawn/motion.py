"""Drawn videos of things that move, in classes that differ in the order of frames alone."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image, ImageDraw, ImageFilter

from dyntune.data.video_files import write_video

FRAMES, RATE, SIDE = 24, 12, 64
"""Of each video: frames, frames per second, height and width."""
PAIRS = (("left", "right"), ("up", "down"), ("shrink", "grow"), ("turn-left", "turn-right"))
"""Classes; a video of the one backwards is as good a video of the other."""
CLASSES = tuple(name for pair in PAIRS for name in pair)
COUNTS = {"train": 60, "val": 20, "test": 20}
"""Videos of each class."""
_SHAPES = ("square", "triangle", "star", "cross")
_FINER = 4
"""Drawn this many times larger and averaged down."""


def write_motion(folder: Path, counts: dict[str, int] | None = None) -> Path:
    """Writes the videos that are not there yet, ``SPLIT/CLASS/NUMBER.mp4``, always the same ones.

    Several processes may do so at once: one writes, the others wait. A file is whole or not there.

    Args:
        folder: made if it is not there.
        counts: videos of each class by split; ``COUNTS`` if not given.

    Returns:
        ``folder``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        for split, count in (counts or COUNTS).items():
            for label, name in enumerate(CLASSES):
                for number in range(count):
                    path = folder / split / name / f"{number:03}.mp4"
                    if not path.exists():
                        write_video(path, motion_frames(name, split, number * len(CLASSES) + label), rate=RATE)
    return folder


def motion_frames(name: str, split: str, seed: int) -> list[np.ndarray]:
    """The frames of a video, RGB ``(64, 64, 3)``.

    A shape, or a handwritten digit that is of training alone or of the others alone, in a random colour on still noise.
    What moves goes as far on one side of its middle as on the other, so that a video has the frames of its partner.

    Args:
        name: of its class.
        split: ``train``, ``val`` or ``test``.
        seed: its number.
    """
    draw = np.random.default_rng([("train", "val", "test").index(split), seed])
    pair = next(place for place, names in enumerate(PAIRS) if name in names)
    mask = _digit(draw, split == "train") if draw.random() < 0.5 else _shape(draw)
    noise = Image.fromarray(draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    ground = np.asarray(noise.filter(ImageFilter.GaussianBlur(3)), float) * 0.6 + draw.uniform(0, 90, 3)
    colour = draw.uniform(60, 255, 3)
    while np.abs(colour - ground.mean((0, 1))).sum() < 220:
        colour = draw.uniform(0, 255, 3)
    middle, far = draw.uniform(26, 38, 2), draw.uniform(9, 14)
    size, angle = draw.uniform(9, 13), draw.uniform(0, 360)
    frames = []
    for step in np.linspace(-1, 1, FRAMES):
        place, own, turned = middle.copy(), size, angle
        if pair == 0:
            place[0] += far * step
        elif pair == 1:
            place[1] += far * step
        elif pair == 2:
            own *= 1.6**step
        else:
            turned -= 60 * step  # clockwise, as people see it
        cover = _placed(mask, place, own, turned)[..., None]
        frames.append((ground * (1 - cover) + colour * cover).clip(0, 255).astype(np.uint8))
    return frames if name == PAIRS[pair][1] else frames[::-1]


def _placed(mask: Image.Image, place: np.ndarray, size: float, angle: float) -> np.ndarray:
    """How far a thing of this size covers each pixel, ``(64, 64)``, between 0 and 1."""
    wide = round(2 * size * _FINER)
    thing = mask.resize((wide, wide), Image.Resampling.BILINEAR).rotate(angle, Image.Resampling.BILINEAR, expand=True)
    page = Image.new("L", (SIDE * _FINER,) * 2)
    left, top = (round(at * _FINER - own / 2) for at, own in zip(place, thing.size, strict=True))
    page.paste(thing, (left, top))
    return np.asarray(page.resize((SIDE, SIDE), Image.Resampling.BOX), float) / 255


def _shape(draw: np.random.Generator) -> Image.Image:
    """A white shape on black, 64 x 64."""
    kind = _SHAPES[draw.integers(len(_SHAPES))]
    corners = {"square": 4, "triangle": 3, "star": 10, "cross": 12}[kind]
    reach = [1.0] * corners
    if kind == "star":
        reach = [1.0, 0.45] * 5
    angles = [2 * math.pi * corner / corners for corner in range(corners)]
    if kind == "cross":
        bar = math.atan2(0.3, 1)
        angles = [quarter * math.pi / 2 + turn for quarter in range(4) for turn in (-bar, bar, math.pi / 4)]
        reach = [1.0, 1.0, 0.3 * math.sqrt(2)] * 4
    image = Image.new("L", (64, 64))
    points = [(32 + 31 * r * math.cos(a), 32 + 31 * r * math.sin(a)) for r, a in zip(reach, angles, strict=True)]
    ImageDraw.Draw(image).polygon(points, fill=255)
    return image


def _digit(draw: np.random.Generator, training: bool) -> Image.Image:
    digits = _digits()
    half = len(digits) // 2
    number = draw.integers(half) if training else half + draw.integers(len(digits) - half)
    return Image.fromarray(digits[number])


@functools.cache
def _digits() -> np.ndarray:
    from sklearn.datasets import load_digits

    images: np.ndarray = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
    return images
