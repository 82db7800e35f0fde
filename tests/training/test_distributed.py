"""Several processes, as ``torchrun`` starts them: together they do what one does with the whole batch."""

import json
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
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "dyntune"]


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


_FIT = """
import json, sys
from pathlib import Path
import dyntune, timm, torch
from dyntune.parts.policies.surrogate import Surrogate
from dyntune.training.accelerator import is_main_process
from torch.utils.data import TensorDataset

data = TensorDataset(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2)
torch.manual_seed(0)
size = dict(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=2)
model = dyntune.tune(timm.models.VisionTransformer(**size), "dispatch")
with torch.no_grad():
    model.backbone.blocks[0].mlp.dispatcher.gate.bias.fill_(-30.0)
result = dyntune.fit(model, data, epochs=1, batch_size=4, device="cpu", lr=1e-9, min_lr=0, warmup_lr=0)
model.set_rate(0.5)
torch.manual_seed(1)
x, weight = torch.randn(2, 60, 16) + torch.randn(2, 1, 16), torch.randn(16, 16)
shared, whole = Surrogate(16, 4), Surrogate(16, 4)
own = x[0 if is_main_process() else 1]
shared.fit(own, own @ weight)
whole.fit(x, x @ weight)
same = [torch.allclose(shared(x, torch.ones(2, 60)), whole(x, torch.ones(2, 60)), atol=0.05)]
said = [model.calibration.to_dict(), [str(gate) for gate in result.closed], same]
Path(sys.argv[1], "main" if is_main_process() else "other").write_text(json.dumps(said))
"""


def test_every_process_is_told_what_one_has_found_after_the_training(tmp_path):
    (tmp_path / "fit.py").write_text(_FIT)
    command = [*LAUNCHER[:-2], str(tmp_path / "fit.py"), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    main, other = (json.loads((tmp_path / name).read_text()) for name in ("main", "other"))
    assert main == other and main[0]["images"] == 8
    assert main[2] == [True], "a surrogate is fitted to what all processes have seen"


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
    deadline = time.monotonic() + 600
    while not (out / STATE).exists() and all(process.running() for process in processes):
        assert time.monotonic() < deadline, "no epoch was completed"
        time.sleep(0.05)
    assert (out / STATE).exists(), [process.ended() for process in processes]
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
