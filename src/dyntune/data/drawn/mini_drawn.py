"""Procedural images for vtab-mini: stained cells, fields from above, scattered shapes, and the way a shape points."""

import math

import numpy as np
from PIL import Image, ImageDraw

from dyntune.data.drawn.procedural import Random, contrasting, degrade, power_law_noise, to_uint8
from dyntune.data.drawn.shapes import MARGIN, OUTLINES, OVERSAMPLING, RADIUS, Pose, draw_pose, pose_corners
from dyntune.data.drawn.shapes import SIDE as POSE_SIDE
from dyntune.data.drawn.shapes import TASKS as POSE_TASKS

SIDE = 32
ZOOM = 4  # drawn this many times larger and averaged down
WIDTH = SIDE * ZOOM
CELLS = ("healthy", "abnormal cell")
FIELDS = ("furrows", "orchard", "forest", "meadow", "pivots", "village", "road", "river")
COUNTS = tuple(str(count) for count in range(1, 9))
DIRECTIONS = tuple(f"direction {label}" for label in range(16))
LARGEST = 0.5  # scale of the largest of several shapes, so that eight fit without touching
Colour = tuple[int, int, int]


def _colour(rng: Random, low: tuple[float, float, float], high: tuple[float, float, float]) -> Colour:
    """A colour drawn evenly between two, RGB in [0, 255]."""
    red, green, blue = (int(value) for value in rng.uniform(low, high))
    return red, green, blue


def _finish(rng: Random, canvas: Image.Image, factor: int) -> Image.Image:
    pixels = np.asarray(canvas.reduce(factor), np.float32) / np.float32(255)
    return Image.fromarray(to_uint8(degrade(rng, pixels)))


def _scatter(rng: Random, count: int, side: float, margin: float, distance: float) -> list[tuple[float, float]]:
    """``count`` places (x, y) in a square, at least ``distance`` apart."""
    places: list[tuple[float, float]] = []
    tries = 0
    while len(places) < count:
        x, y = (float(value) for value in rng.uniform(margin, side - margin, 2))
        if all(math.hypot(x - a, y - b) >= distance for a, b in places):
            places.append((x, y))
        tries += 1
        if tries % 200 == 0:  # the first places may leave no room for the last ones
            places = []
    return places


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: Colour, squeeze: float = 1.0) -> None:
    draw.ellipse((x - radius, y - radius * squeeze, x + radius, y + radius * squeeze), fill=fill)


def draw_cells(rng: Random, label: int) -> Image.Image:
    """Stained tissue with four to six cells; with label 1 one or two have a nucleus too large for the cell."""
    canvas = Image.new("RGB", (WIDTH, WIDTH), _colour(rng, (215, 170, 195), (250, 215, 235)))
    draw = ImageDraw.Draw(canvas)
    plasma = _colour(rng, (170, 110, 160), (215, 160, 205))
    places = _scatter(rng, int(rng.integers(4, 7)), WIDTH, 18, 38)
    sick = int(rng.integers(1, 3)) if label else 0
    for number, (x, y) in enumerate(places):
        radius = rng.uniform(17, 23)
        share = rng.uniform(0.64, 0.82) if number < sick else rng.uniform(0.3, 0.46)
        nucleus = _colour(rng, (60, 30, 90), (125, 75, 155))
        _disc(draw, x, y, radius, plasma, rng.uniform(0.85, 1.15))
        off = (radius * (1 - share)) * 0.5
        dx, dy = rng.uniform(-off, off, 2)
        _disc(draw, x + dx, y + dy, radius * share, nucleus, rng.uniform(0.85, 1.15))
    return _finish(rng, canvas, ZOOM)


def draw_fields(rng: Random, label: int) -> Image.Image:
    """Land from above; how it is used shows in the pattern, the colours are those of any season."""
    ground, mark = (_colour(rng, (40, 60, 20), (190, 170, 120)) for _ in range(2))
    noise = power_law_noise(rng, WIDTH)[:, :, None]
    other = np.asarray(_colour(rng, (40, 60, 20), (190, 170, 120)), np.float32)
    depth = 0.9 if FIELDS[label] == "meadow" else 0.5
    soil = np.asarray(ground, np.float32) * (1 - depth * noise) + other * depth * noise
    canvas = Image.fromarray(soil.astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    turn = rng.uniform(0, math.pi)
    along = np.array([math.cos(turn), math.sin(turn)])
    across = np.array([-along[1], along[0]])
    middle = np.array([WIDTH / 2, WIDTH / 2])

    def strip(points: list[np.ndarray], width: float) -> None:
        draw.line([(float(x), float(y)) for x, y in points], fill=mark, width=round(width), joint="curve")

    kind = FIELDS[label]
    if kind == "furrows":
        step = rng.uniform(12, 24)
        for k in range(-12, 13):
            centre = middle + across * step * (k + rng.uniform(-0.1, 0.1))
            strip([centre - along * WIDTH, centre + along * WIDTH], step * 0.45)
    elif kind == "orchard":
        step = rng.uniform(14, 24)
        for i in range(-10, 11):
            for j in range(-10, 11):
                x, y = middle + step * (i * along + j * across) + rng.uniform(-1.5, 1.5, 2)
                _disc(draw, x, y, step * 0.3, mark)
    elif kind == "forest":
        for _ in range(70):
            x, y = rng.uniform(0, WIDTH, 2)
            _disc(draw, x, y, rng.uniform(4, 9), mark if rng.random() < 0.6 else ground)
    elif kind == "pivots":
        for x, y in _scatter(rng, int(rng.integers(2, 5)), WIDTH, 10, 54):
            _disc(draw, x, y, rng.uniform(18, 27), mark)
    elif kind == "village":
        for x, y in _scatter(rng, int(rng.integers(5, 12)), WIDTH, 4, 24):
            a, b = along * rng.uniform(6, 11), across * rng.uniform(4, 8)
            centre = np.array([x, y])
            draw.polygon([tuple(centre + p) for p in (a + b, a - b, -a - b, b - a)], fill=mark)
    elif kind in ("road", "river"):
        sway = 0.0 if kind == "road" else rng.uniform(10, 22)
        length, phase = rng.uniform(60, 130), rng.uniform(0, 2 * math.pi)
        centre = middle + across * rng.uniform(-30, 30)
        path = [
            centre + along * s + across * sway * math.sin(2 * math.pi * s / length + phase)
            for s in np.linspace(-WIDTH, WIDTH, 65)
        ]
        strip(path, rng.uniform(7, 16))
    return _finish(rng, canvas, ZOOM)


def draw_count(rng: Random, label: int) -> Image.Image:
    """One to eight coloured shapes that do not touch, on a plain ground; the label is their number less one."""
    ground = rng.random(3, dtype=np.float32)
    canvas = Image.new("RGB", (POSE_SIDE * OVERSAMPLING,) * 2, tuple(to_uint8(ground).tolist()))
    draw = ImageDraw.Draw(canvas)
    reach = RADIUS * LARGEST
    for x, y in _scatter(rng, label + 1, POSE_SIDE, reach, 2 * reach):
        outline = tuple(OUTLINES)[int(rng.integers(len(OUTLINES)))]
        pose = Pose(outline, x, y, rng.uniform(0.6, 1.0) * LARGEST, rng.uniform(0, 2 * math.pi))
        draw.polygon(pose_corners(pose), fill=tuple(to_uint8(contrasting(rng, ground)).tolist()))
    return _finish(rng, canvas, OVERSAMPLING * POSE_SIDE // SIDE)


def draw_direction(rng: Random, label: int) -> Image.Image:
    """A white shape on black with one tip that points into one of 16 directions, clockwise from right."""
    outlines = POSE_TASKS["orientation"]
    outline = outlines[int(rng.integers(len(outlines)))]
    x, y = rng.uniform(MARGIN, POSE_SIDE - MARGIN, 2)
    angle = 2 * math.pi * (label + rng.random()) / len(DIRECTIONS)
    return draw_pose(Pose(outline, x, y, rng.uniform(0.5, 1.0), angle)).reduce(POSE_SIDE // SIDE)
