"""``fit`` in Python does what the command line does: it shows what goes on, calibrates, and warns of closed gates."""

import json
import logging
import re

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import dyntune
from dyntune.core.errors import CheckpointError, DataError, SpecError, TrainingError
from dyntune.data import load_data
from dyntune.data.base import DataSplits
from dyntune.data.datasets import ArrayImages
from dyntune.model.cost import cost
from dyntune.training.closed_gates import closed_gates
from dyntune.training.progress import ProgressBar, Silent, display

SHORT = {"epochs": 1, "batch_size": 16, "lr": 1e-3, "device": "cpu"}


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(48, 3, 32, 32, generator=generator), torch.arange(48) % 5
    return TensorDataset(images[:32], labels[:32]), TensorDataset(images[32:], labels[32:])


@pytest.fixture(scope="module")
def splits():
    def images(count):
        return ArrayImages(torch.zeros(count, 32, 32, 3, dtype=torch.uint8).numpy(), [i % 5 for i in range(count)], "x")

    return DataSplits("squares", images(20), images(10), None, tuple("abcde"))


def test_a_run_is_shown_to_whoever_looks_on(make_host, data, capsys, monkeypatch):
    model = dyntune.tune(make_host(depth=1), "linear")
    dyntune.fit(model, *data, **SHORT)
    assert capsys.readouterr() == ("", ""), "nobody looks on"
    dyntune.fit(model, *data, progress=True, **SHORT)
    assert "linear epoch 1/1: loss" in capsys.readouterr().err
    monkeypatch.setattr(Console, "is_terminal", True)
    assert isinstance(display(None, "dyt"), ProgressBar) and isinstance(display(False, "dyt"), Silent)
    monkeypatch.setattr(Console, "is_terminal", False)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert isinstance(display(None, "dyt"), ProgressBar)
    own = Silent()
    assert display(own, "dyt") is own


def test_gates_are_calibrated_at_the_end(make_host, data, tmp_path, capsys):
    model = dyntune.tune(make_host(depth=2), "dyt")
    dyntune.fit(model, *data, out=tmp_path / "run", progress=True, **SHORT)
    assert "calibrating the gates for other rates on 16 images" in capsys.readouterr().err
    model.set_rate(0.3)
    assert abs(dyntune.evaluate(model, data[1]).activation - 0.3) < 0.03
    saved = dyntune.load(tmp_path / "run", backbone=make_host(depth=2)).calibration
    assert saved == model.calibration
    config = json.loads((tmp_path / "run" / "dyntune.json").read_text())
    again = dyntune.tune(make_host(depth=2), "dyt")
    dyntune.fit(again, *data, out=tmp_path / "run", resume=True, progress=True, **SHORT)
    assert "calibrating" not in capsys.readouterr().err, "a run that is complete has that already"
    assert again.calibration == saved and json.loads((tmp_path / "run" / "dyntune.json").read_text()) == config


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("yes", "calibrate='yes': expected True, False, or a data set"),
        (0.5, "calibrate=0.5: expected True, False, or a data set"),
        (iter([]), "the data set to calibrate on is a list_iterator, which is not read by index"),
        (TensorDataset(torch.zeros(0, 3, 32, 32), torch.zeros(0)), "the data set to calibrate on is empty"),
        (TensorDataset(torch.zeros(2, 3, 32, 20), torch.zeros(2)), "the first image of the data set to calibrate on"),
    ],
)
def test_what_to_calibrate_on_is_looked_at_before_the_training(make_host, data, tmp_path, given, words):
    model = dyntune.tune(make_host(depth=1), "dyt")
    with pytest.raises((DataError, TrainingError), match=re.escape(words)):
        dyntune.fit(model, *data, out=tmp_path / "run", calibrate=given, **SHORT)
    assert not (tmp_path / "run").exists()


def test_a_complete_run_is_calibrated_again_where_other_images_are_given(make_host, data, tmp_path):
    def calibration(images, resume=True):
        model = dyntune.tune(make_host(depth=1), "dyt")
        dyntune.fit(model, *data, out=tmp_path / "run", resume=resume, calibrate=images, **SHORT)
        return model.calibration

    assert calibration(None, resume=False) is None
    assert [calibration(images).images for images in (True, data[0], data[1])] == [16, 32, 32]
    assert dyntune.load(tmp_path / "run", backbone=make_host(depth=1)).calibration.images == 32


def test_calibrating_is_left_to_others_where_that_is_asked(make_host, data):
    model = dyntune.tune(make_host(depth=1), "dyt")
    dyntune.fit(model, *data, calibrate=False, **SHORT)
    assert model.calibration is None
    dyntune.fit(model, *data, calibrate=data[0], **SHORT)
    assert model.calibration.images == len(data[0])
    plain = dyntune.tune(make_host(depth=1), "linear")
    dyntune.fit(plain, *data, **SHORT)
    assert plain.calibration is None


class _Spoilt(Dataset):
    """Images that cannot be had, or that draw random numbers, once the training is over."""

    def __init__(self, data, fails):
        self.data, self.fails, self.over = data, fails, False

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if self.over:
            torch.rand(1)
        if self.over and self.fails:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return self.data[index]


@pytest.mark.parametrize("fails", [True, False])
def test_what_follows_the_training_neither_loses_it_nor_draws(make_host, data, tmp_path, caplog, monkeypatch, fails):
    sizes = []
    images = _Spoilt(data[1], fails)

    def looked(model, data, batch_size):
        images.over = True
        sizes.append(batch_size)
        return closed_gates(model, data, batch_size)

    monkeypatch.setattr("dyntune.training.trainer.closed_gates", looked)
    model = dyntune.tune(make_host(depth=1), "dyt")
    torch.manual_seed(3)
    with caplog.at_level(logging.WARNING, "dyntune"):
        dyntune.fit(model, data[0], images, out=tmp_path / "run", **SHORT)
    drawn = torch.rand(1)
    assert torch.equal(drawn, torch.rand(1, generator=torch.Generator().manual_seed(3))) and sizes == [16]
    said = [record.getMessage() for record in caplog.records if "memory" in record.getMessage()]
    assert len(said) == (2 if fails else 0) and (model.calibration is None) == fails
    assert dyntune.load(tmp_path / "run", backbone=make_host(depth=1)) is not None


def _gates(model, *biases):
    """Gates that let all patches through, or none, whatever they are."""
    with torch.no_grad():
        for block, bias in zip(model.backbone.blocks, biases, strict=True):
            nn.init.zeros_(block.mlp.dispatcher.gate.weight)
            block.mlp.dispatcher.gate.bias.fill_(bias)
    return model


def test_a_gate_that_has_closed_is_told_of_where_the_model_needs_it(make_host, data, caplog):
    model = _gates(dyntune.tune(make_host(), "dispatch:recipe=published,rate=0.7"), -30.0, 30.0, 30.0)
    with caplog.at_level(logging.WARNING, "dyntune"):
        result = dyntune.fit(model, *data, **SHORT | {"lr": 1e-9, "min_lr": 0, "warmup_lr": 0, "warmup_epochs": 0})
    (gate,) = result.closed
    assert gate.unit == "blocks.0.mlp" and gate.activation == 0 and gate.changed > 0.05
    said = [record.getMessage() for record in caplog.records if "has closed" in record.getMessage()]
    assert len(said) == 1 and "0% of the patches" in said[0] and "recipe=steady, another seed" in said[0]
    assert "70% were asked for" in said[0]


def test_a_gate_is_not_told_of_where_it_costs_nothing_or_was_asked_for(make_host, data):
    host = make_host()
    with torch.no_grad():
        for parameter in host.blocks[0].mlp.fc2.parameters():
            parameter.zero_()
    assert closed_gates(_gates(dyntune.tune(host, "dispatch"), -30.0, 30.0, 30.0), data[1]) == ()
    assert closed_gates(_gates(dyntune.tune(make_host(), "dispatch:rate=0.1"), *[-30.0] * 3), data[1]) == ()
    assert closed_gates(_gates(dyntune.tune(make_host(), "dispatch"), *[30.0] * 3), data[1]) == ()
    assert closed_gates(dyntune.tune(make_host(), "linear"), data[1]) == ()


def test_objects_say_what_people_want_to_know(make_host, data, splits):
    assert repr(splits) == "DataSplits(squares: 20 training, 10 validation images of 5 classes: a, b, c, d, e)"
    assert repr(splits.train) == "ArrayImages(20 images of 5 classes: a, b, c, d, e)"
    model = dyntune.tune(make_host(), "adaptformer:bottleneck=4+dispatch")
    figures = cost(model)
    assert repr(model) == (
        f"TunedModel(adaptformer:bottleneck=4+dispatch on VisionTransformer: {figures.trainable_params:,} trained "
        f"parameters and {figures.head_params} of the head; 5 classes without names)"
    )
    result = dyntune.fit(model, *data, **SHORT)
    assert repr(result).startswith(f"FitResult(best {result.best_accuracy:.2%} in epoch 1, 2 steps, ")
    model.classes = [f"kind {number}" for number in range(5)]
    assert repr(model).endswith(
        "; 5 classes: kind 0, kind 1, kind 2, kind 3, kind 4; calibrated for rates from 0.1 to 0.9)"
    )
    assert repr(model.calibration) == (
        "Calibration(3 gates on 16 images, for the rates 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)"
    )
    evaluation = dyntune.evaluate(model, data[1])
    assert repr(evaluation).startswith(f"Evaluation(16 images: accuracy {evaluation.accuracy:.2%}, loss ")
    assert f"{evaluation.activation:.1%} of the patches active" in repr(evaluation)
    assert "BlockCost" not in repr(figures)
    assert repr(dyntune.optimize(model)).startswith("OptimizedModel(adaptformer:bottleneck=4+dispatch on Vision")
    assert "merged" in repr(dyntune.tune(make_host(), "adaptformer").merge())


def test_what_is_given_wrongly_gets_a_sentence(make_host, data, splits):
    model, vit = dyntune.tune(make_host(), "dyt"), make_host()
    splitted = r"is all of squares, with its splits: data\.train, data\.val\. .*fit\(model, data\.train, data\.val\)"
    for call in (
        lambda: dyntune.fit(model, splits),
        lambda: dyntune.fit(model, splits.train, splits),
        lambda: dyntune.evaluate(model, splits),
        lambda: dyntune.calibrate(model, splits),
        lambda: model.set_rate(0.3, splits),
    ):
        with pytest.raises(DataError, match=splitted):
            call()
    for call in (lambda: dyntune.fit(model, "digits"), lambda: dyntune.evaluate(model, "digits")):
        with pytest.raises(DataError, match=r"is a name\. Load the images first: .*load_data\('digits'\)"):
            call()
    for call in (
        lambda: dyntune.fit(vit, data[0]),
        lambda: dyntune.calibrate(vit, data[0]),
        lambda: dyntune.training_loss(vit, *data[0][:2]),
        lambda: dyntune.export(vit, "nowhere"),
    ):
        with pytest.raises(SpecError, match=r"given VisionTransformer\. Tune it first: tune\(model, method\)"):
            call()
    with pytest.raises(SpecError, match="The model comes first"):
        dyntune.fit(data[0], model)
    with pytest.raises(SpecError, match="takes the model first"):
        dyntune.tune("lora", vit)
    with pytest.raises(SpecError, match=r"Load it first: dyntune\.load\('runs/x'\)"):
        dyntune.optimize("runs/x")
    with pytest.raises(SpecError, match=r"rate '0\.3': expected a share"):
        model.set_rate("0.3")
    with pytest.raises(CheckpointError, match="takes the folder that save wrote; given TunedModel"):
        dyntune.load(model)
    with pytest.raises(DataError, match="given DataSplits"):
        load_data(splits)


def test_classes_that_are_called_otherwise_are_noticed(make_host, caplog, splits):
    model = dyntune.tune(make_host(), "linear")
    model.classes = tuple("baced")
    with pytest.raises(
        DataError, match=r"training set .* in another order \(a, b, c, d, e; the model: b, a, c, e, d\)"
    ):
        dyntune.fit(model, splits.train, **SHORT)
    with pytest.raises(DataError, match="in another order"):
        dyntune.evaluate(model, splits.train)
    model.classes = tuple("vwxyz")
    with caplog.at_level(logging.WARNING, "dyntune"):
        dyntune.fit(model, splits.train, **SHORT)
    assert any("model.classes = None before fit" in said for said in caplog.messages) and model.classes[0] == "v"
    model.classes = None
    dyntune.fit(model, splits.train, **SHORT)
    assert model.classes == tuple("abcde")


def test_names_of_classes_are_texts_and_what_is_saved_stays_when_they_are_not(make_host, tmp_path):
    model = dyntune.tune(make_host(), "linear")
    model.save(tmp_path, {"accuracy": np.float32(0.5), "loss": torch.tensor(1.5)}, classes=tuple("abcde"))
    with pytest.raises(SpecError, match=r"a class is called 0, a int: expected a text for each"):
        model.save(tmp_path, classes=range(5))
    assert dyntune.load(tmp_path, backbone=make_host()).classes == tuple("abcde")
    assert json.loads((tmp_path / "dyntune.json").read_text())["results"] == {"accuracy": 0.5, "loss": 1.5}


def test_what_is_looked_at_before_the_first_step_does_not_depend_on_checkpointing(make_host, data):
    trained = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = dyntune.tune(make_host(), "dyt")
        dyntune.fit(model, data[0], **SHORT | {"batch_size": 4}, gradient_checkpointing=checkpointing, calibrate=False)
        trained.append(model.saved_state())
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, msg=name)


def test_who_saves_without_names_of_classes_is_told_once(make_host, tmp_path, caplog, splits):
    model = dyntune.tune(make_host(), "linear")
    with caplog.at_level(logging.WARNING, "dyntune"):
        model.save(tmp_path / "run")
        model.save(tmp_path / "run")
    (said,) = caplog.messages
    assert "no names for its 5 classes" in said and "classes=data.classes" in said
    model.save(tmp_path / "run", classes=splits.classes)
    assert dyntune.load(tmp_path / "run", backbone=make_host()).classes == tuple("abcde")
