"""Jobs that are interrupted, killed, failed, claimed by others, and run by several workers."""

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import asdict

import pytest
import torch
from filelock import FileLock
from rich.console import Console

import dyntune
from dyntune.core.errors import TrainingError
from dyntune.model.adapter_folder import WEIGHTS
from dyntune.studies.noah import SearchSettings
from dyntune.studies.vtab import jobs as running
from dyntune.studies.vtab.folders import ResizedImages
from dyntune.studies.vtab.jobs import LOCK, run_job, run_jobs, threads_each
from dyntune.studies.vtab.plan import Job
from dyntune.studies.vtab.results import TRACEBACK, JobResult, finished, read_failure, read_result
from dyntune.studies.vtab.run import JobDisplay, failure_report, remaining_seconds, run_benchmark
from dyntune.studies.vtab.train import with_scale
from dyntune.training.interrupt import TrainingInterrupted
from dyntune.training.state import STATE

QUIET = Console(quiet=True)
SPECS = ("linear", "dyt:rate=0.5,scale=1")


def nothing(done):
    pass


def outcome(plan):
    """Figures and weights of every job."""
    found = {}
    for job in plan.jobs():
        result = read_result(job, plan.out)
        adapter = job.folder(plan.out) / "run" / WEIGHTS
        found[job] = (result.accuracy, result.macs, result.activation, result.trainable_params, adapter.read_bytes())
    return found


@pytest.fixture(scope="module")
def one_worker(make_plan, tmp_path_factory):
    plan = make_plan(tmp_path_factory.mktemp("one") / "run", SPECS)
    result = run_benchmark(plan, console=QUIET)
    assert not result.failures and not result.elsewhere
    return plan


@pytest.fixture(autouse=True)
def _no_pictures(one_worker, monkeypatch):
    """Only the first run draws: pictures take longer than a job."""
    monkeypatch.setattr("dyntune.studies.pictures.style.save_figure", lambda figure, path: path)


@pytest.fixture
def quick_processes(monkeypatch):
    """Has workers begin as copies of one process that has imported everything, which each would do for seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dyntune.studies.vtab.run"])
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)


def test_a_run_leaves_results_tables_and_adapters(one_worker):
    names = {path.name for path in one_worker.out.iterdir()}
    assert names == {
        *("plan.json", "jobs", "table.csv", "table.md", "table.tex"),
        *("accuracy_over_macs.png", "accuracy_over_macs.svg"),
    }
    for job in one_worker.jobs():
        result = read_result(job, one_worker.out)
        assert result.epoch == 2 and result.lr == 1e-3 and result.seconds >= result.train_seconds > 0
        assert not (job.folder(one_worker.out) / "run" / STATE).exists()
    dense, gated = (read_result(Job(spec, "digits", 0), one_worker.out) for spec in SPECS)
    assert gated.macs < dense.macs and gated.trainable_params > dense.trainable_params == 0
    model = dyntune.load(Job(SPECS[1], "digits", 0).folder(one_worker.out) / "run")
    assert model.spec == "dyt:scale=1" and len(model.classes) == 10


def test_finished_jobs_are_not_run_again(one_worker, monkeypatch):
    monkeypatch.setattr("dyntune.studies.vtab.jobs.train_job", None)
    assert not run_benchmark(one_worker, console=QUIET).failures


@pytest.mark.slow
def test_two_workers_survive_a_kill_and_come_to_the_same_bits(one_worker, make_plan, quick_processes, tmp_path):
    plan = make_plan(tmp_path / "run", SPECS[::-1])  # so that jobs are left for the worker that takes over
    jobs = [job.folder(plan.out) / "run" for job in plan.jobs() if job.spec == SPECS[1]]
    before, killed = multiprocessing.active_children(), []

    def kill():
        deadline = time.monotonic() + 600
        while not killed and time.monotonic() < deadline:
            if any((run / STATE).exists() for run in jobs):
                for child in [child for child in multiprocessing.active_children() if child not in before][:1]:
                    os.kill(child.pid, signal.SIGKILL)
                    killed.append(child.pid)
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    result = run_benchmark(plan, workers=2, console=QUIET)
    killer.join()
    assert killed and len(result.failures) == 1
    report = failure_report(result.failures, plan)
    assert "SIGKILL" in report and "--retry-failed" in report and "smaller batches in another --out" in report
    assert sum(finished(job, plan.out) for job in plan.jobs()) == len(plan.jobs()) - 1
    assert "-" in (plan.out / "table.md").read_text()
    again = run_benchmark(plan, console=QUIET)
    assert again.failures == result.failures  # a failed job is not tried again unasked
    assert not run_benchmark(plan, retry_failed=True, console=QUIET).failures
    assert outcome(plan) == outcome(one_worker)


def test_an_interrupted_job_goes_on_from_its_state(one_worker, make_plan, tmp_path):
    plan = make_plan(tmp_path / "run", SPECS)
    job = Job(SPECS[1], "digits", 0)
    shares = []

    def stop_in_the_second_epoch(done):
        shares.append(done)
        if done > 0:
            os.kill(os.getpid(), signal.SIGINT)

    plan.take_folder()
    with pytest.raises(TrainingInterrupted):
        run_job(job, plan, stop_in_the_second_epoch)
    assert shares == [0, 0.5] and (job.folder(plan.out) / "run" / STATE).exists() and not finished(job, plan.out)
    shares.clear()
    assert run_job(job, plan, shares.append) == "done" and shares == [0.5]
    assert run_job(job, plan, shares.append) == "done" and shares == [0.5]
    before, now = (read_result(job, each.out) for each in (one_worker, plan))
    assert before.accuracy == now.accuracy and before.macs == now.macs


@pytest.mark.slow
def test_what_is_said_in_a_worker_is_said_by_the_process_that_started_it(make_plan, quick_processes, tmp_path, caplog):
    spec = "dynamicvit:keep=0.7/0.5,layers=1/2"  # which warns that there is no teacher
    plan = make_plan(tmp_path / "run", (spec,), ("digits",), options={"epochs": 1})
    assert not run_benchmark(plan, workers=2, console=QUIET).failures
    (record,) = [record for record in caplog.records if "teacher" in record.message]
    assert record.levelname == "WARNING" and record.name == "dyntune"
    assert record.message.startswith(f"{plan.jobs()[0]}: ")


@pytest.mark.slow
def test_workers_may_read_images_in_processes_of_their_own(make_plan, quick_processes, tmp_path):
    plan = make_plan(tmp_path / "run", SPECS[:1], ("digits",), options={"epochs": 1, "workers": 1})
    assert not run_benchmark(plan, workers=2, console=QUIET).failures


@pytest.mark.parametrize("select,readers", [("last", 0), ("test", 1)])
def test_training_images_that_are_kept_are_read_where_they_are_kept(make_plan, tmp_path, monkeypatch, select, readers):
    found = []

    def noted(*given, settings, **others):
        found.append(settings.workers)
        raise TrainingError("this is enough")

    monkeypatch.setattr("dyntune.studies.vtab.train.fit", noted)
    options = {"epochs": 1, "workers": 1, "select": select}
    plan = make_plan(tmp_path / "run", SPECS[:1], ("digits",), options=options)
    plan.take_folder()
    assert run_job(plan.jobs()[0], plan, nothing) == "failed" and found == [readers]


@pytest.mark.slow
def test_sigterm_stops_the_workers_and_says_how_to_go_on(make_plan, quick_processes, tmp_path):
    plan = make_plan(tmp_path / "run", SPECS[1:], options={"epochs": 200})
    runs = [job.folder(plan.out) / "run" / STATE for job in plan.jobs()]
    before = multiprocessing.active_children()

    def stop():
        deadline = time.monotonic() + 600
        while not all(run.exists() for run in runs) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(TrainingInterrupted, match=r"0 of 2 jobs finished.*saved their state"):
        run_benchmark(plan, workers=2, console=QUIET)
    stopper.join()
    assert all(run.exists() for run in runs) and {*multiprocessing.active_children()} <= {*before}
    assert (plan.out / "table.md").exists() and not any(read_failure(job, plan.out) for job in plan.jobs())


def test_a_failed_job_is_recorded_and_the_others_go_on(mini_root, make_plan, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(mini_root, root)
    plan = make_plan(tmp_path / "run", root=root)
    image = root / "digits" / "images" / "test" / "000000.jpg"
    whole = image.read_bytes()
    image.write_bytes(whole[:100])
    result = run_benchmark(plan, console=QUIET)
    job = Job("linear", "digits", 0)
    assert list(result.failures) == [job] and result.failures[job].kind == "DataError"
    assert "000000.jpg" in result.failures[job].error
    assert "Traceback" in (job.folder(plan.out) / TRACEBACK).read_text()
    assert finished(Job("linear", "cells", 0), plan.out)
    image.write_bytes(whole)
    assert not run_benchmark(plan, retry_failed=True, console=QUIET).failures


@pytest.mark.parametrize(
    ("cores", "torchs", "chosen", "each"),
    [
        (4, 32, False, {1: 4, 2: 2, 3: 1, 8: 1}),  # a container of four cores on a larger machine
        (8, 4, False, {1: 4, 2: 4, 4: 2}),
        (4, 8, True, {1: 8, 2: 2}),
    ],
)
def test_workers_share_the_cores_that_the_process_may_use(
    make_plan, tmp_path, monkeypatch, cores, torchs, chosen, each
):
    monkeypatch.setattr(running, "available_cores", lambda: cores)
    monkeypatch.setattr(running, "chosen_by_user", lambda: chosen)
    before = torch.get_num_threads()
    torch.set_num_threads(torchs)
    try:
        assert {workers: threads_each(workers) for workers in each} == each
        had = []
        monkeypatch.setattr(running, "run_job", lambda *_: had.append(torch.get_num_threads()) or "done")
        plan = make_plan(tmp_path / "run")
        with JobDisplay(plan, plan.jobs(), plan.jobs(), 1, QUIET) as display:
            run_jobs(plan.jobs(), plan, 1, display)
        assert set(had) == {each[1]} and torch.get_num_threads() == torchs
    finally:
        torch.set_num_threads(before)


def test_a_job_that_another_process_has_claimed_is_left_to_it(make_plan, tmp_path):
    plan = make_plan(tmp_path / "run", tasks=("digits",))
    plan.take_folder()
    (job,) = plan.jobs()
    job.folder(plan.out).mkdir(parents=True)
    with FileLock(job.folder(plan.out) / LOCK):
        assert run_job(job, plan, nothing) == "taken"
        assert run_benchmark(plan, console=QUIET).elsewhere == [job]
    assert run_job(job, plan, nothing) == "done"  # the file is still there, but nobody holds it


def test_a_folder_is_continued_with_the_same_options_only(one_worker, make_plan, tmp_path):
    with pytest.raises(TrainingError, match=r"lr was 0\.001, is 0\.01"):
        make_plan(one_worker.out, options={"lr": 1e-2}).take_folder()
    make_plan(one_worker.out, ("full",), ("fields",), seeds=(7,)).take_folder()  # more methods, tasks and seeds
    (tmp_path / "letter.txt").write_text("")
    with pytest.raises(TrainingError, match="something else"):
        make_plan(tmp_path).take_folder()


def test_a_folder_is_continued_only_where_its_methods_stand_for_the_same(make_plan, tmp_path):
    make_plan(tmp_path / "run", ("dyt:rate=0.5", "linear")).take_folder()
    file = tmp_path / "run" / "plan.json"
    recorded = json.loads(file.read_text())

    (adapter, dispatch) = recorded["methods"]["dyt:rate=0.5"]
    file.write_text(json.dumps(recorded | {"methods": {"dyt:rate=0.5": [adapter, dispatch | {"bias": 5.0}]}}))
    with pytest.raises(TrainingError, match=r"dyt:rate=0\.5 stood for .*bias=5.*Use the same"):
        make_plan(tmp_path / "run", ("dyt:rate=0.5",)).take_folder()
    make_plan(tmp_path / "run", ("linear", "full")).take_folder()
    assert set(json.loads(file.read_text())["methods"]) == {"dyt:rate=0.5", "linear", "full"}

    older = [adapter, {name: value for name, value in dispatch.items() if name != "where"}]  # without an option
    file.write_text(json.dumps(recorded | {"methods": {"dyt:rate=0.5": older}}))
    make_plan(tmp_path / "run", ("dyt:rate=0.5",)).take_folder()
    file.write_text(json.dumps({key: value for key, value in recorded.items() if key != "methods"}))
    make_plan(tmp_path / "run", ("dyt:rate=0.5",)).take_folder()


def test_sizes_of_noahs_search_count_where_it_is_among_the_methods(make_plan, tmp_path):
    few = {"options": {"noah": SearchSettings.of_halves(population=6)}}
    out, file = tmp_path / "run", tmp_path / "run" / "plan.json"
    make_plan(out, **few).take_folder()
    make_plan(out).take_folder()
    assert "noah" not in json.loads(file.read_text())

    # As they were recorded whatever the methods: continued with other sizes, with noah among the methods for once too.
    recorded = json.loads(file.read_text()) | {"noah": asdict(SearchSettings())}
    file.write_text(json.dumps(recorded))
    assert make_plan(out, **few).require_folder() == recorded
    make_plan(out, ("linear", "noah"), **few).take_folder()
    assert json.loads(file.read_text())["noah"]["population"] == 6

    make_plan(out).take_folder()
    assert json.loads(file.read_text())["noah"]["population"] == 6, "its jobs are there still"
    with pytest.raises(TrainingError, match=r"noah was .*'population': 6.*, is .*'population': 50"):
        make_plan(out, ("noah",)).take_folder()
    file.write_text(json.dumps({key: value for key, value in recorded.items() if key != "methods"}))
    with pytest.raises(TrainingError, match="noah was"):
        make_plan(out, ("noah",), **few).take_folder()

    # Studies are found by what they were called then.
    plan = make_plan(out)
    former = {name: value for name, value in recorded.items() if name not in ("tasks", "methods")}
    former |= {"search": None, "lists": plan.lists()["digits"]}
    digest = hashlib.sha256(json.dumps(former, sort_keys=True).encode()).hexdigest()[:12]
    assert plan.digest("digits") == make_plan(out, **few).digest("digits") == digest


def test_a_folder_is_continued_with_the_same_data_and_weights_only(mini_root, make_plan, tmp_path):
    weights = tmp_path / "a.npz"
    content = bytearray(range(256)) * 50_000
    weights.write_bytes(content)
    make_plan(tmp_path / "run", weights=weights).take_folder()

    data, moved = tmp_path / "data", tmp_path / "moved" / "b.npz"
    shutil.copytree(mini_root, data)
    moved.parent.mkdir()
    weights.rename(moved)
    plan = make_plan(tmp_path / "run", tasks=("digits", "fields"), root=data, weights=moved)
    plan.take_folder()  # moved, with a task more
    assert set(json.loads((tmp_path / "run" / "plan.json").read_text())["tasks"]) == {"digits", "cells", "fields"}

    study = plan.digest("digits")
    file = data / "fields" / "test.txt"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[::-1]))
    assert plan.digest("digits") == study
    with pytest.raises(TrainingError, match=r"differently: fields had other lists\. Use the same"):
        plan.take_folder()
    make_plan(tmp_path / "run", tasks=("digits",), root=data, weights=moved).take_folder()

    content[-1] ^= 1  # in the checksums at the end of an archive
    moved.write_bytes(content)
    assert plan.digest("digits") != study
    with pytest.raises(TrainingError, match="weights was 12800000 bytes, digest"):
        make_plan(tmp_path / "run", weights=moved).take_folder()


def test_a_line_without_an_estimate_ends_with_the_job(make_plan, tmp_path):
    plan = make_plan(tmp_path / "run")
    text = io.StringIO()
    with JobDisplay(plan, plan.jobs(), plan.jobs(), 1, Console(file=text)) as display:
        display.begun(plan.jobs()[0])
        display.ended(plan.jobs()[0], "taken")
    line, *rest = text.getvalue().splitlines()
    assert line == "1/2 linear on digits, seed 0: another command is at it"
    assert not any(rest)  # older releases of Rich end with an empty line


def test_a_damaged_result_is_named(one_worker, tmp_path):
    job = one_worker.jobs()[0]
    file = job.folder(tmp_path) / "result.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"spec": "linear"}))
    with pytest.raises(TrainingError, match=r"result\.json is damaged.*Remove it"):
        read_result(job, tmp_path)


def test_the_time_left_follows_the_jobs_of_the_same_method(make_plan, tmp_path):
    plan = make_plan(tmp_path / "run", SPECS, seeds=(0, 1))
    jobs = plan.jobs()
    assert remaining_seconds(jobs, set(jobs), plan, 1) is None
    for job, seconds in ((Job(SPECS[0], "digits", 0), 10.0), (Job(SPECS[1], "digits", 0), 30.0)):
        JobResult(job.spec, job.task, 0, 0.5, 1.0, 1.0, 0, job.spec, 1e-3, 2, seconds, seconds).write(
            job.folder(plan.out)
        )
    left = {job for job in jobs if not finished(job, plan.out)}
    assert remaining_seconds(jobs, left, plan, 1) == pytest.approx(3 * 10 + 3 * 30)
    assert remaining_seconds(jobs, left, plan, 2) == pytest.approx(60)


def test_images_kept_in_memory_are_the_same_pixels(one_worker):
    from dyntune.data.transforms import Preprocessing, build_transform
    from dyntune.studies.vtab.folders import load_task

    data = load_task(one_worker.task("cells"), one_worker.folders["cells"], "train800").train
    preprocessing = Preprocessing((48, 40), (0.5,) * 3, (0.5,) * 3, "bicubic")
    kept = ResizedImages(data, preprocessing).with_transform(build_transform(preprocessing))
    plain = data.with_transform(build_transform(preprocessing))
    for index in (0, 3, 3):
        assert kept[index][0].equal(plain[index][0]) and kept[index][1] == plain[index][1]
    assert kept.source(2) == data.source(2)


def test_scale_is_set_where_there_is_one():
    assert with_scale("dyt:rate=0.7", 10.0) == "dyt:rate=0.7,scale=10"
    assert with_scale("adaptformer+dispatch:rate=0.7", 1.0) == "adaptformer:scale=1+dispatch:rate=0.7"
    assert with_scale("linear", 1.0) == "linear" and with_scale("dyt:scale=learnable", 1.0) == "dyt:scale=learnable"
