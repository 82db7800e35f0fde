"""Stratified splitting: proportions, limits and independence of library versions."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from dyntune.data.splits import stratified_take


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
