"""Formula-driven images: the same for the same number, all different, and labels that say what is drawn."""

import numpy as np
import pytest

from dyntune.core.errors import DataError
from dyntune.data.drawn import procedural
from dyntune.data.drawn.procedural import SHAPE_CLASSES, render, render_batch, render_shape


def test_an_image_does_not_depend_on_its_batch_or_order():
    together = render_batch(3, range(40))
    backwards = render_batch(3, range(39, -1, -1))
    assert np.array_equal(together, backwards[::-1])
    for index in (39, 0, 17):
        assert np.array_equal(render(3, index), together[index])


def test_drawing_leaves_the_global_random_numbers_alone():
    np.random.seed(5)  # noqa: NPY002  the global generator is what is tested
    before = np.random.random(3)  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    first = render(0, 4)
    assert np.array_equal(before, np.random.random(3))  # noqa: NPY002
    assert np.array_equal(first, render(0, 4))


@pytest.mark.parametrize("size", [8, 32, 64])
def test_images_are_rgb_bytes(size):
    images = render_batch(0, range(30), size)
    assert images.shape == (30, size, size, 3)
    assert images.dtype == np.uint8


def test_images_use_the_whole_range_and_are_not_blank():
    images = render_batch(0, range(200))
    assert images.min() == 0
    assert images.max() == 255
    assert (images.reshape(200, -1).std(axis=1) > 1).all()


def test_seeds_and_indices_give_different_images():
    images = np.concatenate([render_batch(0, range(60)), render_batch(1, range(60))])
    assert len({image.tobytes() for image in images}) == 120


def test_some_images_are_grey_drawings_on_plain_black_or_white():
    images = render_batch(0, range(300)).astype(int)
    grey = (np.ptp(images, axis=3) <= 1).all(axis=(1, 2))
    corner = images[:, 0, 0].mean(axis=1)
    assert 30 < (grey & (corner == 0)).sum() < 120
    assert 15 < (grey & (corner == 255)).sum() < 120
    assert (~grey).sum() > 150


def captured_masks(monkeypatch, count):
    """Labels and masks of the first shapes of seed 0, the masks taken where they are painted."""
    masks = []
    paint = procedural._over

    def spy(image, mask, colour):
        masks.append(mask)
        return paint(image, mask, colour)

    monkeypatch.setattr(procedural, "_over", spy)
    labels = [render_shape(0, index)[1:] for index in range(count)]
    assert len(masks) == count
    return labels, masks


def test_labels_say_where_the_shape_lies_and_which_way_it_points(monkeypatch):
    inside = 0
    for (place, direction), mask in zip(*captured_masks(monkeypatch, 80), strict=True):
        if mask[[0, -1]].any() or mask[:, [0, -1]].any():
            continue  # cut off by the edge: the visible part has another centre
        inside += 1
        weight = mask / mask.sum()
        rows, columns = np.mgrid[0:32, 0:32] + 0.5
        x, y = (weight * columns).sum(), (weight * rows).sum()
        assert abs(x / 32 - (0.2 + 0.6 * (place + 0.5) / SHAPE_CLASSES)) < 0.6 / SHAPE_CLASSES
        spread = [(weight * a * b).sum() for a in (columns - x, rows - y) for b in (columns - x, rows - y)]
        axis = 0.5 * np.arctan2(2 * spread[1], spread[0] - spread[3])
        error = (axis / np.pi * SHAPE_CLASSES - (direction + 0.5) + 8) % SHAPE_CLASSES - 8
        assert abs(error) < 1
    assert inside > 40


def test_every_label_occurs_about_equally_often():
    labels = np.array([render_shape(1, index)[1:] for index in range(800)])
    for column in (0, 1):
        counts = np.bincount(labels[:, column], minlength=SHAPE_CLASSES)
        assert len(counts) == SHAPE_CLASSES
        assert counts.min() > 20
        assert counts.max() < 90


def test_labelled_shapes_are_bytes_and_not_the_pretraining_images():
    image, _, _ = render_shape(0, 0)
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8
    assert not np.array_equal(image, render(0, 0))
    assert np.array_equal(image, render_shape(0, 0)[0])


@pytest.mark.parametrize("call", [lambda: render(-1, 0), lambda: render(0, -1), lambda: render_shape(0, -1)])
def test_negative_numbers_are_refused(call):
    with pytest.raises(DataError, match="0 or greater"):
        call()


def test_too_small_images_and_empty_batches_are_refused():
    with pytest.raises(DataError, match="8 pixels"):
        render(0, 0, size=7)
    with pytest.raises(DataError, match="no indices"):
        render_batch(0, [])
