"""The search of learning rate and scale: what it tries, keeps, shares and hands on."""

import sys
from dataclasses import replace

import pytest
from rich.console import Console

from dyntune.core.errors import DivergenceError, TrainingError
from dyntune.parts.registry import resolve
from dyntune.studies.vtab import search
from dyntune.studies.vtab import train as training
from dyntune.studies.vtab.plan import Job
from dyntune.studies.vtab.results import read_result, read_search
from dyntune.studies.vtab.run import run_benchmark
from dyntune.studies.vtab.search import open_storage, require_optuna, search_job
from dyntune.studies.vtab.train import train_job

QUIET = Console(quiet=True)
optuna = pytest.importorskip("optuna")


def nothing(done):
    pass


def trials(plan):
    storage = open_storage(plan)
    return [trial for study in storage.get_all_studies() for trial in storage.get_all_trials(study._study_id)]


@pytest.mark.slow
def test_the_best_values_are_trained_with(make_plan, tmp_path):
    plan = make_plan(tmp_path / "run", ("adaptformer",), ("digits",), search=3, options={"epochs": 1})
    assert not run_benchmark(plan, console=QUIET).failures
    found = read_search(Job("adaptformer", "digits", None), plan.out)
    tried = trials(plan)
    assert found.trials == len(tried) == 3
    assert tried[0].params == {"lr": 1e-3, "scale": 0.1}  # the recipe itself
    assert all(1e-4 <= trial.params["lr"] <= 1e-2 for trial in tried)
    best = max(tried, key=lambda trial: trial.value)
    assert found.accuracy == best.value
    assert (found.lr, found.scale) in [(t.params["lr"], t.params["scale"]) for t in tried if t.value == best.value]
    result = read_result(Job("adaptformer", "digits", 0), plan.out)
    assert result.lr == found.lr
    assert result.trained_spec == ("adaptformer" if found.scale == 0.1 else f"adaptformer:scale={found.scale:g}")


@pytest.mark.parametrize(
    ("spec", "first"),
    [
        ("full", {"lr": 1e-4}),  # a tenth, as without a search
        ("lora+adaptformer", {"lr": 1e-3}),  # two scales, 1 and 0.1
        ("lora:scale=3+dispatch:rate=0.7", {"lr": 1e-3, "scale": 3.0}),
    ],
)
def test_the_first_trial_is_what_a_run_without_a_search_trains(make_plan, tmp_path, monkeypatch, spec, first):
    def caught(module, plan):
        """The method and settings that the first training is given."""
        seen = []

        def train(spec, data, plan, settings, out, progress):
            seen.append((resolve([spec]), replace(settings, seed=0)))
            raise KeyboardInterrupt

        monkeypatch.setattr(module, "train_one", train)
        with pytest.raises(KeyboardInterrupt):
            work, jobs = (train_job, plan.jobs()) if module is training else (search_job, plan.searches())
            work(jobs[0], plan, nothing)
        return seen

    searched = make_plan(tmp_path / "a", (spec,), ("digits",), search=2)
    searched.take_folder()
    assert caught(search, searched) == caught(training, make_plan(tmp_path / "b", (spec,), ("digits",)))
    (trial,) = trials(searched)
    assert trial.params == pytest.approx(first)
    centre, (low, high) = first["lr"], (trial.distributions["lr"].low, trial.distributions["lr"].high)
    assert (low, high) == pytest.approx((centre / 10, centre * 10))
    if "scale" in first:
        assert trial.distributions["scale"].choices == (0.01, 0.1, 1.0, 3.0, 10.0, 100.0)


def test_a_search_goes_on_and_counts_what_others_tried(make_plan, tmp_path, monkeypatch):
    address = f"sqlite:///{tmp_path / 'shared.db'}"
    done = []

    def train(spec, data, plan, settings, out, progress):
        done.append((spec, settings.lr))
        if len(done) == 2:
            raise DivergenceError("the loss is not finite")
        if len(done) == 3:
            raise KeyboardInterrupt
        return None, None

    class Accuracy:
        accuracy = 0.5

    monkeypatch.setattr(search, "train_one", train)
    monkeypatch.setattr(search, "evaluate", lambda *_, **__: Accuracy)
    first = make_plan(tmp_path / "one", ("linear",), ("digits",), search=4, storage=address)
    job = first.searches()[0]
    with pytest.raises(KeyboardInterrupt):
        search_job(job, first, nothing)
    second = make_plan(tmp_path / "two", ("linear",), ("digits",), search=4, storage=address)
    result = search_job(second.searches()[0], second, nothing)
    assert result.trials == 4 and result.accuracy == 0.5 and result.scale is None and len(done) == 5
    values = [trial.value for trial in trials(second) if trial.state.name == "COMPLETE"]
    assert sorted(values) == [0.0, 0.5, 0.5, 0.5]  # training that diverges scores nothing
    assert search_job(job, first, nothing).lr == result.lr and len(done) == 5
    other = make_plan(tmp_path / "three", ("linear",), ("digits",), search=1, storage=address, options={"epochs": 3})
    search_job(other.searches()[0], other, nothing)
    assert len(done) == 6  # other options are another study


def test_a_trial_that_fails_otherwise_than_by_diverging_fails_the_search(make_plan, tmp_path, monkeypatch):
    def train(*_):
        raise TrainingError("the training set is empty.")

    plan = make_plan(tmp_path, ("linear",), ("digits",), search=2, storage=f"sqlite:///{tmp_path / 'trials.db'}")
    monkeypatch.setattr(search, "train_one", train)
    with pytest.raises(TrainingError, match="set is empty"):
        search_job(plan.searches()[0], plan, nothing)
    assert [trial.state.name for trial in trials(plan)] == ["FAIL"]


def test_the_best_is_never_a_trial_that_diverged_and_without_another_there_is_none(make_plan, tmp_path, monkeypatch):
    class Nothing:
        accuracy = 0.0

    diverging, rates = {1, 2}, []

    def train(spec, data, plan, settings, out, progress):
        rates.append(settings.lr)
        if len(rates) in diverging:
            raise DivergenceError("the loss is not finite in epoch 1.")
        return None, None

    monkeypatch.setattr(search, "train_one", train)
    monkeypatch.setattr(search, "evaluate", lambda *_, **__: Nothing)
    address = f"sqlite:///{tmp_path / 'trials.db'}"
    plan = make_plan(tmp_path, ("linear",), ("digits",), search=2, storage=address)
    for _ in range(2):  # the same is said where nothing is left to be tried
        with pytest.raises(DivergenceError, match=r"every trial of the search \(2\).*lower --lr.*in epoch 1"):
            search_job(plan.searches()[0], plan, nothing)
    assert len(rates) == 2
    more = make_plan(tmp_path, ("linear",), ("digits",), search=3, storage=address)
    found = search_job(more.searches()[0], more, nothing)
    assert found.lr == rates[2] and found.accuracy == 0 and found.trials == 3


def test_a_failed_search_keeps_its_trainings_back(make_plan, tmp_path, monkeypatch):
    plan = make_plan(tmp_path / "run", ("linear",), ("digits",), search=1)
    monkeypatch.setattr(search, "train_one", lambda *_: 1 / 0)
    result = run_benchmark(plan, console=QUIET)
    assert list(result.failures) == plan.searches() and result.elsewhere == []


def test_without_optuna_or_a_database_the_error_says_what_to_do(make_plan, tmp_path, monkeypatch):
    plan = make_plan(tmp_path / "run", search=1, storage="nosuch://place/db")
    with pytest.raises(TrainingError, match=r"nosuch://place/db.*storage URL"):
        open_storage(plan)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(TrainingError, match=r"pip install optuna"):
        require_optuna()
