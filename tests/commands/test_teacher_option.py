"""``--teacher`` and ``--backbone-lr`` of ``dyntune train`` and ``dyntune compare``."""

import json

import pytest
import torch
from typer.testing import CliRunner

from dyntune.backbones.builtin import BUILTIN_BACKBONE
from dyntune.commands.main import app
from dyntune.core.errors import DataError
from dyntune.model.tune import build_tuned

SPEC = "dynamicvit:keep=0.7/0.5,layers=1/2"
SHORT = ("--epochs", "1", "--batch-size", "12", "--device", "cpu")


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def teacher_of(folder, classes):
    torch.manual_seed(0)
    build_tuned(BUILTIN_BACKBONE, "linear", classes=classes).save(folder)
    return folder


def test_train_and_compare_take_a_teacher_and_a_factor_for_the_backbone(photos, tmp_path, monkeypatch):
    # The pictures of the page do not matter here, and take long; nor do speeds.
    monkeypatch.setattr("dyntune.commands.compare.write_report", lambda folder, *_, **__: folder / "index.html")
    monkeypatch.setattr("dyntune.studies.compare.compare_speed", lambda *_: pytest.fail("timed in spite of --no-speed"))
    teacher = teacher_of(tmp_path / "teacher", ("blue", "green", "red"))
    options = (*SHORT, "--teacher", teacher, "--backbone-lr", "0.5")
    done = invoke("train", photos, "--method", SPEC, "--out", tmp_path / "run", *options, "--json")
    assert done.exit_code == 0, done.output
    done = invoke("compare", photos, "--methods", f"linear,{SPEC}", "--out", tmp_path / "many", *options, "--no-speed")
    assert done.exit_code == 0 and "test accuracy" in done.stdout and "img/s" not in done.stdout, done.output
    runs = (tmp_path / "run", next(tmp_path.glob("many/dynamicvit*")), tmp_path / "many" / "linear")
    for run in runs:
        asked = json.loads((run / "train.json").read_text())
        assert asked["settings"]["backbone_lr"] == 0.5
        assert (asked["teacher"] or "").startswith("linear ") == ("linear" not in run.name)


def test_a_run_that_ignores_its_teacher_is_resumed_with_it(photos, tmp_path):
    teacher = teacher_of(tmp_path / "teacher", ("blue", "green", "red"))
    words = ("train", photos, "--method", "linear", "--out", tmp_path / "run", *SHORT, "--teacher", teacher)
    assert invoke(*words).exit_code == 0
    done = invoke(*words, "--resume")
    assert done.exit_code == 0, done.exception


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_teacher_of_other_classes_is_refused(photos, tmp_path, command):
    teacher = teacher_of(tmp_path / "teacher", ("blue", "green", "pink"))
    methods = ("--method", SPEC) if command == "train" else ("--methods", SPEC)
    done = invoke(command, photos, *methods, "--out", tmp_path / "run", "--teacher", teacher, *SHORT)
    assert isinstance(done.exception, DataError)
    assert "was trained on 3 classes (blue, green, pink)" in str(done.exception)
    assert not (tmp_path / "run").exists()
