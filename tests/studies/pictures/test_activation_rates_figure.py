"""Activation figures: every rate is drawn where it belongs, with means and targets in the legend."""

import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from dyntune import DyntuneError
from dyntune.studies.pictures import activation_figure

MLP = [("blocks.0.mlp", 0.25), ("blocks.1.mlp", 0.75), ("blocks.2.mlp", 0.5)]
BOTH = [(f"blocks.{block}.{kind}", rate) for block in range(3) for kind, rate in (("attn", 0.2), ("mlp", 0.6))]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def targets(figure: Figure) -> list[float]:
    return [line.get_ydata()[0] for line in figure.axes[0].lines if line.get_gid() == "target"]


def test_one_model_is_bars_with_values() -> None:
    figure = activation_figure({"DyT": MLP}, {"DyT": 0.5})
    axes = figure.axes[0]
    bars = axes.patches
    assert [bar.get_height() for bar in bars] == [25, 75, 50]
    assert [bar.get_x() + bar.get_width() / 2 for bar in bars] == pytest.approx([0, 1, 2])
    assert [text.get_text() for text in axes.texts] == ["25", "75", "50"]
    assert targets(figure) == [50]
    assert axes.lines[0].get_linestyle() == "--"
    assert legend(figure) == ["DyT: mean 50.0 %", "target 50 %"]
    assert axes.get_ylabel() == "activation rate, MLP"
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] >= 100


def test_the_order_of_units_does_not_matter() -> None:
    heights = [bar.get_height() for bar in activation_figure({"DyT": MLP[::-1]}).axes[0].patches]
    assert sorted(heights) == [25, 50, 75]
    assert heights == [25, 75, 50]


def test_without_a_target_there_is_no_line() -> None:
    figure = activation_figure({"DyT": MLP})
    assert targets(figure) == []
    assert legend(figure) == ["DyT: mean 50.0 %"]


def test_several_models_are_lines_of_their_own_colour_and_marker() -> None:
    figure = activation_figure({"a": MLP, "b": MLP[:2], "c": MLP}, {"a": 0.5, "b": 0.7, "c": 0.5})
    drawn = [line for line in figure.axes[0].lines if line.get_gid() != "target"]
    assert [list(line.get_ydata()) for line in drawn] == [[25, 75, 50], [25, 75], [25, 75, 50]]
    assert len({to_rgb(line.get_color()) for line in drawn}) == len({line.get_marker() for line in drawn}) == 3
    assert targets(figure) == [70, 50]
    assert legend(figure) == [
        "a: mean 50.0 %",
        "b: mean 50.0 %",
        "c: mean 50.0 %",
        "target 70 % (b)",
        "target 50 % (a, c)",
    ]


def test_attention_and_mlp_are_series_of_their_own() -> None:
    figure = activation_figure({"DyT": BOTH}, {"DyT": 0.4})
    bars = figure.axes[0].patches
    assert [bar.get_height() for bar in bars] == pytest.approx([20] * 3 + [60] * 3)
    assert bars[0].get_facecolor() != bars[3].get_facecolor()
    assert legend(figure) == [
        "DyT, attention: mean 20.0 %",
        "DyT, MLP: mean 60.0 %",
        "DyT, all units: mean 40.0 %",
        "target 40 %",
    ]


def test_kinds_are_named_where_models_differ_in_them() -> None:
    figure = activation_figure({"a": MLP, "b": [("blocks.0", 0.5)]})
    assert legend(figure) == ["a, MLP: mean 50.0 %", "b, whole block: mean 50.0 %"]


def test_names_are_shown_as_they_are() -> None:
    figure = activation_figure({"_run $1$": MLP})
    figure.canvas.draw()
    assert legend(figure) == [" _run $1$: mean 50.0 %"]


@pytest.mark.parametrize("rates", [{}, {"linear": []}])
def test_nothing_to_draw_is_an_error(rates: dict) -> None:
    with pytest.raises(DyntuneError, match=r"give at least one model|linear gates no unit"):
        activation_figure(rates)


@pytest.mark.parametrize("share", [-0.1, 50.0, float("nan")])
def test_rates_are_shares(share: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        activation_figure({"DyT": [("blocks.0.mlp", share)]})


def test_a_target_belongs_to_a_model() -> None:
    with pytest.raises(ValueError, match=r"targets for \['dyt'\]"):
        activation_figure({"DyT": MLP}, {"dyt": 0.5})
