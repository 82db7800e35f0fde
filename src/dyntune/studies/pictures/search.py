"""The picture of an evolutionary search: what the candidates scored, by size and by generation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from statistics import fmean
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dyntune.studies.pictures.style import COLOURS, FAINT, INK, TEXT_SIZE, frame, new_figure

if TYPE_CHECKING:
    from dyntune.studies.noah.evolution import Candidate

_SPREAD = 0.7
"""Of the distance between two generations."""


def search_figure(candidates: Sequence[Candidate], limit: float, least: float = 0.0) -> Figure:
    """Accuracy of every candidate over its parameters, and generation by generation.

    Args:
        candidates: in the order in which they were evaluated.
        limit: most parameters that were allowed, in millions.
        least: fewest, in millions.
    """
    figure = new_figure(8.2, 3.7, layout="constrained")
    by_size, by_generation = figure.subplots(1, 2, sharey=True)
    best = min(candidates, key=lambda candidate: (-candidate.accuracy, candidate.parameters))
    millions = [candidate.parameters / 1e6 for candidate in candidates]
    accuracies = [100 * candidate.accuracy for candidate in candidates]
    generations = [candidate.generation + 1 for candidate in candidates]
    own = {number: [a for g, a in zip(generations, accuracies, strict=True) if g == number] for number in generations}
    dots = {"c": generations, "s": 16, "cmap": "viridis", "linewidths": 0, "zorder": 3}

    by_size.scatter(millions, accuracies, **dots)
    by_size.scatter(
        best.parameters / 1e6,
        100 * best.accuracy,
        s=90,
        facecolors="none",
        edgecolors=COLOURS[1],
        linewidths=1.6,
        zorder=4,
        label=f"best: {100 * best.accuracy:.1f} %, {best.parameters / 1e6:.3f} M",
    )
    shown = [bound for bound in (least, limit) if min(millions) / 1.5 <= bound <= max(millions) * 1.5]
    for number, bound in enumerate(shown):
        by_size.axvline(bound, color=FAINT, linestyle="--", linewidth=1, label=None if number else "limit")
    frame(by_size, "trained parameters without head (M)", "validation accuracy (%)")
    by_size.set_title("every candidate, coloured by its generation", color=INK, fontsize=TEXT_SIZE)

    # Side by side within a generation, because the scores of a small validation split often coincide.
    places = [number + _SPREAD * (k / len(own[number]) - 0.5) for number in own for k in range(len(own[number]))]
    by_generation.scatter(places, accuracies, **dots)
    by_generation.plot(list(own), [fmean(scores) for scores in own.values()], color=INK, linewidth=1.2, label="mean")
    rising = list(accumulate((max(scores) for scores in own.values()), max))
    by_generation.plot(list(own), rising, color=COLOURS[1], marker="s", markersize=3.5, label="best so far", zorder=4)
    frame(by_generation, "generation")
    by_generation.set_xlim(min(own) - 0.6, max(own) + 0.6)
    by_generation.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=TEXT_SIZE, labelcolor=INK)
    return figure
