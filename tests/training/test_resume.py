"""Runs that are really killed, as processes, and continued: they come to the same bits as one that was not."""

import signal
from pathlib import Path

import pytest
import torch
from processes import Command, SignalAt
from typer.testing import CliRunner

from dyntune.commands.main import app
from dyntune.model.adapter_folder import WEIGHTS
from dyntune.training.state import RunState

EPOCHS = 3
STEPS = 9
"""Of an epoch: 36 images in batches of 4."""

pytestmark = pytest.mark.slow


def _arguments(photos: Path, out: Path) -> list[str]:
    arguments = ["train", str(photos), "--out", str(out), "--method", "dyt:scale=1", "--epochs", str(EPOCHS)]
    return [*arguments, "--batch-size", "4", "--lr", "0.01", "--device", "cpu"]


def _finish(photos: Path, out: Path, *more: str) -> None:
    """Trains to the end in this process, where nothing is sent that would stop it."""
    done = CliRunner().invoke(app, [*_arguments(photos, out), *more])
    assert done.exit_code == 0, (done.output, done.exception)


@pytest.fixture(scope="module")
def uninterrupted(photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    _finish(photos, out)
    return out


def _assert_same_bits(first: Path, second: Path) -> None:
    a, b = RunState.read(first), RunState.read(second)
    assert (a.epoch, a.step) == (b.epoch, b.step) == (EPOCHS, 0)
    assert all(torch.equal(tensor, b.tensors[name]) for name, tensor in a.tensors.items())
    for index, entry in a.optimizer["state"].items():
        assert all(torch.equal(value, b.optimizer["state"][index][key]) for key, value in entry.items())
    assert (first / WEIGHTS).read_bytes() == (second / WEIGHTS).read_bytes()


def test_a_killed_run_continues_to_the_same_bits(photos, uninterrupted, tmp_path):
    out = tmp_path / "run"
    process = Command(_arguments(photos, out), tmp_path / "errors", SignalAt(STEPS + 4, signal.SIGKILL))
    assert process.ended()[0] == -signal.SIGKILL
    state = RunState.read(out)
    assert (state.epoch, state.step) == (1, 0)
    _finish(photos, out, "--resume")
    _assert_same_bits(uninterrupted, out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_inside_the_epoch_says_how_to_go_on_and_loses_nothing(photos, uninterrupted, tmp_path, number):
    out = tmp_path / "run"
    process = Command(_arguments(photos, out), tmp_path / "errors", SignalAt(STEPS + 4, number))
    status, errors = process.ended()
    assert status == 1
    assert "--resume" in errors and "Traceback" not in errors
    state = RunState.read(out)
    assert (state.epoch, state.step) == (1, 4), "the state was saved in the middle of an epoch"
    _finish(photos, out, "--resume")
    _assert_same_bits(uninterrupted, out)
