"""The folder of a run: nothing is saved over its adapter unasked, and what does not belong to it is noticed."""

import pytest
import torch
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import dyntune
from dyntune.commands import compare, noah, train
from dyntune.commands.main import app
from dyntune.core import files
from dyntune.core.errors import CheckpointError, TrainingError
from dyntune.model.adapter_folder import ASKED, STATE, WEIGHTS
from dyntune.parts.methods.noah import Noah
from dyntune.studies.noah import search_noah
from dyntune.training.run_folder import require_room, run_alone
from dyntune.training.settings import TrainSettings
from dyntune.training.state import RunState
from dyntune.training.trainer import fit

IMAGES = TensorDataset(torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 5)
SHORT = {"epochs": 1, "batch_size": 10, "device": "cpu"}


@pytest.fixture
def model(make_host):
    def make(seed=0, spec="adaptformer:bottleneck=2"):
        torch.manual_seed(seed)
        return dyntune.tune(make_host(), spec)

    return make


@pytest.fixture
def run(model, tmp_path):
    """The folder of a finished run."""
    fit(model(), IMAGES, out=tmp_path / "run", **SHORT)
    return tmp_path / "run"


def test_the_adapter_of_a_run_is_not_replaced_unasked(run, model):
    before = (run / WEIGHTS).read_bytes()
    with pytest.raises(CheckpointError, match=r"holds a run .*overwrite=True"):
        model(1).save(run)
    with pytest.raises(CheckpointError, match="overwrite=True"):
        model(1).save_pretrained(run)
    assert (run / WEIGHTS).read_bytes() == before
    model(1).save(run, overwrite=True)
    assert (run / WEIGHTS).read_bytes() != before


def test_an_adapter_that_was_saved_alone_is_replaced(model, tmp_path):
    model(0).save(tmp_path)
    model(1).save(tmp_path)


@pytest.mark.parametrize("other", ["adaptformer:bottleneck=2", "lora:rank=1"])
def test_a_run_does_not_go_on_from_another_adapter(run, model, other):
    model(1, other).save(run, overwrite=True)
    with pytest.raises(CheckpointError, match=r"is not the one that the run there has saved.*saved over it since"):
        fit(model(), IMAGES, out=run, resume=True, **SHORT)
    for name in (STATE, ASKED):  # what the message says
        (run / name).unlink()
    model(1, other).save(run)


def test_a_run_without_its_adapter_does_not_go_on(run, model):
    (run / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"cannot go on without the adapter .*safetensors is missing"):
        fit(model(), IMAGES, out=run, resume=True, **SHORT)


@pytest.mark.parametrize("host", ["plain", "swin"])
def test_a_run_goes_on_from_its_own(model, make_host, tmp_path, host):
    def fresh():
        torch.manual_seed(0)
        return dyntune.tune(make_host(host), "full", "dyt")

    fit(fresh(), IMAGES, out=tmp_path / "run", **SHORT)
    before = (tmp_path / "run" / WEIGHTS).read_bytes()
    fit(fresh(), IMAGES, out=tmp_path / "run", resume=True, **SHORT)
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == before


def test_a_run_goes_on_that_ended_between_an_adapter_and_its_state(model, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = SHORT | {"epochs": 2}
    fit(model(), IMAGES, out=whole, **settings)

    class Stop(Exception):
        pass

    def stopping(self, folder):
        if self.epoch == 2:
            raise Stop
        return write(self, folder)

    write = RunState.write
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(RunState, "write", stopping)
        fit(model(), IMAGES, out=broken, **settings)
    assert RunState.read(broken).epoch == 1
    fit(model(), IMAGES, out=broken, resume=True, **settings)
    assert (whole / WEIGHTS).read_bytes() == (broken / WEIGHTS).read_bytes()


def test_an_adapter_without_the_state_of_a_run_is_not_trained_over(run, model, tmp_path):
    model().save(tmp_path / "saved")
    longer = SHORT | {"epochs": 2}
    fit(model(), IMAGES, out=tmp_path / "longer", **longer)
    (tmp_path / "longer" / STATE).unlink()
    for place in (tmp_path / "saved", tmp_path / "longer"):
        before = (place / WEIGHTS).read_bytes()
        for resume in (False, True):
            with pytest.raises(
                TrainingError, match=rf"holds an adapter, and no state .*{STATE} is missing.*Give another"
            ):
                fit(model(), IMAGES, out=place, resume=resume, **longer)
        assert (place / WEIGHTS).read_bytes() == before
    (run / STATE).unlink()  # as if it had been killed behind the adapter of its first epoch
    assert fit(model(), IMAGES, out=run, resume=True, **SHORT).best_epoch == 1


def test_a_run_does_not_go_on_with_other_validation_images_or_frozen_weights(model, tmp_path):
    other = TensorDataset(IMAGES.tensors[0] + 1, IMAGES.tensors[1])
    settings = SHORT | {"epochs": 2, "select": "val"}
    fit(model(), IMAGES, IMAGES, out=tmp_path / "run", **settings)
    for val, said in ((None, "val_images was 10, is 0"), (other, "val_data was .*, is ")):
        with pytest.raises(TrainingError, match=said):
            fit(model(), IMAGES, val, out=tmp_path / "run", resume=True, **settings)
    changed = model()
    with torch.no_grad():
        changed.backbone.host.blocks[0].mlp.fc1.weight.mul_(2)
    with pytest.raises(TrainingError, match="frozen weights of the backbone have been changed"):
        fit(changed, IMAGES, IMAGES, out=tmp_path / "run", resume=True, **settings)
    fit(model(), IMAGES, IMAGES, out=tmp_path / "run", resume=True, **settings)


def test_room_is_a_folder_without_a_run_or_one_to_be_continued(run, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("")
    for place, resume, said in (
        (run, False, "holds a run already"),
        (tmp_path / "used", False, "is not empty"),
        (tmp_path / "file", False, "is a file"),
        (tmp_path / "file", True, "is a file"),
    ):
        with pytest.raises(TrainingError, match=said):
            require_room(place, resume)
    for place, resume in ((run, True), (tmp_path / "used", True), (tmp_path / "new", False)):
        require_room(place, resume)


@pytest.mark.parametrize(
    ("command", "place", "options", "where"),
    [
        ("train", train, (), ""),
        ("compare", compare, ("--methods", "linear,lora"), "lora"),
        ("noah", noah, (), ""),
    ],
)
def test_a_folder_is_refused_before_the_data_are_read(monkeypatch, run, tmp_path, command, place, options, where):
    out = tmp_path / "out"
    (out / where).parent.mkdir(exist_ok=True)
    run.rename(out / where)
    monkeypatch.setattr(place, "load_data", lambda *given, **named: pytest.fail("the data were read"))
    done = CliRunner().invoke(app, [command, "digits", "--out", str(out), *options])
    assert isinstance(done.exception, TrainingError) and "holds a run already" in str(done.exception)


def test_another_run_is_refused_before_anything_is_said_of_it(monkeypatch, caplog, photos, two_blocks, tmp_path):
    model = ("--model", "vit_two_blocks", "--weights", str(two_blocks), "--method", "linear", "--device", "cpu")
    words = ["train", str(photos), "--out", str(tmp_path / "run"), *model, "--batch-size", "12", "--resume", "--epochs"]
    assert CliRunner().invoke(app, [*words, "1"]).exit_code == 0
    done = CliRunner().invoke(app, [*words, "1"])
    assert done.exit_code == 0 and "is complete" in caplog.text
    monkeypatch.setattr(train, "show_header", lambda header: pytest.fail("a header was shown"))
    done = CliRunner().invoke(app, [*words, "2"])
    assert isinstance(done.exception, TrainingError) and "started differently: epochs was 1, is 2" in str(
        done.exception
    )


def test_two_searches_in_one_folder_are_one_too_many(monkeypatch, make_host, tmp_path):
    monkeypatch.setattr(files, "PATIENCE", 0.0)
    part = Noah(choices=(1,), depths=(1,))
    with run_alone(tmp_path), pytest.raises(TrainingError, match="another process is training in"):
        search_noah(part, lambda sized: pytest.fail("it began"), IMAGES, IMAGES, tmp_path, TrainSettings(**SHORT))
