"""What commands say before the first step, and how long they say it will take."""

import io
import re

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import dyntune
from dyntune.backbones.builtin import BUILTIN_BACKBONE
from dyntune.backbones.hosts import create_backbone
from dyntune.commands import compare, noah, train
from dyntune.commands.main import app
from dyntune.core.errors import TrainingError
from dyntune.data.datasets import ArrayImages
from dyntune.training import progress
from dyntune.training.evaluate import Evaluation
from dyntune.training.header import outlines, training_header
from dyntune.training.progress import ProgressBar
from dyntune.training.settings import TrainSettings

SETTINGS = TrainSettings(epochs=3, batch_size=4, device="cpu")


def pictures(labels, size=32):
    images = ArrayImages(np.zeros((len(labels), size, size, 3), np.uint8), labels, "things")
    images.classes = tuple("abcde")
    return images


def rows(header):
    return dict(header.rows)


def test_it_counts_what_is_trained_on(make_host):
    model = dyntune.tune(make_host(), "adaptformer:bottleneck=2")
    train, val = pictures([0, 0, 1, 1, 2, 2, 3, 3, 4, 4]), pictures([0, 1, 2, 3, 4])
    said = training_header(model, train, val, SETTINGS, name="things", threads="2 of 4 threads")
    assert rows(said)["data"] == "things: 5 classes, 10 training and 5 validation images"
    # A bottleneck of 2 on each of three blocks of width 32, with biases and a scale that is fixed.
    own = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "head" not in name)
    everything = sum(p.numel() for name, p in model.named_parameters() if "head" not in name)
    assert f": {own:,} trained parameters without head ({own / everything:.2%} of all)" in rows(said)["method"]
    assert rows(said)["device"] == "cpu, 2 of 4 threads"
    assert rows(said)["training"] == "3 epochs of 3 steps of 4 images, seed 0"
    assert "32 x 32 pixels, 17 tokens" in rows(said)["backbone"]  # 4 x 4 patches and a class token
    assert not said.warnings
    assert str(said).splitlines()[1].startswith("data      things: ")


def test_one_is_not_called_several(make_host):
    model = dyntune.tune(make_host(num_classes=1), "linear")
    said = rows(training_header(model, pictures([0]), None, TrainSettings(epochs=1, device="cpu")))
    assert said["data"] == "1 class, 1 training image"
    assert said["training"] == "1 epoch of 1 step of 1 image, seed 0"


def test_data_sets_of_others_are_counted_too(make_host):
    model = dyntune.tune(make_host(), "linear")
    data = TensorDataset(torch.zeros(6, 3, 32, 32), torch.zeros(6, dtype=torch.long))
    said = training_header(model, data, None, SETTINGS)
    assert rows(said)["data"] == "5 classes, 6 training images" and not said.warnings


@pytest.mark.parametrize(
    ("train", "val", "warnings"),
    [
        ([0, 0, 1, 2, 2, 3, 3, 4, 4], None, ["1 class (b) has a single training image."]),
        ([0, 0, 1, 2, 3, 3, 4, 4], None, ["2 classes (b, c) have a single training image."]),
        ([0, 0, 1, 1, 3, 3, 4, 4], None, ["1 class (c) has no training image"]),
        ([0, 0, 1, 1, 2, 2, 3, 3, 4, 4], [0, 1, 2, 3], ["1 class (e) has no validation image"]),
        ([0, 0, 1, 1, 2, 2, 3, 3, 4], [0, 1], ["1 class (e) has a single", "3 classes (c, d, e) have no validation"]),
    ],
)
def test_classes_with_too_few_images_are_named(make_host, train, val, warnings):
    model = dyntune.tune(make_host(), "linear")
    model.classes = tuple("abcde")
    said = training_header(model, pictures(train), None if val is None else pictures(val), SETTINGS).warnings
    assert len(said) == len(warnings)
    for text, start in zip(said, warnings, strict=True):
        assert text.startswith(start)


@pytest.mark.parametrize(("pixels", "warned"), [(32, False), (95, False), (96, True), (400, True)])
def test_photographs_on_a_backbone_of_32_pixels_are_told_of_a_better_one(pixels, warned):
    (model,) = outlines(BUILTIN_BACKBONE, [["linear"]], classes=tuple("abcde"))
    labels = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    said = training_header(model, pictures(labels, pixels), None, SETTINGS).warnings
    assert [("--model vit_base_patch16_224" in text, f"{pixels} x {pixels}" in text) for text in said] == (
        [(True, True)] if warned else []
    )


def test_photographs_on_a_backbone_of_their_size_are_nothing_to_warn_of():
    (model,) = outlines("vit_tiny_patch16_224", [["linear"]], classes=tuple("abcde"))
    assert not training_header(model, pictures([0, 0, 1, 1, 2, 2, 3, 3, 4, 4], 800), None, SETTINGS).warnings


def test_outlines_cost_what_the_models_do():
    (outline,) = outlines(BUILTIN_BACKBONE, [["lora", "tome:r=2"]], classes="abc")
    whole = dyntune.tune(create_backbone(BUILTIN_BACKBONE, num_classes=3), "lora", "tome:r=2")
    assert dyntune.cost(outline) == dyntune.cost(whole)


@pytest.mark.parametrize(
    ("place", "name", "arguments"),
    [
        (train, "fit", ("train", "--method", "linear")),
        (compare, "compare", ("compare", "--methods", "linear,lora")),
        (noah, "train_noah", ("noah",)),
    ],
    ids=("train", "compare", "noah"),
)
def test_a_command_begins_with_it(monkeypatch, photos, tmp_path, place, name, arguments):
    monkeypatch.setattr(place, name, lambda *given, **options: pytest.fail("no header") if not said else stop())
    said = []

    def stop():
        raise TrainingError("enough")

    show = place.show_header
    monkeypatch.setattr(place, "show_header", lambda header: (said.append(str(header)), show(header)))
    command, *options = arguments
    done = CliRunner().invoke(app, [command, str(photos), *options, "--out", str(tmp_path / "run"), "--device", "cpu"])
    assert str(done.exception) == "enough"
    assert done.stderr.startswith(said[0])
    assert "3 classes, 36 training, 12 validation and 12 test images" in said[0]
    assert said[0].count("\nmethod ") == (2 if command == "compare" else 1)


def test_the_time_that_is_left_is_said_once_after_the_first_steps(monkeypatch):
    clock = iter(range(0, 1000, 5))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    log = io.StringIO()
    bar = ProgressBar("dyt", Console(file=log, width=80))
    bar.epoch(0, 10, 100, 0)
    for _ in range(9):
        bar.step({"loss_task": 1.0, "images_per_second": 1.0})
    # Three steps behind the first one, of 5 s each, before it can be said; 996 are left.
    assert re.findall("about .*", log.getvalue()) == ["about 83 min for 996 more steps, evaluations aside"]


@pytest.mark.parametrize("validated", [True, False])
def test_every_epoch_has_a_line_the_last_one_too(validated):
    log = io.StringIO()
    with ProgressBar("noah", Console(file=log, width=80)) as bar:
        for epoch in range(3):
            bar.epoch(epoch, 3, 1, 0)
            bar.step({"loss_task": float(epoch), "images_per_second": 1.0})
            if validated:
                bar.evaluated(Evaluation(4, {"accuracy": 0.75}, 1.0, {}, None))
    lines = log.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines] == [f"noah epoch {number}/3" for number in (1, 2, 3)]
    assert all(("val acc" in line) == validated for line in lines)


def test_a_term_that_an_epoch_has_not_is_not_shown_for_it():
    log = io.StringIO()
    with ProgressBar("dyt", Console(file=log, width=80)) as bar:
        for epoch, terms in enumerate(
            [{"loss_task": 1.0}, {"loss_task": 1.0, "loss_distill": 0.5}, {"loss_task": 1.0}]
        ):
            bar.epoch(epoch, 3, 1, 0)
            bar.step(terms | {"images_per_second": 1.0})
    assert ["distill" in line for line in log.getvalue().splitlines()] == [False, True, False]
