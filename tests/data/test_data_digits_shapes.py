"""The data sets that need no files: scikit-learn's digits and the procedural shapes."""

import math
import pickle
from collections import Counter

import numpy as np
import pytest
from sklearn.datasets import load_digits as sklearn_digits

from dyntune.core.errors import DataError
from dyntune.data import load_data
from dyntune.data.drawn.shapes import OUTLINES, Pose, ShapeImages, draw_pose


def pixels(image):
    return np.asarray(image)[..., 0].astype(float)


def test_digits_are_split_once_and_for_all_without_loss_or_overlap():
    splits = load_data("digits", seed=0)
    parts = (splits.train, splits.val, splits.test)
    assert [len(part) for part in parts] == [1000, 200, 597]
    assert splits.classes == tuple("0123456789")

    bunch = sklearn_digits()
    original = Counter(
        ((image * 255 / 16 + 0.5).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(bunch.images, bunch.target, strict=True)
    )
    found = Counter((np.asarray(image)[..., 1].tobytes(), label) for part in parts for image, label in part)
    assert found == original

    again = load_data("digits", seed=5)
    assert all(a.indices == b.indices for a, b in zip(parts, (again.train, again.val, again.test), strict=True))


def test_digits_are_stratified():
    splits = load_data("digits")
    overall = Counter(sklearn_digits().target.tolist())
    for part in (splits.train, splits.val, splits.test):
        counts = Counter(part.targets)
        assert all(abs(counts[label] - len(part) * overall[label] / 1797) < 2 for label in range(10))


def test_shapes_have_the_default_sizes_and_balanced_classes():
    for name in ("shapes-location", "shapes-orientation"):
        splits = load_data(name)
        assert [len(part) for part in (splits.train, splits.val, splits.test)] == [1000, 200, 1000]
        assert len(splits.classes) == 16
        counts = Counter(splits.train.targets)
        assert set(counts) == set(range(16)) and max(counts.values()) - min(counts.values()) <= 1
        image, label = splits.train[3]
        assert (image.mode, image.size, label) == ("RGB", (64, 64), splits.train.targets[3])


def test_a_shape_picture_depends_on_seed_split_and_index_alone():
    one, other = load_data("shapes-location", seed=1), load_data("shapes-location", seed=1)
    last_first = {index: other.train.read(index).tobytes() for index in reversed(range(40))}
    assert all(one.train.read(index).tobytes() == last_first[index] for index in range(40))
    longer = ShapeImages("location", "train", 2000, seed=1)
    assert longer.read(7).tobytes() == last_first[7]
    assert load_data("shapes-location", seed=2).train.read(7).tobytes() != last_first[7]
    assert one.test.read(7).tobytes() != last_first[7]
    assert len(set(last_first.values())) == 40


def test_location_labels_are_the_column_of_the_shapes_centre_of_mass():
    data = load_data("shapes-location").train
    columns = []
    for index in range(320):
        image = pixels(data.read(index))
        assert image[0].max() == image[-1].max() == image[:, 0].max() == image[:, -1].max() == 0
        centre = (image.sum(0) * (np.arange(64) + 0.5)).sum() / image.sum()
        columns.append((centre, data.targets[index]))
    # 32 columns between the margins of 14 pixels, two to a class.
    worked_out = [int((centre - 14) / 36 * 31 + 0.5) // 2 for centre, _ in columns]
    assert worked_out == [label for _, label in columns]


def test_orientation_labels_are_the_direction_of_the_one_tip():
    data = load_data("shapes-orientation").train
    seen = set()
    for index in range(320):
        image = pixels(data.read(index))
        rows, cols = np.indices(image.shape)
        x, y = cols - (cols * image).sum() / image.sum(), rows - (rows * image).sum() / image.sum()
        # The third moment points along the axis of symmetry, to where the shape is drawn out: the tip of a drop or a
        # kite; but a heart's two lobes outweigh its tip.
        weight = (x**2 + y**2) * image * (-1 if data.pose(index).outline == "heart" else 1)
        angle = math.atan2((weight * y).sum(), (weight * x).sum()) % (2 * math.pi)
        middle = (data.targets[index] + 0.5) * 2 * math.pi / 16
        off = abs((angle - middle + math.pi) % (2 * math.pi) - math.pi)
        # The angles of a class lie up to 5 degrees from its middle; pixels turn a small heart's moment by up to 7 more.
        assert off < math.radians(13), (index, data.pose(index))
        seen.add(data.pose(index).outline)
    assert seen == {"heart", "drop", "kite"}


def test_only_shapes_without_symmetry_are_asked_for_their_direction():
    def turned(name, angle):
        return pixels(draw_pose(Pose(name, 32, 32, 1.0, angle)))

    for name in OUTLINES:
        likeness = [np.abs(turned(name, 0) - turned(name, turn * math.pi / 8)).mean() for turn in range(1, 16)]
        ambiguous = min(likeness) < 1
        assert ambiguous == (name in ("square", "ellipse")), name


def test_shape_outlines_are_antialiased_and_true_in_area():
    image = pixels(draw_pose(Pose("square", 32, 32, 1.0, 0.3)))
    # A square that reaches 13 pixels to its corners has an area of 2 * 13**2.
    assert image.sum() / 255 == pytest.approx(2 * 13**2, rel=0.03)
    assert len(np.unique(image)) > 10


def test_shapes_alone_names_both_tasks_and_pickles():
    with pytest.raises(DataError, match=r"shapes-location.*shapes-orientation"):
        load_data("shapes")
    with pytest.raises(DataError, match="Did you mean 'location'"):
        ShapeImages("locatoin", "train", 10, 0)
    data = load_data("shapes-orientation").val
    assert pickle.loads(pickle.dumps(data)).read(5).tobytes() == data.read(5).tobytes()
