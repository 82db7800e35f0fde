"""``fit`` with a teacher: who learns from it, what becomes of it, and what is refused."""

import logging

import pytest
import torch
from torch.utils.data import TensorDataset

import dyntune
from dyntune.core.errors import TrainingError
from dyntune.training.logs import read_log
from dyntune.training.state import STATE, RunState
from dyntune.training.trainer import fit

SPEC = "dynamicvit:keep=0.7/0.4,layers=1/2"
SHORT = {"epochs": 2, "batch_size": 10, "lr": 3e-3, "device": "cpu", "log_every": 1}


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(20, 3, 32, 32, generator=generator), torch.arange(20) % 5)


def model_of(make_host, spec=SPEC):
    torch.manual_seed(0)
    return dyntune.tune(make_host(), spec)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["plain", "tuned"])
def test_the_student_learns_from_the_teacher_which_stays_as_it_was(make_host, data, tmp_path, kind):
    teacher = make_host(seed=7)
    teacher = (teacher if kind == "plain" else dyntune.tune(teacher, "adaptformer")).train()
    before, trained = weights(teacher), [p.requires_grad for p in teacher.parameters()]
    student = model_of(make_host)
    fit(student, data, out=tmp_path / "run", teacher=teacher, **SHORT)
    after = weights(teacher)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(module.training for module in teacher.modules())
    assert trained == [p.requires_grad for p in teacher.parameters()]
    assert not any(p.grad is not None for p in teacher.parameters())
    steps = [record for record in read_log(tmp_path / "run") if record["kind"] == "train"]
    for record in steps:
        terms = [record[f"loss_{name}"] for name in ("task", "ratio", "teacher", "teacher_tokens")]
        assert record["loss"] == pytest.approx(sum(terms), rel=1e-5) and min(terms) >= 0
    state = RunState.read(tmp_path / "run")
    assert state.tensors.keys() == state.best_tensors.keys() == student.tuned_state().keys()
    alone = model_of(make_host)
    fit(alone, data, **SHORT)
    assert any(not torch.equal(p, alone.tuned_state()[name]) for name, p in student.tuned_state().items())


def test_a_missing_teacher_is_said_once_and_only_where_one_is_missed(make_host, data, caplog):
    with caplog.at_level(logging.WARNING, logger="dyntune"):
        fit(model_of(make_host), data, **SHORT)
    assert len(caplog.records) == 1
    for words in ("dynamicvit", "no teacher is given", "teacher=model", "--teacher RUN"):
        assert words in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="dyntune"):
        fit(model_of(make_host), data, teacher=make_host(), **SHORT)
        fit(model_of(make_host, "dyt"), data, **SHORT)
        fit(model_of(make_host, SPEC + ",distill_weight=0,token_weight=0"), data, **SHORT)
    assert not caplog.records


def test_a_run_goes_on_with_its_own_teacher_only(make_host, data, tmp_path):
    fit(model_of(make_host), data, out=tmp_path / "run", teacher=make_host(seed=7), **SHORT)
    fit(model_of(make_host), data, out=tmp_path / "run", teacher=make_host(seed=7), resume=True, **SHORT)
    for other, words in ((make_host(seed=8), "is VisionTransformer "), (None, "is None")):
        with pytest.raises(TrainingError, match=f"teacher was VisionTransformer [0-9a-f]+, {words}"):
            fit(model_of(make_host), data, out=tmp_path / "run", teacher=other, resume=True, **SHORT)


def test_runs_that_ignore_a_teacher_may_go_on_with_another(make_host, data, tmp_path):
    first, second = model_of(make_host, "linear"), model_of(make_host, "linear")
    fit(first, data, out=tmp_path / "run", teacher=make_host(num_classes=9), **SHORT)
    fit(second, data, out=tmp_path / "run", resume=True, **SHORT)
    assert all(torch.equal(p, second.tuned_state()[name]) for name, p in first.tuned_state().items())


def test_a_run_from_before_there_were_teachers_goes_on(make_host, data, tmp_path):
    first, second = model_of(make_host, "dyt"), model_of(make_host, "dyt")
    fit(first, data, out=tmp_path / "run", **SHORT)
    state = RunState.read(tmp_path / "run")
    del state.identity["teacher"], state.identity["settings"]["backbone_lr"]
    state.write(tmp_path / "run")
    assert (tmp_path / "run" / STATE).exists()
    fit(second, data, out=tmp_path / "run", resume=True, **SHORT)
    assert all(torch.equal(p, second.tuned_state()[name]) for name, p in first.tuned_state().items())


def test_a_teacher_that_does_not_suit_is_refused_before_training(make_host, data):
    student = model_of(make_host)
    named = dyntune.tune(make_host(), "linear")
    named.classes, student.classes = tuple("abcde"), tuple("abcdf")
    other = dyntune.tune(make_host(mlp_ratio=2.0), "linear")
    other.preprocessing = type(other.preprocessing)((32, 32), (0.1,) * 3, (0.2,) * 3, "bicubic")
    for teacher, words in (
        (make_host(num_classes=9), "the teacher has 9 classes, the model 5"),
        (named, "trained with classes"),
        (other, "trained with preprocessing"),
        (student.backbone.host, "shares parameters"),
        (student, "shares parameters"),
    ):
        with pytest.raises(TrainingError, match=words):
            fit(student, data, teacher=teacher, **SHORT)


def test_policies_are_told_the_epoch(make_host, data, monkeypatch):
    model = model_of(make_host, "dyt")
    told = []
    monkeypatch.setattr(model.backbone, "begin_step", lambda *given: told.append(given))
    fit(model, data, **SHORT)
    assert told == [(0, 0), (0.5, 1), (1, 2), (1.5, 3)]


@pytest.mark.parametrize(
    ("parts", "changes", "reason"),
    [
        (("adaptformer", "tome:r=2"), {}, "merges or drops tokens"),
        (("adaptformer",), {"patch_size": 16}, "patch features are 2 x 2 x 32"),
        (("adaptformer",), {"embed_dim": 48}, "patch features are 4 x 4 x 48"),
    ],
)
def test_a_teacher_that_cannot_be_compared_is_refused_before_the_folder_is_touched(
    make_host, data, tmp_path, parts, changes, reason
):
    teacher = dyntune.tune(make_host(**changes), *parts)
    with pytest.raises(dyntune.DyntuneError, match=reason):
        fit(model_of(make_host), data, out=tmp_path / "run", teacher=teacher, **SHORT)
    assert not (tmp_path / "run").exists()


def test_logits_alone_may_come_from_a_larger_teacher(make_host, data):
    student = model_of(make_host, f"{SPEC},token_weight=0")
    fit(student, data, teacher=dyntune.tune(make_host(embed_dim=48, patch_size=16), "linear"), **SHORT)


def test_a_teacher_that_nobody_learns_from_is_named(make_host, data, caplog):
    with caplog.at_level(logging.WARNING, logger="dyntune"):
        fit(model_of(make_host, "tome:r=2"), data, teacher=dyntune.tune(make_host(), "linear"), **SHORT)
    assert [record.getMessage() for record in caplog.records if "teacher is not used: tome:r=2" in record.getMessage()]


def test_a_path_is_no_teacher(make_host, data):
    with pytest.raises(TrainingError, match=r"teacher='runs/dense' is no model; give one, for instance teacher="):
        fit(model_of(make_host), data, teacher="runs/dense", **SHORT)


def test_a_plain_teacher_of_other_pixels_is_warned_of(make_host, data, caplog):
    teacher = make_host(seed=7)
    teacher.pretrained_cfg = {"mean": (0.4, 0.4, 0.4), "std": (0.2, 0.2, 0.2)}
    with caplog.at_level(logging.WARNING, logger="dyntune"):
        fit(model_of(make_host), data, teacher=teacher, **SHORT)
    assert "trained on pixels with mean (0.4, 0.4, 0.4)" in caplog.text
