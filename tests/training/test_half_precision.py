"""Models whose weights are in bf16 or fp16: whoever gives them images, these follow."""

import json
import math

import pytest
import torch
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import dyntune
from dyntune.backbones.builtin import BUILTIN_BACKBONE
from dyntune.backbones.hosts import create_backbone
from dyntune.commands.main import app
from dyntune.core.errors import TrainingError
from dyntune.training.evaluate import evaluate
from dyntune.training.interrupt import TrainingInterrupted
from dyntune.training.optimizer import make_optimizer
from dyntune.training.progress import Silent
from dyntune.training.settings import TrainSettings
from dyntune.training.trainer import fit

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 5
    tint = torch.randn(5, 3, generator=generator)[labels][:, :, None, None]
    return TensorDataset(tint + 0.3 * torch.randn(40, 3, 32, 32, generator=generator), labels)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_that_are_in_half_precision_themselves_are_not_scaled(make_host, dtype):
    model = dyntune.tune(make_host(), "adaptformer").to(dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(TrainingError, match=r"precision=fp16 .*in half precision already.*fp32 or bf16"):
        make_optimizer(trained, TrainSettings(precision="fp16"))
    make_optimizer(trained, TrainSettings(precision="bf16"))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_commands_take_a_run_in_half_precision(photos, tmp_path, dtype):
    host = create_backbone(BUILTIN_BACKBONE, num_classes=3)
    model = dyntune.tune(host, "adaptformer", "dispatch", "tome:r=2").to(dtype)
    model.classes = ("blue", "green", "red")
    model.save(tmp_path / "run")
    picture = str(photos / "test" / "red" / "0.png")

    def called(*words):
        done = CliRunner().invoke(app, [*map(str, words), "--device", "cpu"])
        assert done.exit_code == 0, (done.output, done.exception)
        return done.stdout

    top = json.loads(called("predict", tmp_path / "run", picture, "--json"))["predictions"][0]["top"]
    assert sum(row["probability"] for row in top) == pytest.approx(1, abs=1e-5)
    result = json.loads(called("eval", tmp_path / "run", photos, "--json"))
    assert result["images"] == 12 and math.isfinite(result["loss"]) and result["speedup"] > 0
    called("visualize", tmp_path / "run", picture, "--out", tmp_path / "pictures")
    assert len(list((tmp_path / "pictures").iterdir())) == 3


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("spec", ["dyt:scale=1", "full"])
def test_it_is_trained_by_changes_that_its_own_precision_would_lose(make_host, data, dtype, spec):
    """As well as the same model in fp32, nearly."""
    losses = []
    for precision in (torch.float32, dtype):
        torch.manual_seed(0)
        model = dyntune.tune(make_host(), spec).to(precision)
        before = evaluate(model, data).loss
        fit(model, data, epochs=6, batch_size=10, lr=1e-3, device="cpu")
        assert {p.dtype for p in model.parameters()} == {precision}
        losses.append(evaluate(model, data).loss - before)
    assert losses[0] < 0 and losses[1] == pytest.approx(losses[0], rel=0.25)


class _Stop(Silent):
    def saved(self, epoch, folder):
        raise KeyboardInterrupt


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_it_resumes_to_the_same_bits(make_host, data, tmp_path, optimizer):
    options = {"epochs": 2, "batch_size": 10, "device": "cpu", "optimizer": optimizer, "accumulate": 2}

    def model():
        torch.manual_seed(0)
        return dyntune.tune(make_host(), "dyt").to(torch.bfloat16)

    whole, parts = model(), model()
    fit(whole, data, **options)
    with pytest.raises((KeyboardInterrupt, TrainingInterrupted)):
        fit(parts, data, out=tmp_path / "run", progress=_Stop(), **options)
    again = model()
    fit(again, data, out=tmp_path / "run", resume=True, **options)
    assert all(torch.equal(p, again.tuned_state()[name]) for name, p in whole.tuned_state().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_images_of_another_precision_are_taken(make_host, images_for, dtype):
    model = dyntune.tune(make_host(), "dyt").eval()
    images = images_for(model.backbone.host, 2).to(dtype)
    assert torch.equal(model(images), model(images.float()))
