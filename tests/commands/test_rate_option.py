"""``--rate`` of ``dyntune train``, ``eval``, ``predict`` and ``visualize``, and ``dyntune calibrate``."""

import json

import pytest
import torch
from typer.testing import CliRunner

import dyntune
from dyntune.backbones.builtin import BUILTIN_BACKBONE
from dyntune.commands.main import app
from dyntune.commands.train import with_rate
from dyntune.core.errors import DyntuneError, ExportError, SpecError
from dyntune.model.adapter_folder import CONFIG, EXPORTED
from dyntune.model.tune import build_tuned
from dyntune.parts.registry import resolve
from dyntune.studies import compare

CLASSES = ("blue", "green", "red")


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def report(*arguments):
    done = invoke(*arguments, "--device", "cpu", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


@pytest.fixture
def run(tmp_path):
    """An adapter whose gates are random, not calibrated."""
    torch.manual_seed(0)
    model = build_tuned(BUILTIN_BACKBONE, "dyt", classes=CLASSES)
    for name, parameter in model.named_parameters():
        if "dispatcher" in name or "up_proj" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.save(tmp_path / "run")


def test_a_run_is_calibrated_and_then_computes_what_it_is_asked_for(run, photos, tmp_path):
    done = invoke("eval", run, photos, "--rate", "0.3", "--device", "cpu")
    assert isinstance(done.exception, SpecError) and "dyntune calibrate RUN DATA" in str(done.exception)

    table = report("calibrate", run, photos, "--rates", "0.3/0.6", "--images", 9, "--batch-size", 4)
    assert table["images"] == 9
    assert [row["rate"] for row in table["rates"]] == [0.3, 0.6]
    assert [row["activation"] for row in table["rates"]] == pytest.approx([0.3, 0.6], abs=0.02)
    assert table["rates"][0]["macs"] < table["rates"][1]["macs"] < table["dense_macs"]
    assert json.loads((run / CONFIG).read_text())["calibration"]["rates"] == [0.3, 0.6]

    evaluated = [report("eval", run, photos, "--rate", rate) for rate in (0.3, 0.6)]
    assert [row["activation"] for row in evaluated] == pytest.approx([0.3, 0.6], abs=0.04)
    assert evaluated[0]["macs"] < evaluated[1]["macs"]

    red = photos / "test" / "red"
    predicted = [report("predict", run, red, *more)["predictions"] for more in ((), ("--rate", 0), ("--rate", 1))]
    assert predicted[0] != predicted[1] != predicted[2]
    done = invoke("visualize", run, red, "--out", tmp_path / "out", "--rate", 0.5, "--device", "cpu")
    assert done.exit_code == 0, done.output
    done = invoke("predict", run, red, "--rate", 0.9, "--device", "cpu")
    assert "between 0.3 and 0.6" in str(done.exception) and "--rates 0.3/0.6/0.9" in str(done.exception)
    done = invoke("calibrate", run, photos, "--rates", "0.9/0.6", "--images", 9, "--device", "cpu")
    assert "1 other rate before, which this replaces; to keep them too: --rates 0.3/0.6/0.9" in done.output
    done = invoke("visualize", run, red, "--out", tmp_path / "dotted", "--format", ".svg", "--device", "cpu")
    assert {path.name for path in (tmp_path / "dotted").iterdir()} == {"tokens-1.svg", "activation.svg"}


def test_train_takes_a_range_and_calibrates(photos, tmp_path):
    command = ("train", photos, "--method", "dyt:scale=1", "--rate", "0.3..0.9", "--out", tmp_path / "run")
    command += ("--epochs", 1, "--batch-size", 12)
    trained = report(*command)
    assert trained["method"] == "dyt:rate=0.3/0.9,scale=1"
    assert trained["calibrated_rates"] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    model = dyntune.load(tmp_path / "run")
    assert model.calibration.images == 12, "validation images"
    assert all(model.calibration.activation(rate) == pytest.approx(rate, abs=0.02) for rate in (0.1, 0.5, 0.9))
    config = (tmp_path / "run" / CONFIG).read_bytes()
    assert report(*command, "--resume")["calibrated_rates"] == trained["calibrated_rates"]
    assert (tmp_path / "run" / CONFIG).read_bytes() == config, "a finished run stays as it is"


def test_resume_calibrates_a_run_that_was_stopped_before_it(photos, tmp_path, monkeypatch):
    command = ("train", photos, "--out", tmp_path / "run", "--epochs", 1, "--batch-size", 12, "--device", "cpu")

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dyntune.training.calibration.calibrate", stop)
        assert invoke(*command).exit_code != 0
    assert dyntune.load(tmp_path / "run").calibration is None
    done = invoke(*command, "--resume")
    assert "calibrated on 12 images" in done.output
    assert dyntune.load(tmp_path / "run").calibration is not None


def test_train_without_gates_calibrates_nothing(photos, tmp_path):
    command = ("train", photos, "--method", "linear", "--out", tmp_path / "run", "--epochs", 1, "--batch-size", 12)
    assert report(*command)["calibrated_rates"] is None
    assert dyntune.load(tmp_path / "run").calibration is None


@pytest.mark.parametrize(
    ("specs", "rate", "expected"),
    [
        (["dyt:rate=0.5,scale=1"], "0.3", "dyt:rate=0.3,scale=1"),
        (["dyt"], "0.3..0.9", "dyt:rate=0.3/0.9"),
        (["adaptformer", "dispatch+tome:r=2"], "0.25..0.75", "adaptformer+dispatch:rate=0.25/0.75+tome:r=2"),
        (["dyt:rate=0.7"], None, "dyt:rate=0.7"),
    ],
)
def test_the_rate_goes_into_the_part_that_has_one(specs, rate, expected):
    assert with_rate(specs, rate) == resolve([expected])


@pytest.mark.parametrize(
    ("specs", "rate", "expected"),
    [
        (["adaptformer"], "0.3", "adaptformer has none"),
        (["dispatch:where=attn", "dispatch"], "0.3", "dispatch and dispatch"),
        (["dyt"], "half", "a share of the patches, 0.5, or a range"),
        (["dyt"], "0.3..", "a share of the patches, 0.5, or a range"),
        (["dyt"], "0.9..0.3", "lower one first"),
        (["dyt"], "1.5", "rate between 0 and 1"),
    ],
)
def test_rates_that_cannot_be_trained_for(specs, rate, expected):
    with pytest.raises(SpecError, match=expected):
        with_rate(specs, rate)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--rate", "0.9..0.3"), "lower one first"),
        (("--method", "dytt"), "Did you mean 'dyt'"),
        (("--policy", "tome:q=8"), "unknown option 'q'"),
        (("--stride", 4), "options of clips need --frames"),
        (("--frames", 4, "--views", "2x2"), "expected 1, the middle, or 3"),
    ],
)
def test_what_is_written_wrongly_is_said_before_data_are_read(monkeypatch, tmp_path, options, expected):
    monkeypatch.setattr("dyntune.commands.train.load_data", lambda *_, **__: pytest.fail("the data were read"))
    done = invoke("train", "digits", "--out", tmp_path / "run", *options)
    assert isinstance(done.exception, DyntuneError) and expected in str(done.exception), done.exception


def test_rates_that_cannot_be_read(run, photos):
    done = invoke("calibrate", run, photos, "--rates", "0.3,0.5")
    assert isinstance(done.exception, SpecError) and "written 0.3/0.5/0.7" in str(done.exception)


@pytest.mark.parametrize(
    "command",
    [
        "eval {} digits",
        "visualize {0} {0} --out pictures",
        "bench {}",
        "calibrate {} digits",
        "merge {} --out weights.safetensors",
        "export {} --out elsewhere",
        "train digits --teacher {} --out run",
    ],
)
def test_an_exported_folder_is_told_from_a_run(tmp_path, command):
    (tmp_path / EXPORTED).write_text("{}")
    done = invoke(*command.format(tmp_path).split())
    assert isinstance(done.exception, DyntuneError), (done.output, done.exception)
    assert f"{tmp_path} is an exported model" in str(done.exception)


def test_a_run_is_told_from_an_exported_folder(run):
    with pytest.raises(ExportError, match=r"is a run, which dyntune\.load reads"):
        dyntune.open_export(run)


def test_a_speed_comes_with_its_spread_and_takes_no_minutes(run, photos, monkeypatch):
    limits, real = [], compare.measure_throughput

    def measure(*given, limit, **named):
        limits.append(limit)
        return real(*given, **named)

    monkeypatch.setattr(compare, "measure_throughput", measure)
    table = report("eval", run, photos, "--split", "test", "--batch-size", 3)
    assert table["speedup_low"] <= table["speedup"] <= table["speedup_high"] and table["timed_batch"] == 3
    said = " ".join(invoke("eval", run, photos, "--device", "cpu").stdout.split())
    assert "in batches of 12 (" in said and "x dense, half of the rounds" in said
    assert len(limits) == 2 and 0 < max(limits) <= 20


def test_accuracy_is_said_before_the_timing_which_may_be_left_out(run, photos, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dyntune.commands.eval.compare_speed", stopped)
    assert "accuracy" in invoke("eval", run, photos, "--device", "cpu").stdout
    done = invoke("eval", run, photos, "--device", "cpu", "--no-speed")
    assert done.exit_code == 0 and "accuracy" in done.stdout and "per second" not in done.stdout
    found = report("eval", run, photos, "--no-speed")
    assert found["images"] == 12 and found["speedup"] is found["images_per_second"] is found["timed_batch"] is None
