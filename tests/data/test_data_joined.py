"""Data sets one after the other."""

import pickle

import pytest

from dyntune.data import ImageSubset, load_data
from dyntune.data.datasets import JoinedImages
from dyntune.data.transforms import Preprocessing, build_transform


def test_joined_images_are_those_of_the_parts_in_order():
    splits = load_data("digits")
    parts = [ImageSubset(splits.train, [3, 1]), ImageSubset(splits.val, [0]), ImageSubset(splits.train, [2])]
    joined = pickle.loads(pickle.dumps(JoinedImages(parts)))
    assert len(joined) == 4
    expected = [(part, i) for part in parts for i in range(len(part))]
    for index, (part, i) in enumerate(expected):
        assert joined.source(index) == part.source(i)
        assert joined.targets[index] == joined[index][1] == part.targets[i]
        assert joined[index][0].tobytes() == part[i][0].tobytes()
    assert joined[-1][0].tobytes() == parts[2][0][0].tobytes()
    assert joined.classes == splits.classes
    assert [label for _, label in joined] == list(joined.targets)
    with pytest.raises(IndexError):
        joined[4]


def test_it_takes_a_transform_of_its_own():
    splits = load_data("digits")
    preprocessing = Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic")
    joined = JoinedImages([ImageSubset(splits.train, [0]), ImageSubset(splits.val, [0])])
    assert joined.with_transform(build_transform(preprocessing))[1][0].shape == (3, 32, 32)
    assert joined.transform is None
