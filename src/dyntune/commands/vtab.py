"""``dyntune vtab``: several methods and seeds on the tasks of VTAB-1K, and the table that papers print."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dyntune.commands.common import DEFAULT_MODEL, JsonOption, ModelOption, WeightsOption, pick_device
from dyntune.commands.console import out, print_json, print_table, space
from dyntune.commands.options import Options, with_options
from dyntune.core.errors import TrainingError
from dyntune.core.machine import machine
from dyntune.core.words import counted
from dyntune.parts.spec_list import split_specs
from dyntune.studies.noah import SearchSettings
from dyntune.studies.vtab.folders import find_folders
from dyntune.studies.vtab.plan import Plan
from dyntune.studies.vtab.recipes import RECIPES, Recipe, find_recipe
from dyntune.studies.vtab.report import describe, is_published
from dyntune.studies.vtab.run import BenchmarkResult, check_methods, failure_report, job_states, run_benchmark
from dyntune.studies.vtab.search import require_optuna
from dyntune.studies.vtab.table import terminal_rows
from dyntune.studies.vtab.tasks import open_benchmark
from dyntune.training.settings import Select, TrainSettings

EXAMPLES = (
    "dyntune vtab vtab-mini --methods linear,adaptformer:scale=1,dyt:rate=0.5 --epochs 20 --out runs/mini",
    "dyntune vtab data/vtab-1k --methods linear,dyt:rate=0.5 --seeds 0,1,2 "
    "--model vit_base_patch16_224.orig_in21k --weights ViT-B_16.npz --out runs/vtab",
    "dyntune vtab data/vtab-1k --methods dyt:rate=0.7 --tasks cifar,dtd --search 20 --out runs/searched --dry-run",
)


_RECIPES_OWN = "the recipe's"


@with_options
def command(
    root: Annotated[str, typer.Argument(help="Folder that holds the task folders, or vtab-mini, which is drawn.")],
    methods: Annotated[str, typer.Option(help="Specs separated by commas; + joins the parts of one.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for jobs and tables; what it holds is continued.")],
    *,
    model: ModelOption = DEFAULT_MODEL,
    weights: WeightsOption = None,
    tasks: Annotated[str | None, typer.Option(help="Task folders separated by commas; all by default.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds separated by commas; one decides head, order and noise.")] = "0",
    recipe: Annotated[
        str,
        typer.Option(
            help=f"How jobs are trained: {', '.join(RECIPES)}. A recipe is written for one checkpoint: ssf for the "
            "AugReg weights, the others for the original ImageNet-21k ones (docs/vtab.md)."
        ),
    ] = "dyt",
    select: Annotated[
        Select,
        typer.Option(
            help="last trains on 1,000 images and keeps the last epoch; val trains on 800 and picks the epoch on 200; "
            "test picks it on the test images, as most published numbers do."
        ),
    ] = "last",
    training: Annotated[
        dict[str, Any],
        Options(
            TrainSettings,
            only=("epochs", "batch_size", "lr", "weight_decay", "warmup_epochs", "precision", "workers", "device"),
            names={"workers": "readers"},
            unset={
                "epochs": _RECIPES_OWN,
                "batch_size": _RECIPES_OWN,
                "lr": _RECIPES_OWN,
                "weight_decay": _RECIPES_OWN,
                "warmup_epochs": "the recipe's, scaled with the epochs",
                "precision": "the recipe's, with fp32 for fp16 where there is no GPU",
            },
            make=dict,
        ),
    ],
    others: Annotated[
        dict[str, Any],
        Options(
            Recipe,
            only=("full_lr", "drop_path", "normalisation", "interpolation"),
            unset=dict.fromkeys(("full_lr", "drop_path", "normalisation", "interpolation"), _RECIPES_OWN),
            make=dict,
        ),
    ],
    trials: Annotated[dict[str, Any], Options(Plan, only=("search", "storage", "img_size"), make=dict)],
    noah: Annotated[
        SearchSettings,
        Options(
            SearchSettings,
            only=("population", "generations"),
            helps={
                "population": "Candidates of a generation of noah's search.",
                "generations": "Generations of noah's search.",
            },
            make=SearchSettings.of_halves,
        ),
    ],
    workers: Annotated[int, typer.Option(min=1, help="Jobs at a time, each in a process of its own.")] = 1,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed jobs again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check data and methods, list the jobs, stop.")] = False,
    json: JsonOption = False,
) -> None:
    """Train methods on every task of VTAB-1K with several seeds, and write the table: tasks, group means, MACs.

    A run that was stopped goes on with the same command; finished jobs are not run again.
    """
    if trials["search"]:
        require_optuna()
    elif trials["storage"] is not None:
        raise TrainingError("--storage is where --search keeps its trials, and does nothing without. Leave it out.")
    chosen = find_recipe(recipe).changed(select=select, noah=noah, **training, **others)
    specs = tuple(split_specs(methods))
    numbers = _seeds(seeds)
    whole, place = open_benchmark(root)
    benchmark = whole.choose(None if tasks is None else [t.strip() for t in tasks.split(",") if t.strip()])
    plan = Plan(
        out=folder,
        benchmark=benchmark,
        folders={},
        model=model,
        weights=weights,
        recipe=chosen.on(pick_device(chosen.settings.device)),
        specs=specs,
        seeds=numbers,
        whole=whole,
        **trials,
    )
    plan.require_folder()
    plan = replace(plan, folders=find_folders(benchmark, place))
    if dry_run:
        _list_jobs(plan, json)
        return
    result = run_benchmark(plan, workers=workers, retry_failed=retry_failed)
    _show(plan, result, json)
    if result.failures:
        raise TrainingError(failure_report(result.failures, plan))


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(seed) for seed in text.split(","))
    except ValueError:
        seeds = ()
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise TrainingError(f"seeds {text!r}: expected different whole numbers of at least 0, such as 0,1,2.")
    return seeds


def _list_jobs(plan: Plan, json: bool) -> None:
    check_methods(plan)
    states = job_states(plan, [*plan.searches(), *plan.jobs()])
    if json:
        rows = [{"method": j.spec, "task": j.task, "seed": j.seed, "state": state} for j, state in states]
        print_json({"benchmark": plan.benchmark.name, "jobs": rows})
        return
    for job, state in states:
        out.print(f"{state}: {job}", markup=False, highlight=False, soft_wrap=True)
    todo = sum(state == "to do" for _, state in states)
    tasks = len(plan.benchmark.tasks)
    out.print(
        f"the data of {counted(tasks, 'task')} is complete; {todo} of {counted(len(states), 'job')} to do",
        highlight=False,
    )


def _show(plan: Plan, result: BenchmarkResult, json: bool) -> None:
    if json:
        print_json(
            {
                "benchmark": plan.benchmark.name,
                "model": plan.model,
                "weights": None if plan.weights is None else plan.weights.name,
                "search": plan.search,
                "trained": describe(plan),
                "recipe": {"name": plan.recipe.name, **plan.recipe.identity()},
                "machine": machine(),
                "out": str(plan.out),
                "rows": [asdict(row) for row in result.rows],
                "failures": [{"job": str(job), **asdict(failure)} for job, failure in result.failures.items()],
                "elsewhere": [str(job) for job in result.elsewhere],
            }
        )
        return
    heads, rows = terminal_rows(result.rows, plan.benchmark, published=is_published(plan))
    space()
    print_table(f"{plan.benchmark.name} with {plan.model}", heads, rows)
    out.print(describe(plan), markup=False, highlight=False, soft_wrap=True)
    if result.elsewhere:
        out.print(f"being run by another command: {counted(len(result.elsewhere), 'job')}", highlight=False)
    added = len(plan.with_earlier().specs) - len(plan.specs)
    also = f", with {counted(added, 'method')} of earlier commands" if added else ""
    out.print(f"tables: {plan.out / 'table'}.csv, .md, .tex{also}; measured on {machine()}", highlight=False)
