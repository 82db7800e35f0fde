"""``dyntune bench`` end to end, each runtime in its own process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import dyntune
from dyntune.backbones.hosts import create_backbone
from dyntune.commands.main import app
from dyntune.core.errors import DyntuneError, SpecError
from dyntune.core.timing import Latency, Spread
from dyntune.model.rates import dispatchers
from dyntune.studies.bench import worker
from dyntune.studies.bench.measure import Row
from dyntune.studies.bench.plan import Plan
from dyntune.studies.bench.report import details, speed_figure, summary
from dyntune.studies.bench.run import Report, bench, estimate
from dyntune.studies.bench.worker import Measured, measure_runtime
from dyntune.studies.pictures import save_figure

QUICK = ("--rounds", "2", "--seconds", "0", "--threads", "1", "--device", "cpu")


def run_bench(*arguments, error=None):
    """Standard output of the command; with ``error``, the type of what it raises, the message."""
    done = CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"TERMINAL_WIDTH": "200"})
    if error is SystemExit:
        assert done.exit_code == 2, done.output
        return " ".join(done.output.replace("│", " ").split())
    if error is not None:
        assert isinstance(done.exception, error), done.output
        return str(done.exception)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


class InProcess:
    """What stands for subprocess where workers run in this process."""

    Popen: type
    PIPE = subprocess.PIPE
    stdin = None

    def __init__(self, command, **_):
        self.command, self.terminated = command, False

    def wait(self):
        return None if self.terminated else worker.main(self.command[3:])

    def terminate(self):
        self.terminated = True


InProcess.Popen = InProcess


in_proc = pytest.mark.skipif(
    not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="processes are found in Linux's /proc"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    model = dyntune.tune(create_backbone("vit_mini_patch4_32.dyntune", num_classes=10), "dyt:rate=0.7")
    for gate in dispatchers(model.backbone).values():
        torch.nn.init.zeros_(gate.gate.bias)  # so that images differ in what goes through
    return model.save(tmp_path_factory.mktemp("runs") / "digits")


@pytest.mark.slow
def test_a_fresh_model_beside_its_peers(tmp_path):
    report = json.loads(
        run_bench(
            *("--method", "dyt:rate=0.25", "--policy", "tome:r=2", "--against", "adaptformer,tome:r=8,gather"),
            *("--batch-size", "2,1", "--runtime", "eager,fast", "--plot", tmp_path / "speed.png"),
            *("--out", tmp_path / "out", "--json", *QUICK),
        )
    )
    assert report["method"] == "dyt:rate=0.25+tome:r=2" and report["model"] == "vit_mini_patch4_32.dyntune"
    assert report["runtimes"].keys() == {"eager", "fast"} and report["runtimes"]["eager"]["threads"] == 1
    assert report["plan"]["rounds"] == 2 and report["warm_up_calls"] == 4 and report["machine"] and report["date"]
    rows = {(row["runtime"], row["batch_size"], row["name"]): row for row in report["rows"]}
    names = ("dyt:rate=0.25+tome:r=2", "dense", "adaptformer", "tome:r=8", "gather")
    assert list(rows) == [(runtime, size, name) for runtime in ("eager", "fast") for size in (2, 1) for name in names]
    for (_, _, name), row in rows.items():
        assert row["images_per_second"]["median"] > 0 and row["device"] == "cpu"
        assert row["latency"]["p50"] <= row["latency"]["p90"] <= row["latency"]["p99"]
        assert row["difference"] < report["tolerance"]
        assert set(row["speedups"]) == set(names) - {name}
    # Of 64 patches less 2 per block, a quarter in whole patches of two images and of one.
    shares = [round((64 - 2 * i) * 2 / 4) / (64 - 2 * i) / 2 for i in range(1, 13)]
    assert rows["eager", 2, names[0]]["active"] == pytest.approx(sum(shares) / 12)
    assert rows["eager", 1, names[0]]["active"] == rows["fast", 1, "gather"]["active"]
    assert rows["eager", 1, "dense"]["macs_ratio"] == 1 and rows["fast", 2, names[0]]["macs_ratio"] > 1.4
    notes = " ".join(report["notes"])
    for words in ("gates set to 25% of the patches, untrained", "random weights", "noise", "2 rounds", "1 thread"):
        assert words in notes
    assert "on which gates" not in notes
    for picture in (tmp_path / "speed.png", tmp_path / "out" / "speed.png"):
        with Image.open(picture) as image:
            assert image.format == "PNG" and image.width > 500
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == report
    page = (tmp_path / "out" / "results.md").read_text()
    assert page.startswith("# dyt:rate=0.25+tome:r=2 on vit_mini_patch4_32.dyntune") and "| adaptformer |" in page


def measured(folder, **options):
    """One runtime of a plan, in this process, where a test needs no other."""
    plan = Plan(**({"rounds": 1, "seconds": 0.0, "threads": 1} | options))
    found = measure_runtime(plan, plan.runtimes[0], folder)
    return found.rows[0], " ".join(Report(plan, {plan.runtimes[0]: found}, "2020-02-02").notes)


def test_a_run_keeps_its_gates(run, tmp_path):
    options = {"run": str(run), "batch_sizes": (4,)}
    row, notes = measured(tmp_path, data="digits", **options)
    images = dyntune.data.load_data("digits").test
    found = dyntune.evaluate(
        dyntune.load(run), dyntune.data.ImageSubset(images, [len(images) * place // 4 for place in range(4)])
    )
    assert row.active == pytest.approx(found.activation) and row.macs == pytest.approx(found.macs)
    assert row.name == "dyt:rate=0.7" and "untrained" not in notes and "images: digits" in notes
    noise, notes = measured(tmp_path, **options)
    assert noise.active != row.active and "on which gates let other shares" in notes


def test_a_run_is_set_to_a_rate_on_the_timed_images(run, tmp_path):
    row, notes = measured(tmp_path, run=str(run), data="digits", rate=0.3, batch_sizes=(4,))
    assert row.active == pytest.approx(0.3, abs=0.02)
    assert "dyt:rate=0.7: set to a rate of 30%" in notes


def test_a_test_folder_of_some_classes_is_enough(run, photos, tmp_path):
    shutil.copytree(photos / "test" / "red", tmp_path / "photos" / "test" / "red")
    row, notes = measured(tmp_path, run=str(run), data=f"folder:{tmp_path / 'photos'}", batch_sizes=(4,))
    assert row.batch_size == 4 and f"images: folder:{tmp_path / 'photos'}" in notes


def test_the_command_prints_both_tables_and_the_notes(monkeypatch):
    monkeypatch.setattr("dyntune.commands.bench.bench", lambda plan, progress, **_: made_by_hand())
    text = " ".join(run_bench("--method", "dyt").split())
    for words in (
        "dyt on vit: images per second",
        "GMACs",
        "p99 ms",
        "memory MB",
        "1.30 x",
        "[1.17-1.43]",
        "a machine",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("--runtime", "onx"), DyntuneError, ("'onx'", "'onnx'", "torch-export")),
        (("--runtime", "eager,eager"), DyntuneError, ("runtimes", "each once")),
        (("--batch-size", "1,two"), DyntuneError, ("'1,two'", "whole numbers")),
        (("--batch-size", "0"), DyntuneError, ("at least 1",)),
        (("--rate", "1.5"), DyntuneError, ("1.5", "between 0 and 1")),
        (("--against", "dense,tom:r=8"), DyntuneError, ("'tom'", "tome")),
        (("--against", "gather", "--runtime", "torch-export"), DyntuneError, ("gather", "eager")),
        (("nowhere", "--model", "vit_base_patch16_224"), SystemExit, ("leave out --model",)),
        (("--pretrained", "--weights", "x.npz"), SystemExit, ("give one",)),
        (("--plot", "speed.jpg"), SystemExit, ("speed.jpg", ".png")),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_a_mistake_is_named(arguments, error, words):
    message = run_bench(*arguments, *QUICK, error=error)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": "digits", "batch_sizes": (9999,)}, "597 test images; a batch of 9999"),
        ({"against": ("dyt:rate=0.5",)}, "must differ"),
        ({"model": "vit_of_nobody"}, "no model 'vit_of_nobody'"),
    ],
    ids=["images", "itself", "model"],
)
def test_what_only_the_process_can_find_out(options, words, tmp_path):
    plan = {"model": "vit_mini_patch4_32.dyntune", "parts": ("dyt",)} | options
    with pytest.raises(DyntuneError, match=words):
        measured(tmp_path, **plan)


def test_the_error_of_the_process_is_that_of_the_command(monkeypatch):
    def here(command, **_):
        return SimpleNamespace(returncode=worker.main(command[3:]))

    monkeypatch.setattr("dyntune.studies.bench.run.subprocess.run", here)
    assert "nowhere" in run_bench("nowhere", *QUICK, error=DyntuneError)


def test_a_missing_library_is_named_before_anything_runs(monkeypatch):
    monkeypatch.setattr("dyntune.studies.bench.runtimes.importlib.util.find_spec", lambda name: None)
    with pytest.raises(DyntuneError, match="pip install openvino nncf"):
        Plan(runtimes=("eager", "openvino-int8"))


def test_a_process_that_dies_is_named(monkeypatch):
    monkeypatch.setattr("dyntune.studies.bench.run.sys.executable", "/bin/false")
    with pytest.raises(DyntuneError, match="measured eager ended with status 1"):
        bench(Plan(parts=("dyt",)))


def test_a_plan_is_read_as_it_was_written():
    plan = Plan(parts=("dyt", "tome:r=2"), against=("tome:r=8", "dense"), batch_sizes=(1, 8), rate=0.5)
    assert plan.against == ("dense", "tome:r=8")
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def made_by_hand():
    def row(runtime, batch, name, speed, ratio):
        spread = Spread(speed, 0.9 * speed, 1.1 * speed)
        speedups = {} if name == "dense" else {"dense": spread}
        latency = Latency(0.5, 0.6, 0.7, 30)
        return Row(
            runtime, "cpu", batch, name, 17e9 / ratio, ratio, None, spread, latency, None, speedups, speed / ratio, 0
        )

    def runtime(name):
        rows = [row(name, size, *rest) for size in (1, 8) for rest in (("dyt", 1.3, 1.4), ("dense", 1, 1))]
        return Measured(tuple(rows), "vit", "dyt", "a machine", 2, None, ())

    measured = {name: runtime(name) for name in ("eager", "onnx-int8")}
    gather = replace(measured["eager"].rows[0], name="gather", active=0.5, peak_memory=2_500_000)
    measured["eager"] = replace(measured["eager"], rows=(*measured["eager"].rows, gather))
    return Report(Plan(runtimes=("eager",)), measured, "2020-02-02")


def test_the_summary_looks_like_the_papers_table():
    columns, rows = summary(made_by_hand())
    assert columns[:4] == ("method", "active", "GMACs", "of dense")
    assert columns[4:] == tuple(f"{r}, cpu, batch {b}" for r in ("eager", "onnx-int8") for b in (1, 8))
    assert rows[0] == ("dyt", "-", "12.143", "71.4%", *["1.3 (1.30 x)"] * 4)
    assert rows[2] == ("gather", "50.0%", "12.143", "71.4%", "1.3 (1.30 x)", "-", "-", "-")


def test_details_are_in_milliseconds_and_megabytes():
    rows = details(made_by_hand())
    speeds = ("1.3", "1.30 x [1.17-1.43]", "0.93", "500.00", "600.00", "700.00", "30")
    assert rows[0] == ("eager", "1", "dyt", "-", "12.143", *speeds, "-", "0.0e+00")
    assert rows[4][2:4] == ("gather", "50.0%") and rows[4][12] == "2.5"


def test_int8_is_reported_apart():
    notes = made_by_hand().notes
    assert any("the logits are those of eager mode to 1e-03 of the largest" in note for note in notes)
    assert "difference of int8 logits to eager mode, nothing asked for: onnx-int8 0.0e+00" in notes
    assert "eager 2 threads, onnx-int8 2 threads" in notes


def test_the_picture_has_a_panel_per_batch_size_and_a_bar_per_row(tmp_path):
    report = made_by_hand()
    figure = speed_figure(report)
    assert [axes.get_title() for axes in figure.axes] == ["batch 1", "batch 8"]
    heights = [[patch.get_height() for patch in axes.patches if patch.get_height()] for axes in figure.axes]
    assert heights == [[1.3, 1.3, 1.3], [1.3, 1.3]]
    with Image.open(save_figure(figure, tmp_path / "speed.png")) as image:
        assert image.format == "PNG"


def test_an_exported_folder_is_refused_before_anything_is_planned(monkeypatch, tmp_path):
    monkeypatch.setattr("dyntune.commands.bench.estimate", lambda plan: pytest.fail("it was planned"))
    (tmp_path / "deploy.json").write_text("{}")
    assert "is an exported model" in run_bench(tmp_path, *QUICK, error=DyntuneError)


def test_a_measurement_that_was_stopped_goes_on_with_the_rest(monkeypatch, tmp_path):
    """Each batch size is on disk when it is measured; --resume measures the others alone, and of the same plan."""
    monkeypatch.setattr("dyntune.studies.bench.run.subprocess", InProcess)
    sizes, real = [], worker.measure

    def measure(entries, images, **options):
        if len(sizes) == 1:
            sizes.append("stopped")
            raise KeyboardInterrupt
        sizes.append(len(images))
        return real(entries, images, **options)

    monkeypatch.setattr(worker, "measure", measure)
    words = ("--method", "dyt", "--batch-size", "2,1", "--out", tmp_path / "out", "--json", *QUICK)
    message = run_bench(*words, error=DyntuneError)
    assert "--resume goes on" in message and sizes == [2, "stopped"]
    kept = json.loads((tmp_path / "out" / "measurements" / "eager.json").read_text())
    assert [row["batch_size"] for row in kept["rows"]] == [2, 2]
    message = run_bench(*words, "--rounds", "3", "--resume", error=DyntuneError)
    assert "another plan: rounds was 2, is 3" in message
    whole = (tmp_path / "out/measurements/eager.json").read_bytes()
    for damaged in (whole[:50], b"[" * 5000, b"[]"):
        (tmp_path / "out/measurements/eager.json").write_bytes(damaged)
        assert "eager.json cannot be read" in run_bench(*words, "--resume", error=DyntuneError)
    (tmp_path / "out/measurements/eager.json").write_bytes(whole)
    report = json.loads(run_bench(*words, "--resume"))
    assert sizes == [2, "stopped", 1]
    assert [row["batch_size"] for row in report["rows"]] == [2, 2, 1, 1]
    assert report["rows"][:2] == kept["rows"]
    assert "measurements, with which --resume goes on (eager.json)" in run_bench(*words, error=DyntuneError)
    monkeypatch.setattr("dyntune.studies.bench.run.machine", lambda threads: f"another, {threads}")
    assert "is another, 1" in run_bench(*words, "--resume", error=DyntuneError)
    assert sizes[3:] == [] and (tmp_path / "out/measurements/eager.json").read_bytes() != whole
    assert "--out" in run_bench("--resume", *QUICK, error=SystemExit)


def test_what_was_measured_before_an_error_stays(monkeypatch, tmp_path):
    monkeypatch.setattr("dyntune.studies.bench.run.subprocess", InProcess)
    real, failing = worker.measure, True

    def measure(entries, images, **options):
        if failing and len(images) == 1:
            raise MemoryError
        return real(entries, images, **options)

    monkeypatch.setattr(worker, "measure", measure)
    words = ("--method", "dyt", "--batch-size", "2,1", "--out", tmp_path / "out", "--json", *QUICK)
    assert "memory" in run_bench(*words, error=DyntuneError)
    kept = tmp_path / "out" / "measurements"
    assert sorted(path.name for path in kept.iterdir()) == ["eager.json", "plan.json"]
    before = json.loads((kept / "eager.json").read_text())["rows"]
    assert [row["batch_size"] for row in before] == [2, 2]
    assert "memory" in run_bench(*words, "--resume", error=DyntuneError)
    failing = False
    assert json.loads(run_bench(*words, "--resume"))["rows"][:2] == before


def test_how_long_it_will_take_is_said_beforehand(monkeypatch, run):
    monkeypatch.setattr("dyntune.studies.bench.run._macs_per_second", lambda: 1e9)
    short = {"run": str(run), "batch_sizes": (1,), "rounds": 10, "seconds": 0.0}
    large = {"model": "vit_base_patch16_224", "batch_sizes": (8, 32), "rounds": 10, "seconds": 0.0}
    seconds = 17.58 * 40 * 2 * 16  # both models, with what is run beside the rounds
    assert estimate(Plan(parts=("dyt",), **large)) == pytest.approx(seconds, rel=0.01)
    assert estimate(Plan(**short)) < 20 < estimate(Plan(**short | {"rounds": 100, "seconds": 0.2}))
    assert 0 < estimate(Plan(model="nobody's", **short | {"run": None})) < 20


def test_nothing_of_others_is_overwritten(tmp_path, monkeypatch, run):
    monkeypatch.setattr("dyntune.studies.bench.run._measured", lambda *given: pytest.fail("it measures"))
    (tmp_path / "measurements").mkdir()
    (tmp_path / "measurements" / "mine.json").write_text("{}")
    message = run_bench("--out", tmp_path, *QUICK, error=DyntuneError)
    assert "holds something else than measurements (mine.json)" in message
    (tmp_path / "results.json").write_text("{}")
    assert "holds results.json of something else" in run_bench("--out", tmp_path, *QUICK, error=SpecError)


def test_measurements_of_another_run_in_the_same_place(tmp_path, monkeypatch, run):
    monkeypatch.setattr("dyntune.studies.bench.run.subprocess", InProcess)
    monkeypatch.setattr("dyntune.commands.bench.write", lambda *given: None)
    own = shutil.copytree(run, tmp_path / "own")
    words = (own, "--batch-size", "1", "--out", tmp_path / "out", *QUICK)
    run_bench(*words)
    torch.manual_seed(1)
    model = dyntune.tune(create_backbone("vit_mini_patch4_32.dyntune", num_classes=10), "dyt:rate=0.7")
    model.save(own, overwrite=True)
    assert "another plan: run was" in run_bench(*words, "--resume", error=DyntuneError)


def test_a_rate_for_models_without_gates(monkeypatch):
    monkeypatch.setattr("dyntune.studies.bench.run.subprocess", InProcess)
    assert "none of these models has gates" in run_bench(
        "--method", "linear", "--rate", "0.3", *QUICK, error=DyntuneError
    )


@pytest.mark.slow
@in_proc
def test_sigterm_ends_the_worker_too(tmp_path):
    words = [sys.executable, "-m", "dyntune", "bench", "--out", str(tmp_path), "--rounds", "100000", "--threads", "1"]
    with subprocess.Popen([*words, "--device", "cpu"], stderr=subprocess.PIPE, text=True) as process:
        workers = _started(process)
        process.send_signal(signal.SIGTERM)
        assert "--resume goes on with it" in " ".join(process.stderr.read().split())
    assert process.returncode == 1 and workers and not any(map(_alive, workers)), "the command waits for its end"


def test_sigterm_while_a_worker_starts_ends_it(tmp_path, monkeypatch):
    started = []

    class Struck(InProcess):
        def __init__(self, command, **options):
            super().__init__(command, **options)
            started.append(self)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(InProcess, "Popen", Struck)
    monkeypatch.setattr("dyntune.studies.bench.run.subprocess", InProcess)
    message = run_bench("--method", "linear", "--out", tmp_path / "out", *QUICK, error=DyntuneError)
    assert "--resume goes on" in message and [process.terminated for process in started] == [True]


@pytest.mark.slow
@in_proc
def test_a_worker_does_not_outlive_a_command_that_was_killed(tmp_path):
    words = [sys.executable, "-m", "dyntune", "bench", "--out", str(tmp_path), "--rounds", "100000", "--threads", "1"]
    with subprocess.Popen([*words, "--device", "cpu"], stderr=subprocess.DEVNULL) as process:
        workers = _started(process)
        process.kill()
    assert workers and not _alive_after(workers, 300)  # which it looks at when it has imported what it needs


def _started(process):
    """The processes that measure for one that has been started, as soon as there is one."""
    end = time.monotonic() + 300
    while not (workers := _workers(process.pid)) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    return workers


def _workers(pid):
    """The processes of a process that measure."""
    try:
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(own) for own in listed if "bench.worker" in Path(f"/proc/{own}/cmdline").read_text()]
    except OSError:
        return []


def _alive_after(pids, seconds):
    """Those of some processes that have not ended within so many seconds."""
    end = time.monotonic() + seconds
    while (alive := [pid for pid in pids if _alive(pid)]) and time.monotonic() < end:
        time.sleep(0.1)
    return alive


def _alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")  # ended, but nobody has asked how
