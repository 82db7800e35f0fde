"""States of unfinished runs: damage is noticed, what is no state of the run is refused, and nothing is run from it."""

import os

import pytest
import torch
from torch.utils.data import TensorDataset

import dyntune
from dyntune.core.errors import CheckpointError
from dyntune.training.state import STATE, RunState


@pytest.fixture
def run(make_host, images_for, tmp_path):
    """``run(**options)`` trains, or resumes, the same tiny run in ``tmp_path``."""
    data = TensorDataset(images_for(make_host(), 4), torch.arange(4) % 5)

    def run(**options):
        torch.manual_seed(0)
        model = dyntune.tune(make_host(), "dyt:bottleneck=2")
        dyntune.fit(model, data, data, out=tmp_path, epochs=1, batch_size=2, device="cpu", **options)
        return model

    run()
    return run


def test_a_changed_bit_of_any_number_is_noticed(run, tmp_path):
    held = torch.load(tmp_path / STATE, weights_only=True)
    content = (tmp_path / STATE).read_bytes()
    moment = held["optimizer"]["state"][0]["exp_avg"]
    for values in (held["tensors"]["host.head.bias"], held["best_tensors"]["host.head.weight"], moment):
        raw = values.numpy().tobytes()
        place = content.index(raw) + len(raw) // 2
        (tmp_path / STATE).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match="digests differ"):
            run(resume=True)
    (tmp_path / STATE).write_bytes(content)
    run(resume=True)


def test_states_of_earlier_versions_have_no_digest_and_are_read(run, tmp_path):
    held = torch.load(tmp_path / STATE, weights_only=True)
    del held["sha256"]
    torch.save(held, tmp_path / STATE)
    assert RunState.read(tmp_path).epoch == 1
    run(resume=True)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda held: held.update(epoch=7),
        lambda held: held.update(step=-1),
        lambda held: held.update(best=float("nan")),
        lambda held: held.update(best_epoch="1"),
        lambda held: held.update(identity={}),
        lambda held: held.update(tensors={}),
        lambda held: held.update(unknown=1),
        lambda held: held["tensors"].update(another=torch.zeros(1)),
        lambda held: held["tensors"].update({"host.head.bias": torch.zeros(6)}),
        lambda held: held["tensors"].update({"host.head.bias": torch.full((5,), torch.inf)}),
        lambda held: held["tensors"].update({"host.head.bias": torch.zeros(1).expand(10**12)}),
        lambda held: held["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
        lambda held: held["optimizer"]["state"][0].update(exp_avg_sq=torch.tensor(torch.nan)),
        lambda held: held["optimizer"]["param_groups"][0].update(weight_decay=0.5),
        lambda held: held["optimizer"]["param_groups"].clear(),
        lambda held: held["optimizer"].clear(),
        lambda held: held["course"].update({"blocks.0.mlp.dispatcher.forward": torch.zeros(1)}),
        lambda held: held["course"].update({"nowhere": torch.zeros(1)}),
    ],
)
def test_what_is_no_state_of_the_run_is_refused(run, tmp_path, spoil):
    held = torch.load(tmp_path / STATE, weights_only=True)
    del held["sha256"]
    spoil(held)
    torch.save(held, tmp_path / STATE)
    with pytest.raises(
        CheckpointError, match=r"another output folder|another folder|course of a training|pace of a gate"
    ):
        run(resume=True)


def test_a_pipe_in_its_place_is_not_waited_for(run, tmp_path):
    (tmp_path / STATE).unlink()
    os.mkfifo(tmp_path / STATE)
    with pytest.raises(CheckpointError, match="it is no file"):
        run(resume=True)
