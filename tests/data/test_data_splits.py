"""Parts of data sets, and stratified splitting: proportions, limits and independence of library versions."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dyntune.core.errors import DataError
from dyntune.data import ImageSubset, load_data
from dyntune.data.splits import split_of, stratified_take, take_by_place


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(0, 60), st.text(max_size=3))
def test_a_stratified_choice_is_in_proportion_and_leaves_every_class_one(targets, count, key):
    chosen, rest = stratified_take(targets, count, key=key)
    assert sorted(chosen + rest) == list(range(len(targets)))
    sizes, taken = Counter(targets), Counter(targets[i] for i in chosen)
    assert len(chosen) == min(count, len(targets) - len(sizes))
    assert all(taken[label] < sizes[label] for label in sizes)
    if all(count * size / len(targets) <= size - 1 for size in sizes.values()):
        assert all(abs(taken[label] - count * size / len(targets)) < 1 for label, size in sizes.items())


def test_the_choice_is_the_same_everywhere_and_differs_by_key():
    # Worked out with coreutils: b2sum -l 128 of "k/0" to "k/5", the two smallest sums win.
    assert stratified_take([0] * 6, 2, key="k")[0] == [2, 3]
    choices = {tuple(stratified_take([0] * 40, 8, key=str(seed))[0]) for seed in range(20)}
    assert len(choices) == 20


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(0, 30), st.floats(0.01, 0.99))
def test_a_choice_by_place_keeps_every_class_one_and_moves_nothing_back(targets, more, share):
    places = [f"{target}/{number}" for number, target in enumerate(targets)]
    chosen, rest = take_by_place(places, targets, share, key="k")
    assert sorted(chosen + rest) == list(range(len(targets)))
    assert {targets[i] for i in rest} == set(targets)
    assert chosen or max(Counter(targets).values()) == 1
    longer = targets + [0] * more
    again, _ = take_by_place([*places, *(f"0/new{i}" for i in range(more))], longer, share, key="k")
    back, taken = set(chosen) - set(again), set(again) - set(chosen)
    # Only what had to be chosen, being all that was, or had to stay, being all of its class, can change sides.
    assert not back or len(chosen) == 1
    assert all(
        places[i : i + 1] == [] or [t for j, t in enumerate(targets) if j in rest].count(targets[i]) == 1 for i in taken
    )


def test_names_of_splits():
    words = ("Train", "TRAINING", "train_set", "trainset", "Test", "testing", "Test Images", "val", "Valid", "dev")
    assert [split_of(word) for word in words] == [*["train"] * 4, *["test"] * 3, *["val"] * 3]
    for word in ("trains", "test1", "contest", "cat", "train and bus", "validated", "", "set"):
        assert split_of(word) is None


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_a_mask_is_no_subset(kind):
    data = load_data("digits").val
    mask = kind([label == 3 for label in data.targets])
    with pytest.raises(DataError, match=r"ImageSubset with the index .* of a data set of.*torch\.nonzero"):
        ImageSubset(data, mask)
    assert set(ImageSubset(data, torch.nonzero(torch.as_tensor(mask)).flatten().tolist()).targets) == {3}
    assert ImageSubset(data, np.array([0, -1])).targets == (data.targets[0], data.targets[-1])
