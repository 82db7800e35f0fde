"""One adapter for many budgets: an elastic one, and one of a fixed rate, against an adapter trained for each rate.

    python benchmarks/elastic.py OUT

Trains the built-in backbone on the digits and two tasks of vtab-mini, as ``dyntune train`` does, sets the rates with
``set_rate``, and writes results.json, README.md and accuracy.png to OUT/results. The same command goes on where it was
stopped. ``--data`` takes a folder that ``write_vtab_mini`` has filled already.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from matplotlib.figure import Figure

import dyntune
from dyntune.backbones.builtin import BUILTIN_BACKBONE
from dyntune.core.files import write_json, write_text
from dyntune.core.machine import machine
from dyntune.data import DataSplits, load_data
from dyntune.data.drawn.vtab_mini import write_vtab_mini
from dyntune.model.tune import build_tuned
from dyntune.studies.pictures import save_figure
from dyntune.studies.pictures.style import COLOURS, INK, MARKERS, TEXT_SIZE, frame, new_figure
from dyntune.training.logs import read_log

RATES = (0.3, 0.5, 0.7, 0.9)
MIDDLE = 0.5
TRAINING = {
    "digits": {"epochs": 6, "batch_size": 32, "lr": 5e-3},
    "materials": {"epochs": 5, "batch_size": 16, "lr": 1e-2},
    "shapes_orientation": {"epochs": 5, "batch_size": 16, "lr": 1e-2},
}
KINDS = {
    "separate": "trained for each rate",
    "elastic": "one elastic adapter, 0.3 to 0.9",
    "recalibrated": f"one adapter trained for {MIDDLE}",
}
"""How a rate is had -> words for it. ``separate`` runs at its trained thresholds, the others through ``set_rate``."""


def train(out: Path, task: str, splits: DataSplits, name: str, seed: int) -> Path:
    """A finished run; ``name`` is its rate, or its range."""
    run = out / "runs" / f"{task}-{name.replace('/', '-')}-{seed}"
    torch.manual_seed(seed)
    model = build_tuned(BUILTIN_BACKBONE, f"dyt:rate={name}", classes=splits.classes)
    dyntune.fit(model, splits.train, splits.val, out=run, resume=True, seed=seed, device="cpu", **TRAINING[task])
    return run


def row(run: Path, splits: DataSplits, task: str, kind: str, rate: float, seed: int) -> dict:
    """One point of the figure: a run at one rate on the test images."""
    model = dyntune.load(run)
    if kind != "separate":
        model.set_rate(rate, splits.val)
    result = dyntune.evaluate(model, splits.test)
    return {
        "task": task,
        "kind": kind,
        "rate": rate,
        "seed": seed,
        "accuracy": result.accuracy,
        "activation": result.activation,
        "activation_per_unit": result.activation_per_unit,
        "macs": result.macs,
        "dense_macs": model.dense_macs,
        "images": result.images,
        "parameters": dyntune.cost(model).trainable_params,
        "steps": read_log(run)[-1]["step"],
    }


def measure(out: Path, vtab: Path, task: str, seed: int, rows: list[dict]) -> None:
    """Adds what is missing of one task and seed to ``rows`` and the results file, in the order in which it is ready."""
    splits = load_data(task if task == "digits" else f"vtab:{vtab / task}")
    middle, span = f"{MIDDLE:g}", f"{RATES[0]:g}/{RATES[-1]:g}"
    runs = {middle: [("separate", MIDDLE), *(("recalibrated", rate) for rate in RATES)]}
    runs[span] = [("elastic", rate) for rate in RATES]
    runs |= {f"{rate:g}": [("separate", rate)] for rate in RATES if rate != MIDDLE}
    for name, points in runs.items():
        have = {(r["task"], r["kind"], r["rate"], r["seed"]) for r in rows}
        todo = [(kind, rate) for kind, rate in points if (task, kind, rate, seed) not in have]
        run = train(out, task, splits, name, seed) if todo else None
        for kind, rate in todo:
            rows.append(row(run, splits, task, kind, rate, seed))
            print(*(f"{key} {rows[-1][key]}" for key in ("task", "kind", "rate", "accuracy", "activation")), flush=True)
            about = {"machine": machine(), "training": TRAINING}
            write_json(out / "results" / "results.json", {**about, "rows": rows})


def mean(rows: list[dict], key: str, **wanted: object) -> float:
    found = [r[key] for r in rows if all(r[name] == value for name, value in wanted.items())]
    return sum(found) / len(found)


def report(rows: list[dict]) -> str:
    """Markdown: accuracy, active patches and MACs of every rate, a table per task."""
    tasks, seeds = list(dict.fromkeys(r["task"] for r in rows)), sorted({r["seed"] for r in rows})
    parameters = {kind: next(r["parameters"] for r in rows if r["kind"] == kind) for kind in KINDS}
    lines = [
        "# One trained adapter, many budgets",
        "",
        f"`python benchmarks/elastic.py OUT`: the built-in backbone with `dyt` as it is by default, seed "
        f"{', '.join(map(str, seeds))}, the same epochs for every run. Accuracy on the test images, with the share of "
        "active patches and the MACs per image that really ran, as a share of the dense backbone's. The separate "
        "adapters run at their trained thresholds, the others through `set_rate`, calibrated on validation images.",
        f"Measured on {machine()}.",
        "",
        f"Trained parameters without the head: {parameters['separate']:,}; of the elastic adapter "
        f"{parameters['elastic']:,}, one more per gate.",
        "",
        "![accuracy over MACs](accuracy.png)",
    ]
    for task in tasks:
        titles = " | ".join(KINDS.values())
        lines += ["", f"## {task}", "", f"| rate | {titles} |", "| ---: |" + " --- |" * len(KINDS)]
        for rate in RATES:
            cells = []
            for kind in KINDS:
                point = {"task": task, "kind": kind, "rate": rate}
                share = mean(rows, "macs", **point) / mean(rows, "dense_macs", **point)
                cells.append(
                    f"**{mean(rows, 'accuracy', **point):.1%}** at {mean(rows, 'activation', **point):.1%} active, "
                    f"{share:.1%} MACs"
                )
            lines.append(f"| {rate:g} | {' | '.join(cells)} |")
    lines += ["", "Mean accuracy of the tasks:", "", f"| rate | {' | '.join(KINDS.values())} |"]
    lines.append("| ---: |" + " ---: |" * len(KINDS))
    for rate in (*RATES, None):
        wanted = {} if rate is None else {"rate": rate}
        cells = [f"{mean(rows, 'accuracy', kind=kind, **wanted):.1%}" for kind in KINDS]
        lines.append(f"| {'all' if rate is None else f'{rate:g}'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figure(rows: list[dict]) -> Figure:
    """Test accuracy over executed MACs, one panel per task, one line per way to have a rate."""
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    drawn = new_figure(2.9 * len(tasks), 3.2, layout="constrained")
    for index, task in enumerate(tasks):
        axes = drawn.add_subplot(1, len(tasks), index + 1)
        for number, (kind, words) in enumerate(KINDS.items()):
            points = [
                [mean(rows, key, task=task, kind=kind, rate=rate) for key in ("macs", "accuracy")] for rate in RATES
            ]
            axes.plot(
                [macs / 1e6 for macs, _ in points],
                [100 * accuracy for _, accuracy in points],
                color=COLOURS[number],
                marker=MARKERS[number],
                markersize=5,
                linewidth=1.2,
                label=words if index == 0 else None,
            )
        axes.set_title(task, color=INK, fontsize=TEXT_SIZE, loc="left")
        frame(axes, "MACs per image (M)", "test accuracy (%)" if index == 0 else "")
    drawn.legend(loc="outside lower center", ncols=len(KINDS), frameon=False, fontsize=TEXT_SIZE)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, help="vtab-mini of data seed 1; written to OUT/data by default")
    parser.add_argument("--tasks", nargs="+", default=list(TRAINING), choices=list(TRAINING))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    options = parser.parse_args()
    vtab = options.data or options.out / "data"
    if not vtab.exists():
        write_vtab_mini(vtab, seed=1)
    results = options.out / "results"
    file = results / "results.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    for seed in options.seeds:
        for task in options.tasks:
            measure(options.out, vtab, task, seed, rows)
    write_text(results / "README.md", report(rows))
    save_figure(figure(rows), results / "accuracy.png")


if __name__ == "__main__":
    main()
