"""Images of real pixels for vtab-mini: handwritten digits among clutter, and materials cut from photographs."""

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dyntune.data.drawn.procedural import Random, contrasting, degrade, render, to_uint8
from dyntune.data.load import load_data
from dyntune.data.splits import stratified_take

SIDE = 32
# Digits kept apart for each split, a little more than the default sizes need; the others are trained on.
DIGITS_APART = {"test": 600, "val200": 250}

CELL = 32
MATERIALS = ("sky", "water", "roof", "facade", "conifer", "shrub", "petals", "leaves")
# Cells of CELL x CELL pixels, each of the material that LETTERS gives for its letter; a dot is a cell of several.
CHINA = (
    "sssssssssssssssssss.",
    "sssss..ssssssssssss.",
    "ssss.....ssssssssss.",
    "....rrrrr.sssssssss.",
    "....fffff.ssssssss..",
    "...rrrrrr.ssssssss..",
    "c..fffffff.sssss..cc",
    "c..........w....wccc",
    "...rrrrrrr.wwwwww.cc",
    "...fffffff.www..h.cc",
    "....hfffff...hhhh.c.",
    ".hhhh.rrr.rhhhhhh...",
    "hhhhhhhh..hhhhhhh...",
)
FLOWER = (
    "lllll..........lllll",
    "lllll..........lllll",
    "lllll..........lllll",
    "lllll...pppp...lllll",
    "lllll..pppppp..lllll",
    "lllll.ppppppp..lllll",
    "lllll.pppppppp.lllll",
    "lllll.pppppppp.lllll",
    "lllll.pppppppp.lllll",
    "lllll..pppppp..lllll",
    "lllll..ppppp...lllll",
    "lllll..........lllll",
    "lllll.....pppp.lllll",
)
LETTERS = {"s": "sky", "w": "water", "r": "roof", "f": "facade", "c": "conifer", "h": "shrub", "p": "petals"}
LETTERS["l"] = "leaves"


class Place(NamedTuple):
    """Where an image goes, which says what real pixels it may be made of.

    Attributes:
        seed: of the whole benchmark; it decides which pixels belong to which split.
        split: ``"train800"``, ``"val200"`` or ``"test"``.
        turn: how many images of the same class come before it in the split.
    """

    seed: int
    split: str
    turn: int


@cache
def _digit_pool(seed: int, split: str) -> tuple[tuple[Image.Image, ...], ...]:
    """The digits of a split by class; no digit is in two splits."""
    data = load_data("digits")
    parts = [part for part in (data.train, data.val, data.test) if part is not None]
    every = [part[index] for part in parts for index in range(len(part))]
    rest = list(range(len(every)))
    for name, count in DIGITS_APART.items():
        taken, left = stratified_take([every[i][1] for i in rest], count, key=f"vtab-mini/{seed}/{name}")
        if name == split:
            rest = [rest[i] for i in taken]
            break
        rest = [rest[i] for i in left]
    return tuple(tuple(every[i][0].convert("L") for i in rest if every[i][1] == label) for label in range(10))


def draw_digit(rng: Random, label: int, place: Place) -> Image.Image:
    """A handwritten digit, turned and painted, on a formula-driven picture, as house numbers stand in a street.

    Where a split asks for more images of a class than it has digits, the digits come again in other poses.
    """
    pool = _digit_pool(place.seed, place.split)[label]
    side = int(rng.integers(18, 29))
    digit = pool[place.turn % len(pool)].resize((side, side), Image.Resampling.BICUBIC)
    digit = digit.rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC)
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(digit, (int(rng.integers(0, SIDE - side + 1)), int(rng.integers(0, SIDE - side + 1))))
    ground = render(place.seed, int(rng.integers(2**31)), SIDE).astype(np.float32) / 255
    # Clutter of half the contrast leaves the digit the strongest thing in the picture.
    ground = ground.mean(axis=(0, 1)) + 0.5 * (ground - ground.mean(axis=(0, 1)))
    ink = contrasting(rng, ground.mean(axis=(0, 1)))
    alpha = np.asarray(mask, np.float32)[:, :, None] / 255
    return Image.fromarray(to_uint8(degrade(rng, ground + alpha * (ink - ground))))


@cache
def _photographs() -> tuple[NDArray[np.uint8], ...]:
    from sklearn.datasets import load_sample_image

    return load_sample_image("china.jpg"), load_sample_image("flower.jpg")


@cache
def _material_cells(seed: int, split: str, label: int) -> tuple[tuple[int, int, int], ...]:
    """(photograph, row, column) of the cells of a material in a split; no cell is in two splits."""
    cells = [
        (photograph, row, column)
        for photograph, grid in enumerate((CHINA, FLOWER))
        for row, line in enumerate(grid)
        for column, letter in enumerate(line)
        if LETTERS.get(letter) == MATERIALS[label]
    ]
    order = np.random.default_rng([seed, label]).permutation(len(cells))
    test = round(len(cells) * 0.3)
    val = test + max(1, round(len(cells) * 0.15))
    part = {"test": order[:test], "val200": order[test:val]}.get(split, order[val:])
    return tuple(cells[i] for i in part)


def draw_material(rng: Random, label: int, place: Place) -> Image.Image:
    """A patch of one material in one of scikit-learn's two photographs, in strange light.

    The colour channels change places and the contrast changes, so that texture tells more than colour.
    """
    cells = _material_cells(place.seed, place.split, label)
    photograph, row, column = cells[place.turn % len(cells)]
    side = int(rng.integers(14, CELL - 1))
    top, left = (int(start) for start in rng.integers(0, CELL - side + 1, 2))
    y, x = row * CELL + top, column * CELL + left
    patch = _photographs()[photograph][y : y + side, x : x + side][:, :, rng.permutation(3)]
    if rng.random() < 0.5:
        patch = patch[:, ::-1]
    enlarged = Image.fromarray(np.ascontiguousarray(patch)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pixels = np.asarray(enlarged, np.float32) / np.float32(255)
    mean = pixels.mean(axis=(0, 1))
    lit = rng.uniform(0.25, 0.75, 3).astype(np.float32) + np.float32(rng.uniform(0.7, 1.5)) * (pixels - mean)
    return Image.fromarray(to_uint8(lit))
