"""Formula-driven images: shapes, strokes, fractals and textures drawn from random numbers, to pretrain without data.

After FractalDB (Kataoka et al., "Pre-training without Natural Images", ACCV 2020, arXiv:2101.08515: attractors of
iterated function systems) and Visual Atoms (Takashima et al., CVPR 2023, arXiv:2303.01112: closed contours whose
radius is a sum of sinusoids), with strokes, textures, noise and occlusion added. An image depends on its seed, index
and size, and on nothing else: not on the batch, the worker or the order in which images are drawn.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from dyntune.core.errors import DataError

Array = NDArray[np.float32]
Random = np.random.Generator

SUPERSAMPLE = 2  # masks are drawn at twice the size and averaged, so that edges are smooth
SHAPE_CLASSES = 16  # classes of each label of `render_shape`


def render(seed: int, index: int, size: int = 32) -> NDArray[np.uint8]:
    """Draw image ``index`` of the endless set ``seed``.

    Args:
        seed: names the set, 0 or greater.
        index: place in the set, 0 or greater.
        size: side in pixels, 8 or greater.

    Returns:
        RGB image, shape (size, size, 3), uint8.

    Raises:
        DataError: an argument is out of range.
    """
    rng = _generator(seed, index, size, stream=0)
    image = _line_drawing(rng, size) if rng.random() < 0.3 else _scene(rng, size)
    return to_uint8(degrade(rng, image))


def render_batch(seed: int, indices: Iterable[int], size: int = 32) -> NDArray[np.uint8]:
    """Draw several images; each equals ``render(seed, index, size)``.

    Returns:
        RGB images, shape (n, size, size, 3), uint8, in the order of ``indices``.

    Raises:
        DataError: an argument is out of range, or there are no indices.
    """
    images = [render(seed, index, size) for index in indices]
    if not images:
        raise DataError("no indices were given: name at least one image to draw")
    return np.stack(images)


def render_shape(seed: int, index: int, size: int = 32) -> tuple[NDArray[np.uint8], int, int]:
    """Draw one elongated shape on a textured ground, with where it lies and which way it points.

    Drawn from other random numbers than `render`, so that a probe on these images meets none seen in pretraining.

    Returns:
        The RGB image, shape (size, size, 3), uint8; the class of the horizontal centre, 0 (at 20 % of the width) to
        15 (at 80 %); the class of the axis' direction, 0 to 15, each 180/16 degrees wide, clockwise from the x axis.

    Raises:
        DataError: an argument is out of range.
    """
    rng = _generator(seed, index, size, stream=1)
    ground = _ground(rng, size)
    x, y = rng.uniform(0.2, 0.8, 2)
    turn = rng.uniform(0, np.pi)
    half_length = rng.uniform(0.2, 0.32)
    half_width = half_length * rng.uniform(0.2, 0.4)
    angle = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    power = rng.uniform(0.3, 1.3)  # 1 is an ellipse; towards 0 the outline becomes a bar, above 1 a lozenge
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    outline = np.sign(circle) * np.abs(circle) ** power * np.array([half_length, half_width])
    mask = _outline_mask(outline @ _rotation(turn).T + np.array([x, y]), size)
    paint = contrasting(rng, ground.mean(axis=(0, 1)))
    image = to_uint8(degrade(rng, _over(ground, mask, paint)))
    place = min(int((x - 0.2) / 0.6 * SHAPE_CLASSES), SHAPE_CLASSES - 1)
    direction = min(int(turn / np.pi * SHAPE_CLASSES), SHAPE_CLASSES - 1)
    return image, place, direction


def _generator(seed: int, index: int, size: int, stream: int) -> Random:
    """Random numbers of one image; ``stream`` keeps the two kinds of image apart."""
    if seed < 0 or index < 0:
        raise DataError(f"seed and index must be 0 or greater, got seed {seed} and index {index}")
    if size < 8:
        raise DataError(f"size must be 8 pixels or more, got {size}")
    return np.random.default_rng([seed, index, stream])


def _line_drawing(rng: Random, size: int) -> Array:
    """Pen strokes, contours and polygons in one grey tone on a plain ground: white on black, or black on white."""
    ink, ground = (1.0, 0.0) if rng.random() < 0.6 else (0.0, 1.0)
    if rng.random() < 0.3:  # grey ink
        ink += (0.3 if ink == 0 else -0.3) * rng.random()
    image = np.full((size, size, 3), ground, np.float32)
    kinds = (_stroke_mask, _contour_mask, _polygon_shape_mask)
    for _ in range(int(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15]))):
        mask = kinds[int(rng.choice(3, p=[0.6, 0.2, 0.2]))](rng, size)
        image = _over(image, mask, np.full(3, ink, np.float32))
    return image


def _scene(rng: Random, size: int) -> Array:
    """One to six painted objects, later ones in front of earlier ones, on a plain, graded or textured ground."""
    image = _ground(rng, size)
    kinds = (_contour_mask, _polygon_shape_mask, _stroke_mask, _fractal_mask)
    for _ in range(int(rng.choice(6, p=[0.3, 0.25, 0.2, 0.1, 0.1, 0.05])) + 1):
        mask = kinds[int(rng.choice(4, p=[0.4, 0.25, 0.2, 0.15]))](rng, size)
        if rng.random() < 0.2:
            mask = mask * rng.uniform(0.4, 0.9)
        paint: Array = _ground(rng, size) if rng.random() < 0.2 else contrasting(rng, image.mean(axis=(0, 1)))
        image = _over(image, mask, paint)
    return image


def _over(image: Array, mask: Array, paint: Array) -> Array:
    """Lay ``paint``, a colour (3,) or an image (size, size, 3), over ``image`` where ``mask`` (size, size) is 1."""
    return image + mask[:, :, None] * (paint - image)


def contrasting(rng: Random, away_from: Array) -> Array:
    """A random colour, the farther of two from ``away_from``; both are RGB in [0, 1], shape (3,)."""
    colours = rng.random((2, 3), dtype=np.float32)
    return colours[int(np.argmax(np.abs(colours - away_from).sum(axis=1)))]


def to_uint8(image: Array) -> NDArray[np.uint8]:
    """Round [0, 1] to 0..255."""
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _rotation(angle: float) -> NDArray[np.float64]:
    """Matrix (2, 2) that turns by ``angle`` radians."""
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def degrade(rng: Random, image: Array) -> Array:
    """Sometimes blur, shade or add sensor noise, as a camera would."""
    if rng.random() < 0.3:
        blurred = Image.fromarray(to_uint8(image)).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.3)))
        image = np.asarray(blurred, np.float32) / np.float32(255)
    if rng.random() < 0.15:
        light: Array = np.float32(0.4) + np.float32(0.6) * _ramp(rng, image.shape[0])
        image = image * light[:, :, None]
    if rng.random() < 0.3:
        image = image + rng.standard_normal(image.shape, np.float32) * rng.uniform(0.01, 0.1)
    return image


def _ground(rng: Random, size: int) -> Array:
    """A plain colour, or a texture painted with two colours; RGB in [0, 1], shape (size, size, 3)."""
    first, second = rng.random((2, 3), dtype=np.float32)
    kind = rng.random()
    if kind < 0.4:
        return np.broadcast_to(first, (size, size, 3)).astype(np.float32)
    if kind < 0.55:
        texture = _ramp(rng, size)
    elif kind < 0.8:
        texture = power_law_noise(rng, size)
    elif kind < 0.95:
        texture = _grating(rng, size)
    else:
        texture = _fractal_mask(rng, size)
    return first + texture[:, :, None] * (second - first)


def _ramp(rng: Random, size: int) -> Array:
    """A linear gradient from 0 to 1 in a random direction, shape (size, size)."""
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    slope = np.float32(np.cos(angle)) * axis[None, :] + np.float32(np.sin(angle)) * axis[:, None]
    return (slope - slope.min()) / (slope.max() - slope.min())


def power_law_noise(rng: Random, size: int) -> Array:
    """Noise whose amplitude falls as 1/f^a, a in 0.7..2.2 (photographs: about 1), in [0, 1], shape (size, size)."""
    rows, columns = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]
    frequency = np.maximum(np.hypot(rows, columns), 1 / size)
    spectrum = np.fft.rfft2(rng.standard_normal((size, size))) * frequency ** -rng.uniform(0.7, 2.2)
    noise = np.fft.irfft2(spectrum, s=(size, size))
    return np.clip(0.5 + noise / (4 * noise.std() + 1e-9), 0, 1).astype(np.float32)


def _grating(rng: Random, size: int) -> Array:
    """Stripes, or with a second grating checks, smooth or hard-edged, in [0, 1], shape (size, size)."""
    axis = np.arange(size, dtype=np.float32) / size
    wave: Array = np.ones((size, size), np.float32)
    for _ in range(1 if rng.random() < 0.6 else 2):
        angle, cycles, phase = rng.uniform(0, np.pi), np.exp(rng.uniform(np.log(1.5), np.log(10))), rng.uniform(0, 6.3)
        place = np.float32(np.cos(angle)) * axis[None, :] + np.float32(np.sin(angle)) * axis[:, None]
        wave = wave * np.sin(np.float32(2 * np.pi * cycles) * place + np.float32(phase))
    if rng.random() < 0.4:
        wave = np.sign(wave)
    return np.float32(0.5) + np.float32(0.5) * wave


def _outline_mask(points: NDArray[np.float64], size: int, line: float = 0, closed: bool = True) -> Array:
    """Mask of an outline: filled, or drawn ``line`` wide where that is > 0, and then either closed or open.

    ``points``, shape (n, 2) as x, y, and ``line`` are in units of the image side. The mask is in [0, 1], (size, size).
    """
    scale = size * SUPERSAMPLE
    canvas = Image.new("L", (scale, scale))
    path = (points * scale).ravel().tolist()
    if line > 0:
        path += path[:4] if closed else []
        ImageDraw.Draw(canvas).line(path, fill=255, width=max(1, round(line * scale)), joint="curve")
    else:
        ImageDraw.Draw(canvas).polygon(path, fill=255)
    return np.asarray(canvas.reduce(SUPERSAMPLE), np.float32) / np.float32(255)


def _pose(rng: Random, outline: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squeeze, turn, scale and place an outline (n, 2) of unit radius; the result is in units of the image side."""
    squeezed = outline * np.array([1.0, rng.uniform(0.3, 1.0)])
    radius = np.exp(rng.uniform(np.log(0.1), np.log(0.42)))
    return radius * squeezed @ _rotation(rng.uniform(0, 2 * np.pi)).T + rng.uniform(0.15, 0.85, 2)


def _line_width(rng: Random) -> float:
    """Half of the outlines are filled (0); the others get a line of 2 to 10 % of the image side."""
    return 0.0 if rng.random() < 0.5 else rng.uniform(0.02, 0.1)


def _contour_mask(rng: Random, size: int) -> Array:
    """A closed contour whose radius is 1 plus three sinusoids (Visual Atoms), filled or outlined."""
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    waves = rng.integers(1, 9, 3)[:, None] * angle + rng.uniform(0, 2 * np.pi, (3, 1))
    radius = 1 + (rng.uniform(0, 0.35, (3, 1)) * np.sin(waves)).sum(axis=0)
    outline = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return _outline_mask(_pose(rng, outline), size, _line_width(rng))


def _polygon_shape_mask(rng: Random, size: int) -> Array:
    """A regular polygon, a star, or a polygon with uneven corners, filled or outlined."""
    corners = int(rng.integers(3, 9))
    radius = np.ones(corners)
    kind = rng.random()
    if kind < 0.3:
        corners *= 2
        radius = np.tile([1.0, rng.uniform(0.3, 0.7)], corners // 2)
    elif kind < 0.6:
        radius = rng.uniform(0.5, 1.3, corners)
    angle = np.arange(corners) * (2 * np.pi / corners)
    outline = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return _outline_mask(_pose(rng, outline), size, _line_width(rng))


def _stroke_mask(rng: Random, size: int) -> Array:
    """A pen stroke as in handwriting: straight pieces, or a curve whose direction drifts, sometimes a closed loop."""
    if rng.random() < 0.35:
        path = rng.uniform(0.1, 0.9, (int(rng.integers(2, 6)), 2))
    else:
        steps = int(rng.integers(10, 40))
        bend = rng.normal(0, 0.15) + np.cumsum(rng.normal(0, 0.08, steps))
        heading = rng.uniform(0, 2 * np.pi) + np.cumsum(bend)
        path = np.cumsum(np.stack([np.cos(heading), np.sin(heading)], axis=1), axis=0)
        low, high = path.min(axis=0), path.max(axis=0)
        length = rng.uniform(0.25, 0.8)
        centre = rng.uniform(0.5 - (0.9 - length) / 2, 0.5 + (0.9 - length) / 2, 2)
        path = (path - (low + high) / 2) / max(float((high - low).max()), 1e-6) * length + centre
    return _outline_mask(path, size, rng.uniform(0.02, 0.14), closed=False)


def _fractal_mask(rng: Random, size: int) -> Array:
    """The attractor of two to five random affine maps (FractalDB), as a density in [0, 1], shape (size, size)."""
    maps = int(rng.integers(2, 6))
    matrices = rng.uniform(-1, 1, (maps, 2, 2))
    # only maps that shrink have a bounded attractor: scale the largest singular value into 0.4..0.85
    matrices *= (rng.uniform(0.4, 0.85, maps) / np.linalg.norm(matrices, ord=2, axis=(1, 2)))[:, None, None]
    shifts = rng.uniform(-1, 1, (maps, 2))
    weight = np.abs(np.linalg.det(matrices)) + 0.02
    choices = rng.choice(maps, (14, 384), p=weight / weight.sum())
    points = np.zeros((384, 2))
    kept = []
    for step, choice in enumerate(choices):
        points = np.einsum("nij,nj->ni", matrices[choice], points) + shifts[choice]
        if step >= 8:
            kept.append(points)
    cloud = np.concatenate(kept)
    low, high = cloud.min(axis=0), cloud.max(axis=0)
    extent = rng.uniform(0.35, 0.95)
    corner = rng.uniform(0, 1 - extent, 2)
    cell = ((cloud - low) / np.maximum(high - low, 1e-6) * extent + corner) * (size - 1)
    place = np.rint(cell).astype(np.int64)
    density = np.bincount(place[:, 1] * size + place[:, 0], minlength=size * size).reshape(size, size)
    return np.minimum(density / 2, 1).astype(np.float32)
