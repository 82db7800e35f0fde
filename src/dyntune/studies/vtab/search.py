"""The search of learning rate and adapter scale on ``val200``, with Optuna; several machines may share a database."""

from __future__ import annotations

import time
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dyntune.core.errors import DivergenceError, TrainingError, how_to_install
from dyntune.studies.vtab.folders import load_task
from dyntune.studies.vtab.plan import Job, Plan
from dyntune.studies.vtab.results import SearchResult
from dyntune.studies.vtab.train import EpochReport, Report, base_settings, own_scale, train_one, with_lr, with_scale
from dyntune.training.evaluate import evaluate
from dyntune.training.interrupt import TrainingInterrupted

if TYPE_CHECKING:
    import optuna

SCALES = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Those from which the published runs of ConvPass and FacT choose per task."""
LR_FACTOR = 10.0
"""Learning rates from a tenth of the method's own, without a search, to ten times it."""
_DIVERGED = "diverged"
"""Attribute of a trial whose training has diverged: what was said then."""


def require_optuna() -> Any:
    """The optuna module, with its chatter off.

    Raises:
        TrainingError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise TrainingError(f"a search needs Optuna: {how_to_install('search')}; or leave --search out.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_storage(plan: Plan) -> Any:
    """The database of the searches; made if it is not there.

    Raises:
        TrainingError: it cannot be opened.
    """
    optuna = require_optuna()
    address = plan.storage or f"sqlite:///{(plan.out / 'search.db').resolve()}"
    try:
        # SQLite's own patience is 5 seconds, which several workers can exceed.
        arguments = {"connect_args": {"timeout": 120}} if address.startswith("sqlite") else {}
        return optuna.storages.RDBStorage(address, engine_kwargs=arguments)
    except Exception as error:  # each database driver has errors of its own
        raise TrainingError(
            f"cannot open the database {address!r} ({type(error).__name__}: {error}). Expected an Optuna storage URL, "
            "such as sqlite:///FILE or postgresql://USER@HOST/NAME with its driver installed."
        ) from error


def search_job(job: Job, plan: Plan, report: Report) -> SearchResult:
    """Tries values until the study has ``plan.search`` finished trials, those of other machines among them.

    Each trial trains on ``train800`` with the first seed and scores the last epoch on ``val200``. The first trial has
    the values of a run without a search, so the best is never below it. A spec with several adapter scales keeps them;
    only its learning rate is searched. A training that diverges scores 0. What was interrupted is tried again.

    Raises:
        DivergenceError: all trials have diverged, so that there is nothing to train with.
        TrainingInterrupted: finished trials are kept.
    """
    optuna = require_optuna()
    began = time.perf_counter()
    name = f"{plan.benchmark.name} {job.spec} {job.task} {plan.digest(job.task)}"
    study = optuna.create_study(storage=open_storage(plan), study_name=name, direction="maximize", load_if_exists=True)
    complete, waiting = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.WAITING
    if not study.get_trials(deepcopy=False, states=[complete, waiting]):
        study.enqueue_trial(_first(job, plan))
    task = plan.task(job.task)
    data = load_task(task, plan.folders[task.folder], "train800")
    assert data.val is not None  # train800 leaves val200
    while (done := len(study.get_trials(deepcopy=False, states=[complete]))) < plan.search:
        # Seeded by what is known, so that an interruption does not change what is tried next.
        study.sampler = optuna.samplers.TPESampler(seed=zlib.crc32(f"{name} {done}".encode()))
        trial = study.ask()
        lr, scale = _suggest(trial, job, plan)
        settings = replace(with_lr(base_settings(job.spec, plan.recipe), lr), seed=plan.seeds[0], select="last")
        progress = EpochReport(report, done / plan.search, (done + 1) / plan.search)
        try:
            model, _ = train_one(with_scale(job.spec, scale), data, plan, settings, None, progress)
            accuracy = evaluate(model, data.val, batch_size=settings.batch_size, count_macs=False).accuracy
        except TrainingInterrupted:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(trial.params)
            raise
        except DivergenceError as error:
            accuracy = 0.0
            trial.set_user_attr(_DIVERGED, str(error))
        except BaseException:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            raise
        study.tell(trial, accuracy)
    tried = study.get_trials(deepcopy=False, states=[complete])
    scored = [trial for trial in tried if _DIVERGED not in trial.user_attrs]
    if not scored:
        rates = [trial.params["lr"] for trial in tried]
        raise DivergenceError(
            f"training diverged in every trial of the search ({len(tried)}), at learning rates from {min(rates):.2g} "
            f"to {max(rates):.2g}. Give a lower --lr in another --out. The first of them: "
            f"{tried[0].user_attrs[_DIVERGED]}"
        )
    best = max(scored, key=lambda trial: trial.value)
    return SearchResult(
        lr=best.params["lr"],
        scale=best.params.get("scale"),
        accuracy=best.value,
        trials=len(tried),
        seconds=time.perf_counter() - began,
    )


def _first(job: Job, plan: Plan) -> dict[str, float]:
    scale = own_scale(job.spec)
    return {"lr": base_settings(job.spec, plan.recipe).lr} | ({} if scale is None else {"scale": scale})


def _suggest(trial: optuna.Trial, job: Job, plan: Plan) -> tuple[float, float | None]:
    centre, own = base_settings(job.spec, plan.recipe).lr, own_scale(job.spec)
    lr = trial.suggest_float("lr", centre / LR_FACTOR, centre * LR_FACTOR, log=True)
    if own is None:
        return lr, None
    return lr, trial.suggest_categorical("scale", sorted({*SCALES, own}))
