"""Averages against the published table, and the files that tables are written to."""

import csv
import io

import pytest

from dyntune.core.errors import DyntuneError
from dyntune.studies.pictures.accuracy_macs import Point, accuracy_macs_figure
from dyntune.studies.vtab.published import comparable, published_row, published_rows, published_specs
from dyntune.studies.vtab.results import JobResult
from dyntune.studies.vtab.table import (
    group_means,
    mean_of_groups,
    method_row,
    terminal_rows,
    to_csv,
    to_latex,
    to_markdown,
)
from dyntune.studies.vtab.tasks import VTAB_1K, Benchmark, Task

BENCHMARK = Benchmark(
    "three", (Task("a", "A_1", "First", 2), Task("b", "B", "First", 2), Task("c", "C & D", "Second", 2))
)


def _result(spec, task, seed, accuracy, macs=2e9):
    return JobResult(spec, task, seed, accuracy, 0.5, macs, 1_000_000, spec, 1e-3, 3, 1.0, 2.0)


RESULTS = [
    _result("one:rate=0.5", task, seed, accuracy + seed / 10)
    for seed in (0, 1)
    for task, accuracy in (("a", 0.5), ("b", 0.7), ("c", 0.2))
] + [_result("two", "a", 0, 0.9, 4e9)]


@pytest.mark.parametrize("row", published_rows(), ids=lambda row: row.name)
def test_group_means_reproduce_the_published_mean(row):
    accuracy = {task.folder: row.tasks[task.published] for task in VTAB_1K.tasks}
    mean = mean_of_groups(group_means(VTAB_1K, accuracy))
    assert mean == pytest.approx(row.mean, abs=0.045)  # the printed tasks are rounded


def test_the_mean_is_that_of_groups_and_not_of_tasks():
    row = published_row("dyt:rate=0.5")
    groups = group_means(VTAB_1K, {task.folder: row.tasks[task.published] for task in VTAB_1K.tasks})
    assert groups == pytest.approx({"Natural": 82.186, "Specialized": 86.425, "Structured": 62.850}, abs=1e-3)
    assert mean_of_groups(groups) == pytest.approx(77.154, abs=1e-3)
    assert sum(row.tasks.values()) / 19 == pytest.approx(74.937, abs=1e-3)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("dyt", "DyT r=0.5"),
        ("dyt:rate=0.5,scale=1", "DyT r=0.5"),
        ("dyt:rate=0.7", "DyT r=0.7"),
        ("adaptformer:bottleneck=8", "AdaptFormer"),
        ("linear", "Frozen"),
        ("full", "Full tuning"),
        ("fact-tt", "FacT-TT"),
        ("fact-tt:rank=4,scale=10", "FacT-TT"),
        ("fact-tt:rank=64", None),
        ("lora", "LoRA"),
        ("lora:init=noah", "LoRA"),
        ("lora:rank=4", None),
        ("adapter:init=noah", "Adapter"),
        ("adapter:where=attn-mlp,init=noah", None),
        ("convpass:init=identity,scale=0.01", "ConvPass"),
        ("convpass:where=attn", None),
        ("vpt:prompts=50", "VPT"),
        ("dyt:rate=0.6", None),
        ("dyt:rate=0.5,dispatch=layer", None),
        ("adaptformer:bottleneck=64", None),
        ("adaptformer+dispatch", None),
        ("moe-adapter", None),
    ],
)
def test_a_spec_finds_its_published_row(spec, name):
    row = published_row(spec)
    assert (row and row.name) == name


def test_published_rows_go_with_their_tasks_and_backbone_only():
    assert comparable(VTAB_1K, "vit_base_patch16_224.augreg_in21k")
    assert not comparable(VTAB_1K, "vit_large_patch16_224") and not comparable(
        VTAB_1K.choose(["dtd"]), "vit_base_patch16_224"
    )
    assert comparable(VTAB_1K, "vit_base_patch16_224", 224) and not comparable(VTAB_1K, "vit_base_patch16_224", 384)


def test_rows_average_over_tasks_groups_and_seeds():
    row = method_row(BENCHMARK, "one:rate=0.5", (0, 1), RESULTS)
    assert row.seeds[0].groups == pytest.approx({"First": 0.6, "Second": 0.2}) and row.seeds[0].mean == pytest.approx(
        0.4
    )
    assert row.mean.mean == pytest.approx(0.45) and row.mean.std == pytest.approx(0.1 / 2**0.5)
    assert row.tasks["a"].mean == pytest.approx(0.55)
    assert (row.params, row.macs, row.activation) == (1_000_000, 2e9, 0.5)


def test_what_is_missing_is_a_dash_and_no_average_hides_it():
    row = method_row(BENCHMARK, "two", (0,), RESULTS)
    assert row.tasks["a"].mean == 0.9 and row.tasks["b"] is None
    assert row.groups == {"First": None, "Second": None} and row.mean is None and row.macs is None
    heads, lines = terminal_rows([row], BENCHMARK, published=False)
    assert (
        heads == ["", "two"]
        and lines[0] == ["A_1", "90.0"]
        and lines[1] == ["B", "-"]
        and lines[-1] == ["MACs (G)", "-"]
    )
    both = method_row(BENCHMARK, "two", (0, 1), RESULTS)
    assert both.tasks["a"] is None and both.seeds[0].tasks["a"] == 0.9


def test_csv_has_seeds_mean_and_deviation():
    rows = [method_row(BENCHMARK, spec, (0, 1), RESULTS) for spec in ("one:rate=0.5", "two")]
    lines = list(csv.DictReader(io.StringIO(to_csv(rows, BENCHMARK))))
    assert [(line["method"], line["seed"]) for line in lines[:4]] == [
        ("one:rate=0.5", "0"),
        ("one:rate=0.5", "1"),
        ("one:rate=0.5", "mean"),
        ("one:rate=0.5", "std"),
    ]
    assert float(lines[2]["mean"]) == pytest.approx(45.0) and float(lines[3]["mean"]) == pytest.approx(7.0711)
    assert lines[4]["b"] == "" and float(lines[4]["a"]) == 90


def test_markdown_and_latex_show_the_same_figures():
    rows = [method_row(BENCHMARK, spec, (0, 1), RESULTS) for spec in ("one:rate=0.5", "two")]
    markdown = to_markdown(rows, BENCHMARK, "vit", "Measured here.", published=False)
    assert (
        "| `one:rate=0.5` | mean | 55.0 ± 7.1 | 75.0 ± 7.1 |" in markdown
        and "45.00 ± 7.07 | 1.000 | 2.000 |" in markdown
    )
    assert "| `two` | 1 | - |" in markdown and "Measured here." in markdown and "Published" not in markdown
    latex = to_latex(rows, BENCHMARK, "Recipe of 100 %\nand more.")
    assert latex.startswith("% Recipe of 100 % and more.\n\\begin{tabular}")
    assert r"\texttt{one:rate=0.5} & 55.0 $\pm$ 7.1" in latex and r"A\_1" in latex and r"C \& D" in latex
    assert r"\cmidrule(lr){2-3} \cmidrule(lr){4-4}" in latex and latex.count(r"\\") == 4
    counts = {
        line.count("&") - line.count(r"\&") for line in latex.splitlines() if "texttt" in line or "rotatebox" in line
    }
    assert counts == {8}


def test_published_results_stand_beside_ours_on_the_full_benchmark():
    results = [_result("dyt", task.folder, 0, 0.5) for task in VTAB_1K.tasks]
    row = method_row(VTAB_1K, "dyt", (0,), results)
    markdown = to_markdown([row], VTAB_1K, "vit_base_patch16_224", "", published=True)
    assert "| `dyt` | DyT r=0.5 | 77.14 | 0.16 | 12.54 |" in markdown
    assert terminal_rows([row], VTAB_1K, published=True)[1][-1] == ["Mean, published", "77.14"]


def test_the_figure_has_a_marker_per_method_and_names_published_ones():
    ours = [Point("dyt:rate=0.5", 12.1e9, 0.76, 0.01), Point("linear", 17.5e9, 0.58)]
    published = [Point(row.name, row.gflops * 1e9, row.mean / 100) for row in published_rows()]
    figure = accuracy_macs_figure(ours, published)
    axes = figure.axes[0]
    assert sorted(text.get_text() for text in axes.texts) == sorted(row.name for row in published_rows())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["published", "dyt:rate=0.5", "linear"]
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    with pytest.raises(DyntuneError, match="nothing to draw"):
        accuracy_macs_figure([])


def test_every_published_spec_has_a_row_and_differences_in_counting_are_noted():
    rows = [published_row(spec) for spec in published_specs()]
    assert all(rows) and {"Frozen", "DyT r=0.9"} <= {row.name for row in rows}
    assert "54.3 %" in published_row("dyt").note and published_row("linear").note == ""
