"""Runs that are really killed, as processes, and continued: they come to the same bits as one that was not."""

import signal
import time
from pathlib import Path

import pytest
import torch
from processes import Command
from typer.testing import CliRunner

from dyntune.commands.main import app
from dyntune.model.adapter_folder import WEIGHTS
from dyntune.training.state import STATE, RunState

EPOCHS = 3

pytestmark = pytest.mark.slow


def _arguments(photos: Path, out: Path) -> list[str]:
    arguments = ["train", str(photos), "--out", str(out), "--method", "dyt:scale=1", "--epochs", str(EPOCHS)]
    return [*arguments, "--batch-size", "4", "--lr", "0.01", "--device", "cpu"]


def _finish(photos: Path, out: Path, *more: str) -> None:
    """Trains to the end in this process, where nothing is sent that would stop it."""
    done = CliRunner().invoke(app, [*_arguments(photos, out), *more])
    assert done.exit_code == 0, (done.output, done.exception)


def _wait_for_epoch(process: Command, out: Path, epoch: int) -> None:
    """Waits until the run in ``out`` has completed ``epoch`` epochs and is inside the next one."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if not process.running():
            raise AssertionError(f"the run ended before it could be killed: {process.ended()}")
        if (out / STATE).exists() and RunState.read(out).epoch >= epoch:
            time.sleep(0.2)
            return
        time.sleep(0.05)
    raise AssertionError("the run never completed an epoch")


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
    process = Command(_arguments(photos, out), tmp_path / "errors")
    _wait_for_epoch(process, out, 1)
    process.send(signal.SIGKILL)
    assert process.ended()[0] == -signal.SIGKILL
    assert RunState.read(out).epoch < EPOCHS
    _finish(photos, out, "--resume")
    _assert_same_bits(uninterrupted, out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_inside_the_epoch_says_how_to_go_on_and_loses_nothing(photos, uninterrupted, tmp_path, number):
    out = tmp_path / "run"
    process = Command(_arguments(photos, out), tmp_path / "errors")
    _wait_for_epoch(process, out, 1)
    process.send(number)
    status, errors = process.ended()
    assert status == 1
    assert "--resume" in errors and "Traceback" not in errors
    state = RunState.read(out)
    assert state.epoch >= 1 and state.step > 0, "the state was saved in the middle of an epoch"
    _finish(photos, out, "--resume")
    _assert_same_bits(uninterrupted, out)
