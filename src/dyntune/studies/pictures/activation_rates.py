"""The activation rate of every gated unit, block by block, for one or several models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from dyntune.core.errors import DyntuneError
from dyntune.studies.pictures.patches import KINDS, split_path
from dyntune.studies.pictures.style import (
    COLOURS,
    FAINT,
    INK,
    LONGEST_IN_TWO_COLUMNS,
    MARKERS,
    RULE,
    SMALL_SIZE,
    TEXT_SIZE,
    lighter,
    new_figure,
    percent,
)

_MOST_LABELLED_BARS = 16
_WIDEST = 11.0
"""Inches."""


@dataclass(frozen=True)
class _Series:
    """The units of one kind in one model: ``rates`` by block number, between 0 and 1."""

    model: str
    kind: str
    rates: dict[int, float]
    colour: Any
    marker: str


def activation_figure(
    rates: Mapping[str, Sequence[tuple[str, float]]], target: Mapping[str, float] | None = None
) -> Figure:
    """Activation rate per block: bars for one model, lines for several; mean and target are in the legend.

    Attention and MLP units are separate series, so dispatch at ``attn-mlp`` gives two per model.

    Args:
        rates: for each model's name, (unit path, share of active patches between 0 and 1) for each gated unit.
        target: target share by model's name, drawn dashed; models without one may be left out.

    Raises:
        DyntuneError: there is no model, or one has no gated units.
        ValueError: a share is not between 0 and 1, a path is no unit's, or a target's model has no rates.
    """
    target = target or {}
    unknown = set(target) - set(rates)
    if unknown:
        raise ValueError(f"targets for {sorted(unknown)}, which have no rates; there are rates for {sorted(rates)}.")
    series = _series(rates)
    blocks = sorted({block for one in series for block in one.rates})
    width = min(max(6.4, 1.2 + 0.42 * len(blocks)), _WIDEST)
    figure = new_figure(width, 3.3 + 0.17 * len(series), layout="constrained")
    axes = figure.add_subplot()
    _frame(axes, blocks, [kind for kind in KINDS if any(one.kind == kind for one in series)])
    handles = _bars(axes, series) if len(rates) == 1 else _lines(axes, series)
    labels = [_label(one, series, percent(fmean(one.rates.values()))) for one in series]
    for model, units in rates.items():
        if sum(one.model == model for one in series) > 1:
            handles.append(Line2D([], [], linestyle="none"))
            labels.append(f"{model}, all units: mean {percent(fmean(share for _, share in units))}")
    colours = {one.model: one.colour for one in series if one.kind != "attn"}
    for value in sorted(set(target.values()), reverse=True):
        models = [model for model in rates if target.get(model) == value]
        everyone = len(models) == len(rates)
        colour = INK if everyone or len(models) > 1 else colours.get(models[0], INK)
        line = axes.axhline(100 * value, color=colour, linestyle=(0, (5, 3)), linewidth=1.2, zorder=4, gid="target")
        handles.append(line)
        labels.append(f"target {100 * value:g} %" + ("" if everyone else f" ({', '.join(models)})"))
    # Matplotlib leaves labels that begin with an underscore out of the legend, and a run's name may.
    labels = [f" {label}" if label.startswith("_") else label for label in labels]
    columns = 1 if max(len(label) for label in labels) > LONGEST_IN_TWO_COLUMNS else 2
    legend = figure.legend(
        handles, labels, loc="outside upper left", ncols=columns, fontsize=TEXT_SIZE, frameon=False, labelcolor=INK
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _series(rates: Mapping[str, Sequence[tuple[str, float]]]) -> list[_Series]:
    if not rates:
        raise DyntuneError("no activation rates to draw: give at least one model.")
    found = []
    for number, (model, units) in enumerate(rates.items()):
        if not units:
            raise DyntuneError(f"{model} gates no unit, so it has no activation rates; tune with dyt or dispatch.")
        wrong = [share for _, share in units if not 0 <= share <= 1]
        if wrong:
            raise ValueError(f"{model} has the activation rate {wrong[0]}: expected shares between 0 and 1.")
        places = [(*split_path(path), share) for path, share in units]
        colour = COLOURS[number % len(COLOURS)]
        for kind in KINDS:
            own = {block: share for block, its_kind, share in sorted(places) if its_kind == kind}
            if own:
                shade = lighter(colour) if kind == "attn" and len(own) < len(units) else colour
                found.append(_Series(model, kind, own, shade, MARKERS[number % len(MARKERS)]))
    return found


def _label(one: _Series, series: Sequence[_Series], mean: str) -> str:
    """The model's name, and its kind of unit wherever the figure shows more than one kind."""
    kind = f", {KINDS[one.kind]}" if len({other.kind for other in series}) > 1 else ""
    return f"{one.model}{kind}: mean {mean}"


def _frame(axes: Axes, blocks: Sequence[int], kinds: Sequence[str]) -> None:
    """Axes, ticks and rules; the axis says which kind of unit is meant where the legend does not."""
    axes.set_ylim(0, 105)
    axes.set_yticks(range(0, 101, 20))
    axes.yaxis.set_major_formatter(PercentFormatter(decimals=0, symbol=" %"))
    axes.set_ylabel(
        "activation rate" + (f", {KINDS[kinds[0]]}" if len(kinds) == 1 else ""), fontsize=TEXT_SIZE, color=INK
    )
    axes.set_xlim(blocks[0] - 0.6, blocks[-1] + 0.6)
    axes.set_xticks(blocks)
    axes.set_xlabel("block", fontsize=TEXT_SIZE, color=INK)
    axes.tick_params(labelsize=TEXT_SIZE, length=0, labelcolor=INK)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)


def _bars(axes: Axes, series: Sequence[_Series]) -> list[Any]:
    """Bars beside each other, one group per block; with their values where there is room."""
    width = 0.72 / len(series)
    handles = []
    for number, one in enumerate(series):
        offset = (number - (len(series) - 1) / 2) * width
        heights = [100 * share for share in one.rates.values()]
        bars = axes.bar([block + offset for block in one.rates], heights, width, color=one.colour, zorder=2)
        handles.append(bars)
        if len(series) == 1 and len(heights) <= _MOST_LABELLED_BARS:
            # White behind the number keeps it legible where it meets the target line.
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
            axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=SMALL_SIZE, color=INK, bbox=box, zorder=5)
    return handles


def _lines(axes: Axes, series: Sequence[_Series]) -> list[Any]:
    """One line per series; attention has open markers, so that it is told apart without colour."""
    handles = []
    for one in series:
        heights = [100 * share for share in one.rates.values()]
        face = "white" if one.kind == "attn" else one.colour
        style = {"color": one.colour, "marker": one.marker, "markerfacecolor": face, "markersize": 4.5}
        handles += axes.plot(list(one.rates), heights, linewidth=1.4, zorder=3, clip_on=False, **style)
    return handles
