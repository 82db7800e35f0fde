"""What eval, predict and train say of what they did beside what they were asked for."""

from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from dyntune.commands import common
from dyntune.commands.common import say_missed_rate, say_threads
from dyntune.commands.main import app
from dyntune.core import threads


@pytest.mark.parametrize(("activation", "said"), [(0.521, True), (0.519, False), (0.5, False), (0.479, True)])
def test_a_rate_that_is_missed_by_more_than_two_points_is_said(capsys, activation, said):
    say_missed_rate(activation, 0.5, "val images")
    text = " ".join(capsys.readouterr().err.split())
    assert (f"computed {activation:.1%} of the patches of the val images, aimed at 50.0%" in text) == said


def test_train_and_eval_say_it(photos, two_blocks, tmp_path):
    run = str(tmp_path / "run")
    few = ("--epochs", "1", "--batch-size", "36", "--lr", "1e-5", "--device", "cpu")
    model = ("--model", "vit_two_blocks", "--weights", str(two_blocks), "--method", "dyt:rate=0.2")
    done = CliRunner().invoke(app, ["train", str(photos), *model, "--out", run, *few])
    assert "of the val images, aimed at 20.0%" in " ".join(done.stderr.split()), done.stderr
    parts = [part.split()[0] for part in done.output.split("\n\n")]
    assert parts == ["backbone", f"{photos}:", "dyt:rate=0.2", "saved"], done.output
    assert f"\n{photos}: 3 classes\n" in done.output  # whole, wider than its table
    done = CliRunner().invoke(app, ["eval", run, str(photos), "--device", "cpu"])
    assert "of the test images, aimed at 20.0%" in " ".join(done.stderr.split()), done.stderr
    assert "\n\n" not in done.output and not done.output.startswith("\n")


@pytest.mark.parametrize(("images", "said"), [(64, "threads: 4 of 4 threads"), (63, "")])
def test_a_trial_of_threads_is_for_many_images(monkeypatch, capsys, images, said):
    for name in threads._ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_settled", False)
    monkeypatch.setattr(threads, "_AT_FIRST", torch.get_num_threads())
    monkeypatch.setattr(common, "settle_threads_for", lambda model: "4 of 4 threads")
    say_threads(SimpleNamespace(), images)
    assert capsys.readouterr().err.strip() == said


def test_who_has_set_the_threads_hears_nothing(monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    say_threads(SimpleNamespace(), 1000)
    assert not capsys.readouterr().err
