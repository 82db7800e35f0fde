"""The evolutionary search as a pure function of its seed and of what each candidate scores."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from dyntune.core.errors import TrainingError
from dyntune.core.fields import Range, require_ranges
from dyntune.parts.methods.noah import PUBLISHED_WIDTH, Space, Subnet

Origin = Literal["random", "mutation", "crossover"]
_RANDOM_TRIES = 1000
"""Random draws for each candidate that is wanted, before a space counts as exhausted."""
_CHILD_TRIES = 10
"""Mutations or crossovers tried for each that is wanted."""


@dataclass(frozen=True)
class SearchSettings:
    """How to search. The defaults are those of the published VTAB-1K search.

    Args:
        limit: most trained parameters of a candidate, in millions and without the head.
        least: fewest trained parameters, in millions.
        population: candidates of a generation of the search.
        generations: generations of the search; the first is random.
        parents: best candidates so far that have children.
        mutations: children of one parent in a generation.
        crossovers: children of two parents in a generation; random candidates fill the population up.
        mutation_rate: probability that a mutation considers another depth for one kind of module.
        depth_rate: probability that it then draws one.
        count: what the limits are about: ``stored`` is what a sub-network trains and saves, ``published`` counts as
            the public code does, which adds the prompts of the first block and 100 position embeddings of prompts,
            unless the first block has no prompts.
    """

    limit: float = 0.64
    least: float = 0.0
    population: Annotated[int, Range(1)] = 50
    generations: Annotated[int, Range(1)] = 15
    parents: Annotated[int, Range(1)] = 10
    mutations: Annotated[int, Range(0)] = 25
    crossovers: Annotated[int, Range(0)] = 25
    mutation_rate: float = 0.2
    depth_rate: float = 0.4
    count: Literal["stored", "published"] = "stored"

    @classmethod
    def of_halves(
        cls, *, population: int, mutations: int | None = None, crossovers: int | None = None, **others: Any
    ) -> Self:
        """Settings in which half of a generation have one parent, and half two, where no number is given."""
        half = population // 2
        return cls(
            population=population,
            mutations=half if mutations is None else mutations,
            crossovers=half if crossovers is None else crossovers,
            **others,
        )

    def __post_init__(self) -> None:
        require_ranges(self, TrainingError)
        if self.mutations + self.crossovers > self.population:
            raise TrainingError(
                f"mutations={self.mutations}, crossovers={self.crossovers}: expected at least 0 each, and together at "
                f"most the population of {self.population}."
            )
        if not 0 <= self.least <= self.limit:
            raise TrainingError(f"limit={self.limit}, least={self.least}: expected 0 <= least <= limit.")
        if not (0 <= self.mutation_rate <= 1 and 0 <= self.depth_rate <= 1):
            raise TrainingError("expected mutation_rate and depth_rate between 0 and 1.")

    def parameters(self, subnet: Subnet, width: int) -> int:
        """The number of parameters that the limits are about, on a host of so many channels."""
        extra = width * (subnet.prompts[0] + PUBLISHED_WIDTH) if self.count == "published" and subnet.prompts[0] else 0
        return subnet.parameters(width) + extra

    def allows(self, parameters: int) -> bool:
        """Whether a candidate of so many parameters is within the limits."""
        return self.least <= parameters / 1e6 <= self.limit


@dataclass(frozen=True)
class Candidate:
    """A sub-network that was evaluated.

    Args:
        subnet: its sizes.
        generation: in which it came up, counted from 0.
        origin: how.
        parameters: as the limits count them.
        accuracy: on the validation images, with the supernet's weights.
    """

    subnet: Subnet
    generation: int
    origin: Origin
    parameters: int
    accuracy: float


def evolve(
    space: Space, settings: SearchSettings, width: int, seed: int, fitness: Callable[[Subnet], float]
) -> Iterator[Candidate]:
    """Searches a space; every sub-network is evaluated at most once.

    Generation 0 is random. The parents of each later one are the best of all candidates so far, of equals those found
    first; what their children leave free is filled with random candidates.

    Args:
        space: of the supernet.
        settings: sizes and limits.
        width: channels of the host, which the number of parameters follows from.
        seed: of the search's own random numbers; with the same scores the same candidates come.
        fitness: the score of a sub-network.

    Yields:
        Candidates, as they are evaluated.

    Raises:
        TrainingError: no sub-network that could be found is within the limits.
    """
    rng = random.Random(seed)
    visited: set[Subnet] = set()
    best: list[Candidate] = []

    def mutation() -> Subnet:
        parent = rng.choice(best).subnet
        return Subnet(*(mutated(sizes, space, settings, rng) for sizes in vars(parent).values()))

    def crossover() -> Subnet:
        first, second = rng.choice(best).subnet, rng.choice(best).subnet
        return Subnet(*(rng.choice(pair) for pair in zip(vars(first).values(), vars(second).values(), strict=True)))

    def chance() -> Subnet:
        return space.draw(rng.randrange)

    for generation in range(settings.generations):
        population: list[Candidate] = []
        plan: list[tuple[Origin, Callable[[], Subnet], int, int]] = [
            ("mutation", mutation, settings.mutations, _CHILD_TRIES),
            ("crossover", crossover, settings.crossovers, _CHILD_TRIES),
            ("random", chance, settings.population, _RANDOM_TRIES),
        ]
        for origin, propose, wanted, tries in plan if best else plan[-1:]:
            goal = min(len(population) + wanted, settings.population)
            for _ in range(wanted * tries):
                if len(population) == goal:
                    break
                subnet = propose()
                parameters = settings.parameters(subnet, width)
                if subnet in visited or not settings.allows(parameters):
                    continue
                visited.add(subnet)
                population.append(Candidate(subnet, generation, origin, parameters, fitness(subnet)))
                yield population[-1]
        best = sorted(best + population, key=lambda candidate: -candidate.accuracy)[: settings.parents]
        if not best:
            raise _nothing_allowed(space, settings, width)


def require_possible(space: Space, settings: SearchSettings, width: int) -> None:
    """Raises TrainingError unless the limits leave anything between the smallest and the largest sub-network."""
    smallest, largest = (settings.parameters(subnet, width) / 1e6 for subnet in (space.smallest, space.largest))
    if smallest > settings.limit or largest < settings.least:
        raise _nothing_allowed(space, settings, width)


def _nothing_allowed(space: Space, settings: SearchSettings, width: int) -> TrainingError:
    ends = [settings.parameters(subnet, width) / 1e6 for subnet in (space.smallest, space.largest)]
    return TrainingError(
        f"no sub-network with {settings.least:g} to {settings.limit:g} million parameters was found: the "
        f"smallest has {ends[0]:.4g}, the largest {ends[1]:.4g} million. Give another limit or other choices."
    )


def mutated(sizes: tuple[int, ...], space: Space, settings: SearchSettings, rng: random.Random) -> tuple[int, ...]:
    """The sizes of one kind of module, now and then with another depth; blocks that keep a module keep its size."""
    if rng.random() >= settings.mutation_rate or rng.random() >= settings.depth_rate:
        return sizes
    depth = sizes.index(0) if 0 in sizes else len(sizes)
    return space.fill(sizes[:depth], rng.choice(space.depths), rng.randrange)


def winner(candidates: list[Candidate]) -> Candidate:
    """The best candidate: of equals the one with the fewest parameters, then the one found first."""
    return min(candidates, key=lambda candidate: (-candidate.accuracy, candidate.parameters))
