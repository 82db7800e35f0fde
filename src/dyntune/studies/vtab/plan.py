"""The plan of a benchmark run: its jobs, and what must stay the same when it is continued."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from dyntune.core.digests import DIGITS, pieces_digest
from dyntune.core.errors import TrainingError
from dyntune.core.fields import Range, require_ranges
from dyntune.core.files import load_json, write_json
from dyntune.data.vtab import LISTS
from dyntune.parts.methods.noah import Noah
from dyntune.parts.registry import expand, part_from_dict, resolve
from dyntune.parts.spec import Part, format_spec
from dyntune.parts.spec_list import folder_name
from dyntune.studies.noah import SearchSettings
from dyntune.studies.vtab.recipes import Recipe
from dyntune.studies.vtab.tasks import Benchmark, Task

PLAN = "plan.json"


@dataclass(frozen=True)
class Job:
    """One piece of work: the training of a method on a task with a seed, or, without a seed, the search before it.

    Args:
        spec: the method as the user wrote it.
        task: the task's ``folder``.
        seed: of the training; None for a search.
    """

    spec: str
    task: str
    seed: int | None

    def folder(self, out: Path) -> Path:
        """Where everything about this job is kept, below the benchmark's folder."""
        kind = out / ("search" if self.seed is None else "jobs")
        place = kind / folder_name(self.spec) / self.task
        return place if self.seed is None else place / f"seed-{self.seed}"

    def __str__(self) -> str:
        return f"{self.spec} on {self.task}, {'search' if self.seed is None else f'seed {self.seed}'}"


@dataclass(frozen=True)
class Plan:
    """All that a worker needs to know.

    Args:
        out: the benchmark's folder.
        benchmark: with the tasks that are trained.
        folders: the task's folder of images by ``Task.folder``.
        model: timm name of the backbone.
        weights: local weight file of the backbone.
        recipe: how every job is trained.
        specs: the methods.
        seeds: of the trainings; a seed decides head, order and noise.
        search: trials of learning rate and adapter scale per method and task, on val200; 0 for none.
        storage: Optuna database URL of the search, which several machines may share; a file in the benchmark's folder
            by default.
        img_size: image height and width in pixels; the backbone's own by default.
        whole: the benchmark with all of its tasks, of which earlier commands may have trained others; by default those
            of ``benchmark``.
    """

    out: Path
    benchmark: Benchmark
    folders: dict[str, Path]
    model: str
    weights: Path | None
    recipe: Recipe
    specs: tuple[str, ...]
    seeds: tuple[int, ...]
    search: Annotated[int, Range(0)] = 0
    storage: str | None = None
    img_size: Annotated[int | None, Range(1)] = None
    whole: Benchmark | None = None

    def __post_init__(self) -> None:
        require_ranges(self, TrainingError)

    def task(self, name: str) -> Task:
        """The task whose folder is called ``name``."""
        return next(task for task in self.benchmark.tasks if task.folder == name)

    @property
    def backbone_arguments(self) -> dict[str, Any]:
        """How the backbone is built, beside its name and weights."""
        return {} if self.img_size is None else {"img_size": self.img_size}

    def jobs(self) -> list[Job]:
        """The trainings: seed by seed, so that a run that is stopped has whole columns."""
        tasks = [task.folder for task in self.benchmark.tasks]
        return [Job(spec, task, seed) for seed in self.seeds for spec in self.specs for task in tasks]

    def searches(self) -> list[Job]:
        """The searches that come before them."""
        pairs = [(spec, task.folder) for spec in self.specs for task in self.benchmark.tasks]
        return [Job(spec, task, None) for spec, task in pairs] if self.search else []

    @property
    def uses_noah(self) -> bool:
        """Whether the recipe's ``noah`` decides the outcome of a job."""
        return any(map(unsearched, self.specs))

    def options(self) -> dict[str, Any]:
        """What decides the outcome of every job, apart from its data."""
        recipe = self.recipe.identity()
        if not self.uses_noah:
            del recipe["noah"]
        return {
            "benchmark": self.benchmark.name,
            "model": self.model,
            "weights": None if self.weights is None else pieces_digest(self.weights),
            **recipe,
            "search": self.search,
            "img_size": self.img_size,
        }

    def methods(self) -> dict[str, list[dict[str, Any]]]:
        """What each method's spec stands for, every option with its value."""
        return {spec: [part.settled().to_dict() for part in expand(resolve([spec]))] for spec in self.specs}

    def with_earlier(self) -> Plan:
        """The plan with the tasks and methods of earlier commands in its folder too, behind its own."""
        recorded = self.require_folder()
        tasks = [*(task.folder for task in self.benchmark.tasks), *recorded.get("tasks", {})]
        specs = tuple(dict.fromkeys((*self.specs, *recorded.get("methods", {}))))
        return replace(self, benchmark=(self.whole or self.benchmark).choose(tasks), specs=specs)

    def seeds_of(self, spec: str) -> tuple[int, ...]:
        """The seeds that a method has been asked for, now or by earlier commands."""
        found = (self.out / "jobs" / folder_name(spec)).glob("*/seed-*")
        earlier = sorted(int(number) for folder in found if (number := folder.name.removeprefix("seed-")).isdecimal())
        return tuple(dict.fromkeys((*(self.seeds if spec in self.specs else ()), *earlier)))

    def lists(self) -> dict[str, str]:
        """A digest of every task's lists."""
        return {task.folder: lists_digest(self.folders[task.folder]) for task in self.benchmark.tasks}

    def digest(self, task: str) -> str:
        """Tells searches on a task apart that share a database."""
        # noah, which this search refuses, is in there because it is in the names of studies that are to be continued.
        noah = asdict(SearchSettings())
        same = self.options() | {"noah": noah, "search": None, "lists": lists_digest(self.folders[task])}
        return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:12]

    def take_folder(self) -> None:
        """Writes the plan to ``out``, or makes sure that the one in there is this one, and adds what is new.

        Tasks, methods and seeds may be added; data and weights may have been moved.

        Raises:
            TrainingError: ``out`` holds a run with other options, data or weights, or something else.
        """
        recorded, lists, methods = self.require_folder(), self.lists(), self.methods()
        tasks = recorded.get("tasks", {})
        changed = [f"{task} had other lists" for task, own in lists.items() if tasks.get(task, own) != own]
        if changed:
            raise self._other_run(changed)
        options = recorded | self.options()
        now = options | {"tasks": tasks | lists, "methods": methods | recorded.get("methods", {})}
        if now != recorded:
            write_json(self.out / PLAN, now)

    def require_folder(self) -> dict[str, Any]:
        """Makes sure that a run with these options and methods may begin or go on in ``out``; no data are looked at.

        Returns:
            What the run that is there has recorded; nothing if there is none.

        Raises:
            TrainingError: ``out`` holds a run with other options or weights, or in which a method stood for something
                else, or no run.
        """
        file = self.out / PLAN
        if not file.exists():
            if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
                raise TrainingError(f"{self.out} holds something else than a benchmark run; give another folder.")
            return {}
        try:
            before = load_json(file)
            known = {key: dict(before.get(key, {})) for key in ("tasks", "methods")}
            own = self.options()
            if known["methods"] and not any(_recorded_unsearched(parts) for parts in known["methods"].values()):
                own.pop("noah", None)  # nothing was searched by what is recorded of it
            changed = [f"{k} was {before.get(k)}, is {v}" for k, v in own.items() if before.get(k) != v]
            changed += [
                f"{spec} stood for {'+'.join(map(format_spec, parts))}"
                for spec, now in self.methods().items()
                if spec in known["methods"] and (parts := _settled(known["methods"][spec])) != _settled(now)
            ]
        except (ValueError, AttributeError, TypeError) as error:
            raise TrainingError(f"{file} is damaged ({error}); give another folder.") from error
        if changed:
            raise self._other_run(changed)
        return before | known

    def _other_run(self, changed: Sequence[str]) -> TrainingError:
        return TrainingError(
            f"the run in {self.out} was started differently: {'; '.join(changed)}. Use the same options, data and "
            "weights, or another folder."
        )


def unsearched(spec: str) -> Noah | None:
    """The part that a search must give sizes before it can be trained; None if the spec has none."""
    return next((part for part in resolve([spec]) if isinstance(part, Noah) and not part.searched), None)


def _recorded_unsearched(parts: Sequence[dict[str, Any]]) -> bool:
    """As ``unsearched``, of recorded parts."""
    return any(part.get("type") == Noah.name() and not part.get("prompts") for part in parts)


def _settled(parts: Sequence[dict[str, Any]]) -> list[Part]:
    """Recorded parts; options that are younger than the record have the values that they then had."""
    return [part_from_dict(part).settled() for part in parts]


def lists_digest(folder: Path) -> str:
    """Of a task's four lists: names of images and labels. The images themselves are not read."""
    digest = hashlib.sha256()
    for name in LISTS:
        content = (folder / f"{name}.txt").read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:DIGITS]
