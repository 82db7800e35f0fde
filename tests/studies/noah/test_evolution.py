"""The search on made-up scores: limits, operators, order, and what it finds."""

import random

import pytest

from dyntune.core.errors import TrainingError
from dyntune.parts.methods.noah import Noah, Space, Subnet
from dyntune.studies.noah.evolution import Candidate, SearchSettings, evolve, mutated, winner

SPACE = Noah().space(12)
SMALL = SearchSettings(limit=0.4, least=0.2, population=12, generations=5, parents=4, mutations=6, crossovers=4)


def score(subnet):
    """Rewards ranks in the first half and adapters in the second."""
    return (sum(subnet.ranks[:6]) + sum(subnet.bottlenecks[6:]) - sum(subnet.prompts)) / 120


def search(settings=SMALL, seed=0, fitness=score, space=SPACE):
    return list(evolve(space, settings, 768, seed, fitness))


def kinds(subnet):
    return tuple(vars(subnet).values())


def test_candidates_are_within_space_and_limits_and_come_once():
    found = search()
    assert len({candidate.subnet for candidate in found}) == len(found) == 60
    for candidate in found:
        assert 200_000 <= candidate.parameters <= 400_000
        assert candidate.parameters == candidate.subnet.parameters(768)
        assert candidate.accuracy == score(candidate.subnet)
        for sizes in kinds(candidate.subnet):
            depth = sum(map(bool, sizes))
            assert len(sizes) == 12 and depth in (3, 6, 9, 12)
            assert set(sizes[:depth]) <= {1, 5, 10} and not any(sizes[depth:])


def test_generations_are_full_and_children_come_before_random_ones():
    found = search()
    assert [candidate.generation for candidate in found] == [g for g in range(5) for _ in range(12)]
    assert all(candidate.origin == "random" for candidate in found[:12])
    for generation in range(1, 5):
        origins = [candidate.origin for candidate in found if candidate.generation == generation]
        assert origins == sorted(origins, key=("mutation", "crossover", "random").index)
        assert origins.count("mutation") <= 6 and origins.count("crossover") <= 4
    assert {"mutation", "crossover"} <= {candidate.origin for candidate in found}


def test_children_descend_from_the_best_so_far():
    found = search()
    for child in found[12:]:
        before = [c for c in found if c.generation < child.generation]
        parents = [kinds(c.subnet) for c in sorted(before, key=lambda c: -c.accuracy)[:4]]
        own = kinds(child.subnet)
        if child.origin == "crossover":
            assert all(any(own[kind] == parent[kind] for parent in parents) for kind in range(3))
        if child.origin == "mutation":
            assert any(all(descends(new, old) for new, old in zip(own, parent, strict=True)) for parent in parents)


def descends(new, old):
    """Blocks that have a module before and after have it at the same size."""
    return all(a == b for a, b in zip(new, old, strict=True) if a and b)


def test_mutation_draws_a_depth_now_and_then_and_keeps_what_survives():
    rng = random.Random(0)
    old = (1, 5, 10, 10, 5, 1, 0, 0, 0, 0, 0, 0)
    always = SearchSettings(mutation_rate=1.0, depth_rate=1.0)
    seen = [mutated(old, SPACE, always, rng) for _ in range(2000)]
    depths = [sum(map(bool, sizes)) for sizes in seen]
    assert all(descends(sizes, old) for sizes in seen)
    assert all(abs(depths.count(depth) / 2000 - 0.25) < 0.05 for depth in (3, 6, 9, 12))
    appended = [size for sizes in seen for size in sizes[6:] if size]
    assert all(abs(appended.count(width) / len(appended) - 1 / 3) < 0.05 for width in (1, 5, 10))
    published = [mutated(old, SPACE, SearchSettings(), rng) != old for _ in range(5000)]
    assert sum(published) / 5000 == pytest.approx(0.2 * 0.4 * 0.75, abs=0.015)


def test_the_same_seed_gives_the_same_search():
    assert search() == search()
    assert search(seed=1) != search()


def test_it_finds_better_ones_than_chance():
    searched = winner(search())
    chance = winner(search(SearchSettings(0.4, 0.2, population=60, generations=1)))
    assert searched.accuracy > chance.accuracy
    assert searched.generation > 0


def test_of_equals_the_smallest_wins_then_the_first():
    one, two = (Subnet((size,), (0,), (0,)) for size in (1, 2))
    found = [
        Candidate(two, 0, "random", 20, 0.5),
        Candidate(one, 0, "random", 10, 0.5),
        Candidate(two, 1, "random", 10, 0.5),
    ]
    assert winner(found) is found[1]


def test_the_default_is_the_published_search():
    assert SearchSettings() == SearchSettings(0.64, 0.0, 50, 15, 10, 25, 25, 0.2, 0.4, "stored")


def test_counting_as_published_adds_the_input_prompts():
    published = SearchSettings(count="published")
    with_prompts, without = Subnet((5, 0), (1, 0), (1, 0)), Subnet((0, 5), (1, 0), (1, 0))
    own = 5 * 768 + 3072 + 1537 + 768
    assert SearchSettings().parameters(with_prompts, 768) == SearchSettings().parameters(without, 768) == own
    assert published.parameters(with_prompts, 768) == own + 5 * 768 + 100 * 768
    assert published.parameters(without, 768) == own


def test_a_space_that_is_used_up_ends_the_search():
    tiny = Space(2, (1, 2), (1,))
    found = search(SearchSettings(population=5, generations=4, mutations=2, crossovers=2), space=tiny)
    assert len(found) == 8
    assert {candidate.generation for candidate in found} == {0, 1}


def test_limits_that_nothing_meets_are_refused():
    with pytest.raises(TrainingError, match=r"no sub-network with 0 to 0\.01 million .* 0\.0184., the largest 0\.6545"):
        search(SearchSettings(limit=0.01))


@pytest.mark.parametrize(
    "options",
    [
        {"population": 0},
        {"generations": 0},
        {"parents": 0},
        {"population": 10, "mutations": 6, "crossovers": 5},
        {"mutations": -1},
        {"limit": 0.1, "least": 0.2},
        {"mutation_rate": 1.5},
    ],
)
def test_settings_that_make_no_sense_are_refused(options):
    with pytest.raises(TrainingError, match="expected"):
        SearchSettings(**options)
