"""Tasks: classification, and a second one that is defined here alone, to show that nothing else need know of it."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

import dyntune
from dyntune.backbones.hosts import wrap
from dyntune.commands.predict import predict
from dyntune.core.errors import CheckpointError, TrainingError
from dyntune.core.files import SEAL
from dyntune.core.timing import Throughput
from dyntune.inference.export.check import check
from dyntune.inference.export.folder import OpenedModel
from dyntune.model.tasks import Classification, Metric, Task
from dyntune.model.tune import build_tuned
from dyntune.studies.compare import Row
from dyntune.studies.report import markdown_table, methods_table
from dyntune.training.logs import read_log

COLOURS = ("red", "green", "blue")
SHORT = {"epochs": 4, "batch_size": 20, "lr": 1e-2, "device": "cpu", "log_every": 1}


class F1(Metric):
    """The mean over the labels of F1, which is no mean over images."""

    def __init__(self, outputs):
        super().__init__(3 * outputs)

    def update(self, outputs, targets):
        said, right = outputs > 0, targets > 0.5
        self.sums += torch.cat([(said & right).sum(0), said.sum(0), right.sum(0)])

    def figures(self):
        both, said, right = self.sums.view(3, -1)
        return {"f1": float((2 * both / (said + right)).mean()), "said": float(said.mean())}


class MultiLabel(Task):
    """Any number of labels per image, each a yes or no of its own."""

    name, merit = "multi-label", "f1"

    def loss(self, outputs, targets, settings=None):
        return F.binary_cross_entropy_with_logits(outputs, targets)

    def distillation(self, outputs, taught):
        return F.binary_cross_entropy_with_logits(outputs, taught.sigmoid())

    def metric(self, outputs):
        return F1(outputs)

    def predictions(self, outputs, names, most):
        return [{"labels": [name for name, said in zip(names, row, strict=True) if said]} for row in (outputs > 0)]

    def cells(self, prediction):
        return {"labels": " and ".join(prediction["labels"]) or "none"}

    def agreement(self, outputs, others):
        return ((outputs > 0) == (others > 0)).float().mean(1)


@pytest.fixture(scope="module")
def colours():
    """Noisy pictures with any of three colours in them, each a label."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.stack([torch.arange(80) >> bit & 1 for bit in range(3)], dim=1).float()
    images = (2 * labels - 1)[:, :, None, None] + 0.3 * torch.randn(80, 3, 32, 32, generator=generator)
    return TensorDataset(images[:60], labels[:60]), TensorDataset(images[60:], labels[60:])


def model_of(make_host):
    torch.manual_seed(0)
    model = dyntune.tune(make_host(num_classes=3), "dyt:scale=1")
    model.task, model.classes = MultiLabel(), COLOURS
    return model


@pytest.fixture(scope="module")
def trained(make_host, colours, tmp_path_factory):
    """A model that ``fit`` has trained for the second task, and the run's folder."""
    model, run = model_of(make_host), tmp_path_factory.mktemp("tasks") / "run"
    return model, run, dyntune.fit(model, *colours, out=run, **SHORT)


def test_a_second_task_is_trained_and_selected_by_its_own_figure(make_host, colours, trained):
    model, run, result = trained
    images, labels = colours[1].tensors
    with torch.no_grad():
        said = model(images) > 0
    expected = [2 * (s & r).sum() / (s.sum() + r.sum()) for s, r in zip(said.T, (labels > 0.5).T, strict=True)]
    found = dyntune.evaluate(model, colours[1], batch_size=7, count_macs=False)
    assert found.score == result.best_accuracy == pytest.approx(float(torch.stack(expected).mean()))
    assert found.score > 0.8 > dyntune.evaluate(model_of(make_host), colours[1], count_macs=False).score
    assert list(found.to_dict())[:4] == ["images", "f1", "said", "activation"]
    records = read_log(run)
    assert max(r["f1"] for r in records if r["kind"] == "val") == result.best_accuracy
    assert all(0 <= r["f1"] <= 1 and "accuracy" not in r for r in records)
    distilled = [r["loss_distill"] for r in records if r["kind"] == "train" and "loss_distill" in r]
    assert distilled and min(distilled) > 0.1  # an entropy, not a divergence


def test_a_second_task_is_saved_by_name_and_given_to_load(make_host, colours, trained):
    model, run, result = trained
    config = json.loads((run / "dyntune.json").read_text())
    assert config["task"] == "multi-label" and config["results"]["val_f1"] == round(result.best_accuracy, 6)
    assert "pipeline_tag: multi-label\n" in (run / "README.md").read_text()
    with pytest.raises(CheckpointError, match=r"trained for the task 'multi-label'.*load\(folder, task=\.\.\.\)"):
        dyntune.load(run, backbone=make_host(num_classes=3))
    loaded = dyntune.load(run, backbone=make_host(num_classes=3), task=MultiLabel())
    images = colours[1].tensors[0]
    assert torch.equal(loaded(images), model(images)) and isinstance(loaded.task, MultiLabel)
    other = dyntune.tune(make_host(num_classes=3), "dyt:scale=1")
    with pytest.raises(TrainingError, match="task was multi-label, is image-classification"):
        dyntune.fit(other, *colours, out=run, resume=True, **SHORT)


def test_a_second_task_says_what_it_predicts_and_whether_two_models_agree(colours, trained, photos):
    model, _, _ = trained
    paths = sorted((photos / "test" / "green").iterdir())
    predictions = predict(model, paths, 5)
    assert [row["image"] for row in predictions] == list(map(str, paths))
    assert json.loads(json.dumps(predictions))[0]["labels"] == ["green"]
    assert model.task.cells({"image": "a.png", "labels": ["red", "blue"]}) == {"labels": "red and blue"}

    class Swapped:
        def run(self, images):
            return model(images)[:, [1, 0, 2]].detach(), None

    after = OpenedModel({"spec": model.spec, "gates": []}, Swapped(), model.preprocessing, model.classes)
    images = torch.stack([torch.tensor(signs).view(3, 1, 1).expand(3, 32, 32) for signs in ((1.0, -1, -1), (1, 1, -1))])
    result = check(model, after, [(images, torch.tensor([[1.0, 0, 0], [1, 1, 0]]))])
    assert result.agreement == pytest.approx((1 / 3 + 1) / 2)


def test_a_report_prints_the_figure_of_the_task(colours, trained):
    model, _, _ = trained
    found = dyntune.evaluate(model, colours[1])
    row = Row("dyt", found, 5, 20, 100_000_000, Throughput(1.0, 1.0, 1.0, 1.0), 1.0)
    title, _, line = markdown_table(methods_table([row])).splitlines()
    assert "| test f1 |" in title and f"| {found.score:.2%} |" in line
    assert row.to_dict()["test"]["f1"] == found.score
    assert "| speed |" in title
    title, _, line = markdown_table(untimed := methods_table([replace(row, speed=None)])).splitlines()
    assert "speed" not in title and title.count("|") == line.count("|") and "in turns" not in untimed.note


def test_mixing_is_refused_where_a_task_does_not_define_it(make_host, colours):
    with pytest.raises(TrainingError, match="not defined for multi-label; leave mixup and cutmix at 0"):
        dyntune.fit(model_of(make_host), colours[0], mixup=0.5, **SHORT)


def test_a_task_gives_a_new_head_its_initial_values():
    class Zeros(MultiLabel):
        def initialise(self, head):
            torch.nn.init.zeros_(head.weight)

    of_task, usual = (
        build_tuned("vit_mini_patch4_32.dyntune", "linear", classes=COLOURS, task=task) for task in (Zeros(), None)
    )
    assert not of_task.backbone.heads[0].weight.any() and isinstance(of_task.task, Zeros)
    assert usual.backbone.heads[0].weight.std().item() == pytest.approx(0.01, rel=0.2)
    assert isinstance(usual.task, Classification) and len(usual.backbone.heads[0].bias) == 3


def test_an_adapter_that_names_no_task_is_a_classifier(make_host, tmp_path):
    model = dyntune.tune(make_host(), "linear")
    model.save(tmp_path)
    path = tmp_path / "dyntune.json"
    config = json.loads(path.read_text())
    assert config.pop("task") == "image-classification"
    del config[SEAL]
    path.write_text(json.dumps(config))
    assert isinstance(dyntune.load(tmp_path, backbone=make_host()).task, Classification)
    with pytest.raises(CheckpointError, match="trained for the task 'image-classification'"):
        dyntune.load(tmp_path, backbone=make_host(), task=MultiLabel())


@pytest.mark.parametrize("task", [Classification(), MultiLabel()], ids=lambda task: task.name)
def test_what_several_processes_have_counted_adds_up(task):
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(11, 3, generator=generator)
    labels = torch.arange(11) % 3
    targets = labels if isinstance(task, Classification) else F.one_hot(labels, 3).float()
    whole, first, second = (task.metric(3) for _ in range(3))
    whole.update(outputs, targets)
    first.update(outputs[:4], targets[:4])
    second.update(outputs[4:], targets[4:])
    first.sums += second.sums
    assert first.figures() == pytest.approx(whole.figures())
    assert task.score(outputs, targets) == pytest.approx(whole.figures()[task.merit])


def test_one_output_is_no_classification(make_host, make_hf):
    hf = make_hf("vit")
    wrap(hf).reset_classifier(1)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 0])
    for model in (dyntune.tune(make_host(num_classes=1), "linear"), dyntune.tune(hf, "dyt")):
        for call in (
            lambda model=model: dyntune.training_loss(model.train(), images, labels),
            lambda model=model: dyntune.fit(model, TensorDataset(images, labels), **SHORT),
            lambda model=model: model.eval()(pixel_values=images, labels=labels),
        ):
            with pytest.raises(TrainingError, match=r"has 1 output.*num_labels=2.*model\.task"):
                call()


class Regression(MultiLabel):
    """A number for each image, scored by minus the squared error."""

    name, merit = "regression", "minus_error"

    def __init__(self, scale=20.0):
        self.scale = scale

    def loss(self, outputs, targets, settings=None):
        return F.mse_loss(outputs[:, 0], targets)

    def distillation(self, outputs, taught):
        return F.mse_loss(outputs, taught)

    def metric(self, outputs):
        scale = self.scale

        class MinusError(Metric):
            def __init__(self):
                super().__init__(2)

            def update(self, outputs, targets):
                errors = (outputs[:, 0] - targets).square().sum()
                self.sums += torch.tensor([float(errors), len(targets)], dtype=self.sums.dtype)

            def figures(self):
                return {"minus_error": -scale * float(self.sums[0] / self.sums[1])}

        return MinusError()


def test_an_epoch_is_kept_whatever_the_figures_sign(make_host, tmp_path):
    torch.manual_seed(0)
    model = dyntune.tune(make_host(num_classes=1), "lora")
    data = TensorDataset(torch.randn(20, 3, 32, 32), 5 + torch.arange(20.0))
    model.task = Regression()
    result = dyntune.fit(model, data, data, out=tmp_path / "run", **SHORT)
    assert result.best_accuracy < -1 and result.best_epoch == 4
    assert dyntune.load(tmp_path / "run", backbone=make_host(num_classes=1), task=Regression()).spec == model.spec
    model.task = Regression(scale=float("nan"))
    with pytest.raises(TrainingError, match="minus_error, by which regression picks the epoch, is nan"):
        dyntune.fit(model, data, data, **SHORT)


def test_no_task_lets_a_gradient_into_the_complete_model(make_host):
    seen = []

    class Seen(MultiLabel):
        def distillation(self, outputs, taught):
            seen.append(taught.requires_grad)
            return super().distillation(outputs, taught)

    model = dyntune.tune(make_host(), "dyt:recipe=published").train()
    model.task = Seen()
    dyntune.training_loss(model, torch.randn(2, 3, 32, 32), torch.ones(2, 5)).total.backward()
    assert seen == [False]
