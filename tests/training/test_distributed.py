"""Several processes, as ``torchrun`` starts them: together they do what one does with the whole batch."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import Command
from typer.testing import CliRunner

from dyntune.commands.main import app
from dyntune.training.logs import read_log
from dyntune.training.state import STATE, RunState

pytestmark = pytest.mark.slow
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "dyntune.commands.main"]


def _arguments(photos: Path, out: Path, batch_size: int, device: str = "cpu") -> list[str]:
    arguments = ["train", str(photos), "--out", str(out), "--method", "linear", "--epochs", "1", "--lr", "0.01"]
    return [*arguments, "--batch-size", str(batch_size), "--device", device, "--warmup-epochs", "0"]


def test_two_processes_train_like_one_with_twice_the_batch(photos, tmp_path):
    photos = Path(shutil.copytree(photos, tmp_path / "photos"))
    (photos / "val" / "red" / "0.png").unlink()
    alone = CliRunner().invoke(app, _arguments(photos, tmp_path / "one", 12))
    assert alone.exit_code == 0, (alone.output, alone.exception)
    command = [*LAUNCHER, *_arguments(photos, tmp_path / "two", 6, "auto")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("saved epoch") == 1, "only the main process speaks"
    one, two = (RunState.read(tmp_path / name) for name in ("one", "two"))
    assert {entry["step"].item() for entry in two.optimizer["state"].values()} == {3.0}
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(two.tensors[name], tensor, atol=1e-5, rtol=1e-4)
    # 11 validation images do not divide by two: each must count once.
    scores = [[r["accuracy"] for r in read_log(tmp_path / name) if r["kind"] == "val"] for name in ("one", "two")]
    assert scores[0] == scores[1]
    losses = [[r["loss"] for r in read_log(tmp_path / name) if r["kind"] == "val"] for name in ("one", "two")]
    assert abs(losses[0][0] - losses[1][0]) < 1e-4


def test_a_signal_to_one_process_stops_all_of_them_with_the_state_saved(photos, tmp_path):
    out = tmp_path / "run"
    arguments = ["train", str(photos), "--out", str(out), "--method", "dyt", "--epochs", "200", "--batch-size", "4"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    # Without a launcher, which would stop the other when one has ended.
    processes = [
        Command([*arguments, "--device", "cpu"], tmp_path / rank, RANK=rank, LOCAL_RANK=rank, **together)
        for rank in ("0", "1")
    ]
    deadline = time.monotonic() + 180
    while not (out / STATE).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    processes[1].send(signal.SIGTERM)
    for process in processes:
        status, errors = process.ended()
        assert status == 1 and errors.count("the state is saved") == 1
    state = RunState.read(out)
    assert state.epoch >= 1 and state.step >= 0


def test_what_is_wrong_is_the_last_that_torchrun_says(photos, tmp_path):
    """A corrupt image that one of the processes meets, while the other one waits for it."""
    photos = Path(shutil.copytree(photos, tmp_path / "photos"))
    spoilt = photos / "train" / "red" / "3.png"
    spoilt.write_bytes(spoilt.read_bytes()[:200])
    command = [*LAUNCHER, *_arguments(photos, tmp_path / "run", 6)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    last = [line for line in done.stderr.splitlines() if line.strip("= ")][-1]
    assert "traceback : error: " in last and str(spoilt) in last and "cannot be read as an image" in last
    assert "RuntimeError" not in done.stderr


def test_other_commands_are_refused_where_several_processes_would_do_the_same(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = CliRunner().invoke(app, ["compare", str(photos), "--methods", "linear", "--out", str(tmp_path / "runs")])
    assert "compare runs in one process" in str(found.exception) and not (tmp_path / "runs").exists()


def test_processes_that_cannot_train_together_do_not_train_apart(photos, tmp_path, monkeypatch):
    """Such as torchrun's on a device that Accelerate does not connect."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("dyntune.training.accelerator.Accelerator", _Alone)
    found = CliRunner().invoke(app, _arguments(photos, tmp_path / "run", 6, "auto"))
    assert "2 processes were started" in str(found.exception) and not (tmp_path / "run").exists()


class _Alone:
    num_processes, device = 1, torch.device("cpu")

    def __init__(self, **_):
        pass
