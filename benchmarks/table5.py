"""Table 5 of the DyT paper at a small scale: token policies with full tuning, AdaptFormer and DyT, several seeds.

    python benchmarks/table5.py OUT

Runs ``dyntune compare`` with the built-in backbone on the digits and two tasks of vtab-mini, once per seed, and
averages. The same command goes on where it was stopped. Tokens are reduced as in the paper, scaled from 196 patches to
64: ToMe's r = 8 becomes 3, r = 7 becomes 2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from dyntune.data.drawn.vtab_mini import write_vtab_mini

EVIT, DYNAMICVIT = "evit:keep=0.7,layers=3/6/9", "dynamicvit:keep=0.9/0.7/0.5,layers=3/6/9"
METHODS = (
    "full",
    "adaptformer:scale=1",
    "dyt:rate=0.5",
    f"full+{EVIT}",
    f"adaptformer:scale=1+{EVIT}",
    "full+tome:r=3",
    "adaptformer:scale=1+tome:r=3",
    "dyt:rate=0.5+tome:r=2",
    f"full+{DYNAMICVIT}",
    f"adaptformer:scale=1+{DYNAMICVIT}",
    "adaptformer:scale=1+pyra",
    "adaptformer:scale=1+fpet",
    "adaptformer:scale=1+auto:budget=0.6",
)
TRAINING = {
    "digits": ["--epochs", "6", "--batch-size", "32", "--lr", "5e-3"],
    "materials": ["--epochs", "5", "--batch-size", "16", "--lr", "1e-2"],
    "shapes_orientation": ["--epochs", "5", "--batch-size", "16", "--lr", "1e-2"],
}
SEEDS = {"digits": [0, 1], "materials": [0, 1, 2], "shapes_orientation": [0, 1, 2]}
COMMON = ["--backbone-lr", "0.1", "--device", "cpu"]


def dyntune(*words: str) -> None:
    subprocess.run([str(Path(sys.executable).parent / "dyntune"), *words], check=True)


def run(out: Path, task: str, seed: int) -> list[dict]:
    """The rows of one comparison. DynamicViT learns from a fully tuned dense model."""
    data = task if task == "digits" else f"vtab:{out / 'data' / task}"
    options = [*TRAINING[task], *COMMON, "--seed", str(seed), "--resume"]
    teacher, folder = out / "teacher" / f"{task}-{seed}", out / "compare" / f"{task}-{seed}"
    if not (folder / "results.json").exists():
        dyntune("train", data, "--method", "full", "--out", str(teacher), *options)
        dyntune(
            "compare", data, "--methods", ",".join(METHODS), "--teacher", str(teacher), "--out", str(folder), *options
        )
    return json.loads((folder / "results.json").read_text())["rows"]


def mean(values: list[float], digits: int = 1) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(set(values)) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def table(runs: dict[str, list[list[dict]]]) -> str:
    """Markdown: accuracy per task, MACs and speed of all tasks together."""
    tasks = list(runs)
    lines = [
        f"| method | {' | '.join(tasks)} | trained parameters | MACs | speed |",
        f"| --- | {'---: | ' * len(tasks)}---: | ---: | ---: |",
    ]
    for index, first in enumerate(runs[tasks[0]][0]):
        rows = {task: [rows[index] for rows in runs[task]] for task in tasks}
        every = [row for task in tasks for row in rows[task]]
        accuracies = [mean([100 * row["test"]["accuracy"] for row in rows[task]]) for task in tasks]
        macs = mean([row["test"]["macs"] / 1e6 for row in every])
        speed = f"{statistics.median(row['speed']['speedup'] for row in every):.2f} x"
        cells = [f"`{first['method']}`", *accuracies, f"{first['trainable_params']:,}", f"{macs} M", speed]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="+", default=list(TRAINING), choices=list(TRAINING))
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of two on the digits and three on the others")
    options = parser.parse_args()
    # Another data seed than the one at which the difficulty of the tasks was set.
    if not (options.out / "data").exists():
        write_vtab_mini(options.out / "data", seed=1)
    runs = {task: [run(options.out, task, seed) for seed in options.seeds or SEEDS[task]] for task in options.tasks}
    (options.out / "table.md").write_text(table(runs))
    print(table(runs))


if __name__ == "__main__":
    main()
