"""``fit``: what it trains, keeps, writes and refuses."""

import functools
import json
import os
import signal
import threading

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.utils.data import TensorDataset

import dyntune
from dyntune.core.errors import BackboneError, DivergenceError, SpecError, TrainingError
from dyntune.model.rates import dispatchers
from dyntune.model.tasks import Classification
from dyntune.training.evaluate import evaluate
from dyntune.training.identity import began_with
from dyntune.training.interrupt import TrainingInterrupted
from dyntune.training.logs import read_log
from dyntune.training.progress import Silent
from dyntune.training.randomness import caller_randomness_kept, seed_all
from dyntune.training.settings import TrainSettings
from dyntune.training.state import STATE, RunState
from dyntune.training.trainer import fit


@pytest.fixture(scope="module")
def colours() -> tuple[TensorDataset, TensorDataset]:
    """Five classes of noisy plain colours: learnable in a few steps."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 5
    tint = torch.randn(5, 3, generator=generator)[labels][:, :, None, None]
    images = tint + 0.3 * torch.randn(80, 3, 32, 32, generator=generator)
    return TensorDataset(images[:60], labels[:60]), TensorDataset(images[60:], labels[60:])


def _model(make_host, spec="dyt:scale=1"):
    torch.manual_seed(0)
    return dyntune.tune(make_host(), spec)


SHORT = {"epochs": 2, "batch_size": 20, "lr": 3e-3, "device": "cpu", "log_every": 1}


def test_training_learns_and_keeps_the_best_epoch(make_host, colours, tmp_path):
    model = _model(make_host)
    before = evaluate(model, colours[1], count_macs=False)
    result = fit(model, *colours, out=tmp_path / "run", **SHORT | {"epochs": 6, "lr": 1e-2})
    after = evaluate(model, colours[1], count_macs=False)
    assert after.loss < before.loss
    assert after.accuracy == result.best_accuracy > before.accuracy
    assert not model.training
    loaded = dyntune.load(tmp_path / "run", backbone=make_host())
    images = colours[1].tensors[0]
    assert torch.equal(loaded(images), model(images))


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(make_host, colours):
    states = []
    for seed in (0, 0, 1):
        model = _model(make_host)
        fit(model, *colours, **SHORT, seed=seed)
        states.append({name: p.clone() for name, p in model.tuned_state().items()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_nothing_that_runs_beside_training_changes_it(make_host, colours, tmp_path):
    """Random numbers drawn between two runs, and writing to disk, must not matter."""
    first = _model(make_host)
    fit(first, *colours, **SHORT)
    second = _model(make_host)
    torch.rand(1000)
    fit(second, *colours, out=tmp_path / "run", **SHORT | {"log_every": 3})
    assert all(torch.equal(p, second.tuned_state()[name]) for name, p in first.tuned_state().items())


def test_the_log_has_every_term_of_the_loss(make_host, colours, tmp_path):
    fit(_model(make_host), *colours, out=tmp_path / "run", **SHORT)
    records = read_log(tmp_path / "run")
    steps = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    for record in steps:
        terms = {name: value for name, value in record.items() if name.startswith("loss_")}
        during = 0.4 <= (record["step"] - 1) / 6 < 0.8
        complete = {"loss_complete", "loss_distill", "loss_feature"}
        assert set(terms) == {"loss_task", "loss_rate"} | (complete if during else set())
        assert record["loss"] == pytest.approx(sum(terms.values()), rel=1e-5)
        assert 0 <= record["activation"] <= 1
    assert [record["epoch"] for record in records if record["kind"] == "val"] == [1, 2]
    assert list((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.parametrize("name", ["log.jsonl", "train.json"])
@pytest.mark.parametrize("content", [b"\xff\x00{{\n", b'[1]\n{"kind": 3}\n', b"[" * 5000, b"", b'{"step": "1"}'])
def test_files_beside_the_state_may_be_damaged(make_host, colours, tmp_path, name, content):
    run = tmp_path / "run"
    model = _model(make_host, "linear")
    fit(model, colours[0], out=run, **SHORT)
    (run / name).write_bytes(content)
    assert began_with(run) == (None if name == "train.json" else torch.get_num_threads())
    again = _model(make_host, "linear")
    fit(again, colours[0], out=run, resume=True, **SHORT)
    assert all(torch.equal(p, again.tuned_state()[each]) for each, p in model.tuned_state().items())
    assert all(type(record["step"]) is int for record in read_log(run))


def test_tensors_with_other_labels_do_not_go_on(make_host, colours, tmp_path):
    images, labels = colours[0].tensors
    fit(_model(make_host, "linear"), colours[0], out=tmp_path, **SHORT)
    fit(_model(make_host, "linear"), TensorDataset(images.clone(), labels), out=tmp_path, resume=True, **SHORT)
    for other in (TensorDataset(images, (labels + 1) % 5), TensorDataset(images.flip(0), labels)):
        with pytest.raises(TrainingError, match="started differently: data was"):
            fit(_model(make_host, "linear"), other, out=tmp_path, resume=True, **SHORT)


def test_ties_keep_the_later_epoch_and_last_ignores_accuracy(make_host, colours, tmp_path):
    result = fit(_model(make_host, "linear"), *colours, out=tmp_path / "a", **SHORT | {"lr": 1e-9, "min_lr": 0.0})
    assert result.best_epoch == 2
    result = fit(_model(make_host), *colours, out=tmp_path / "b", select="last", **SHORT)
    assert result.best_epoch == 2
    result = fit(_model(make_host), colours[0], out=tmp_path / "c", **SHORT)
    assert result.best_epoch == 2 and result.best_accuracy is None


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(make_host, colours, tmp_path):
    images, labels = (t.clone() for t in colours[0].tensors)
    run = tmp_path / "run"
    calls = []

    class Poisoned(TensorDataset):
        def __getitem__(self, index):
            calls.append(index)  # 32 of them before the first step
            image, label = super().__getitem__(index)
            return (image * torch.nan if len(calls) > 32 + 70 else image), label

    with pytest.raises(DivergenceError, match=r"not finite .*epoch 2, step 1, at learning rate .*last good checkpoint"):
        fit(_model(make_host), Poisoned(images, labels), colours[1], out=run, **SHORT)
    state = RunState.read(run)
    assert (state.epoch, state.step) == (1, 0)
    assert all(torch.isfinite(t).all() for t in state.tensors.values())
    dyntune.load(run, backbone=make_host())


def test_a_used_folder_is_refused_and_resuming_with_other_options_too(make_host, colours, tmp_path):
    run = tmp_path / "run"
    fit(_model(make_host), *colours, out=run, **SHORT)
    with pytest.raises(TrainingError, match="resume"):
        fit(_model(make_host), *colours, out=run, **SHORT)
    with pytest.raises(TrainingError, match=r"lr was 0.003, is 0.1"):
        fit(_model(make_host), *colours, out=run, resume=True, **SHORT | {"lr": 0.1})
    with pytest.raises(TrainingError, match="spec was"):
        fit(_model(make_host, "linear"), *colours, out=run, resume=True, **SHORT)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(TrainingError, match="not empty"):
        fit(_model(make_host), *colours, out=tmp_path / "mine", **SHORT)


def test_resuming_a_finished_run_gives_its_result_back_and_says_so(make_host, colours, tmp_path, caplog):
    first, second = _model(make_host), _model(make_host)
    result = fit(first, *colours, out=tmp_path / "run", **SHORT)
    assert "is complete" not in caplog.text
    again = fit(second, *colours, out=tmp_path / "run", resume=True, **SHORT)
    assert f"the run in {tmp_path / 'run'} is complete: there is nothing to train" in caplog.text
    assert (again.best_accuracy, again.best_epoch) == (result.best_accuracy, result.best_epoch)
    assert all(torch.equal(p, second.tuned_state()[name]) for name, p in first.tuned_state().items())


def test_the_training_state_is_read_without_unpickling(make_host, colours, tmp_path):
    fit(_model(make_host), *colours, out=tmp_path / "run", **SHORT)
    (tmp_path / "run" / STATE).write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    with pytest.raises(dyntune.DyntuneError, match="is damaged"):
        fit(_model(make_host), *colours, out=tmp_path / "run", resume=True, **SHORT)


@pytest.mark.parametrize(
    "options",
    [
        {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1},
        {"accumulate": 3},
        {"clip_norm": 0.5},
        {"precision": "bf16"},
        {"workers": 1},
    ],
    ids=str,
)
def test_options_train(make_host, colours, options):
    model = _model(make_host)
    before = {name: p.clone() for name, p in model.tuned_state().items()}
    fit(model, *colours, **SHORT | options)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert any(not torch.equal(p, before[name]) for name, p in model.tuned_state().items())


def test_accumulated_steps_change_the_weights_only_at_their_end(make_host, colours, tmp_path):
    """With three steps to add up and three steps in the epoch, Adam's step count is one per epoch."""
    fit(_model(make_host), *colours, out=tmp_path / "run", **SHORT | {"accumulate": 3})
    counts = {int(entry["step"]) for entry in RunState.read(tmp_path / "run").optimizer["state"].values()}
    assert counts == {2}


def test_fp16_on_a_cpu_and_unknown_options_are_refused(make_host, colours):
    with pytest.raises(TrainingError, match="needs a GPU"):
        fit(_model(make_host), *colours, precision="fp16", device="cpu")
    with pytest.raises(TrainingError, match="learning_rate"):
        fit(_model(make_host), *colours, learning_rate=1)
    with pytest.raises(TrainingError, match="no head"):
        fit(dyntune.tune(make_host(num_classes=0), "linear"), *colours)


def test_pil_images_are_preprocessed_and_augmentation_is_reproducible(make_host):
    from dyntune.data import load_data

    digits = load_data("digits")
    from dyntune.data import ImageSubset

    few = ImageSubset(digits.train, range(0, 40))
    weights = []
    for workers in (0, 2):
        torch.manual_seed(0)
        model = dyntune.tune(make_host(num_classes=10), "adaptformer")
        fit(model, few, epochs=1, batch_size=20, augment="timm", workers=workers, device="cpu")
        weights.append({name: p.clone() for name, p in model.tuned_state().items()})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_run_folder_says_what_was_asked(make_host, colours, tmp_path):
    fit(_model(make_host), *colours, out=tmp_path / "run", **SHORT)
    asked = json.loads((tmp_path / "run" / "train.json").read_text())
    assert asked["settings"]["lr"] == 3e-3 and asked["spec"] == "dyt:scale=1"
    config = json.loads((tmp_path / "run" / "dyntune.json").read_text())
    assert set(config["results"]) == {"epoch", "val_accuracy", "val_activation"}


class _Saved(Silent):
    """Looks at what is on disk when it is told that an epoch is saved."""

    def __init__(self) -> None:
        self.seen = []

    def saved(self, epoch, folder):
        adapter = json.loads((folder / "last" / "dyntune.json").read_text())
        self.seen.append((epoch, RunState.read(folder).epoch, adapter["results"]["epoch"]))


def test_hooks_are_told_when_an_epoch_is_on_disk(make_host, colours, tmp_path):
    hook, silent = _Saved(), _Saved()
    fit(_model(make_host), *colours, out=tmp_path / "run", progress=hook, **SHORT)
    assert hook.seen == [(1, 1, 1), (2, 2, 2)]
    fit(_model(make_host), *colours, progress=silent, **SHORT)
    assert silent.seen == []


def _accelerate():
    return [dict(state._shared_state) for state in (AcceleratorState, PartialState, GradientState)]


@pytest.mark.parametrize("mine", [None, {"mixed_precision": "bf16", "gradient_accumulation_steps": 3, "cpu": True}])
def test_accelerate_is_left_as_it_was(make_host, colours, mine, tmp_path):
    """Whether the caller has an Accelerator already, or makes one afterwards, and when a run fails."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    own = mine and Accelerator(**mine)
    before = _accelerate()
    try:
        fit(_model(make_host), *colours, precision="fp32", accumulate=2, **SHORT)
        with pytest.raises(TrainingError, match="holds a run"):
            for _ in range(2):
                fit(_model(make_host), *colours, out=tmp_path, **SHORT)
        assert _accelerate() == before
        after = own or Accelerator(mixed_precision="bf16", gradient_accumulation_steps=3, cpu=True)
        assert after.mixed_precision == "bf16" and after.gradient_accumulation_steps == 3
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_runs_in_threads_wait_for_each_other(make_host, colours):
    models = [_model(make_host) for _ in range(2)]
    options = [SHORT | {"accumulate": count} for count in (1, 2)]
    threads = [threading.Thread(target=fit, args=(m, *colours), kwargs=o) for m, o in zip(models, options, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model, option in zip(models, options, strict=True):
        alone = _model(make_host)
        fit(alone, *colours, **option)
        assert all(torch.equal(p, alone.tuned_state()[name]) for name, p in model.tuned_state().items())


class _CtrlC(Silent):
    """Sends the process an interrupt in the middle of a given step, or behind the evaluation of a given epoch."""

    def __init__(self, step: int = 0, epoch: int = 0) -> None:
        self.steps, self.epochs = step, epoch

    def step(self, figures):
        self.steps -= 1
        if self.steps == 0:
            os.kill(os.getpid(), signal.SIGINT)

    def evaluated(self, evaluation):
        self.epochs -= 1
        if self.epochs == 0:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(
    scope="module",
    params=[
        {},
        {"accumulate": 2},
        {"accumulate": 3},
        {"mixup": 0.8, "cutmix": 1.0},
        {"precision": "bf16"},
        {"workers": 1},
    ],
    ids=str,
)
def uninterrupted(request, make_host, colours):
    """Options, and what a run with them ends with: of its steps of 25, 25 and 10 images, the last is ragged."""
    options = SHORT | {"batch_size": 25} | request.param
    whole = _model(make_host)
    fit(whole, *colours, **options)
    return options, whole.tuned_state()


@pytest.mark.parametrize("at", [1, 2, 4, 5])
def test_an_interrupted_run_resumes_to_the_same_bits(make_host, colours, uninterrupted, tmp_path, at):
    options, expected = uninterrupted
    parts = _model(make_host)
    with pytest.raises(TrainingInterrupted, match="resume"):
        fit(parts, *colours, out=tmp_path / "run", progress=_CtrlC(at), **options)
    assert RunState.read(tmp_path / "run").epoch * 3 + RunState.read(tmp_path / "run").step >= at
    resumed = _model(make_host)
    fit(resumed, *colours, out=tmp_path / "run", resume=True, **options)
    assert all(torch.equal(p, resumed.tuned_state()[name]) for name, p in expected.items())


def test_a_run_that_is_stopped_behind_its_last_epoch_has_its_best_weights(make_host, colours, tmp_path):
    whole, stopped, again = (_model(make_host, "full") for _ in range(3))
    train, val = colours
    wrong = TensorDataset(val.tensors[0], (val.tensors[1] + 1) % 5)  # the more is learned, the fewer are right
    options = SHORT | {"epochs": 4, "lr": 1e-2}
    expected = fit(whole, train, wrong, **options)
    assert expected.best_epoch < 4, "the weights of the last epoch are others"
    with pytest.raises(TrainingInterrupted, match=r"behind the last epoch: the weights are those of the best"):
        fit(stopped, train, wrong, out=tmp_path / "run", progress=_CtrlC(epoch=4), **options)
    run = tmp_path / "run"
    assert fit(again, train, wrong, out=run, resume=True, **options).best_epoch == expected.best_epoch
    for model in (stopped, again):
        assert not model.training
        assert all(torch.equal(p, model.tuned_state()[name]) for name, p in whole.tuned_state().items())


def test_an_update_that_spoils_the_weights_is_not_saved(make_host, colours, tmp_path, monkeypatch):
    """The loss of the last step of epoch 2 is finite, its gradient is not."""
    steps = []
    step = torch.optim.AdamW.step

    def poisoned(self, *arguments, **keywords):
        steps.append(1)
        if len(steps) == 6:
            self.param_groups[0]["params"][0].grad.fill_(torch.nan)
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.AdamW, "step", poisoned)
    with pytest.raises(DivergenceError, match=r"not finite after an update in epoch 2.*last good checkpoint"):
        fit(_model(make_host), colours[0], out=tmp_path / "run", **SHORT)
    state = RunState.read(tmp_path / "run")
    assert state.epoch == 1 and all(torch.isfinite(t).all() for t in state.tensors.values())
    for folder in (tmp_path / "run", tmp_path / "run" / "last"):
        saved = dyntune.load(folder, backbone=make_host())
        assert all(torch.isfinite(p).all() for p in saved.parameters())


@pytest.mark.parametrize(
    ("change", "words"),
    [({"patch_size": 16}, "architecture"), ({"seed": 5}, "weights"), ({"drop_path_rate": 0.2}, "architecture")],
    ids=str,
)
def test_resuming_on_another_backbone_is_refused(make_host, colours, tmp_path, change, words):
    fit(_model(make_host), *colours, out=tmp_path / "run", **SHORT)
    with pytest.raises(TrainingError, match=rf"started differently.*{words} was"):
        fit(dyntune.tune(make_host(**change), "dyt:scale=1"), *colours, out=tmp_path / "run", resume=True, **SHORT)


def test_resuming_on_other_images_is_refused(make_host, tmp_path):
    from dyntune.data import ImageSubset, load_data

    digits = load_data("digits").train
    options = {"epochs": 1, "batch_size": 20, "device": "cpu"}
    fit(
        dyntune.tune(make_host(num_classes=10), "linear"), ImageSubset(digits, range(20)), out=tmp_path / "a", **options
    )
    with pytest.raises(TrainingError, match="data was"):
        other = ImageSubset(digits, range(20, 40))
        fit(dyntune.tune(make_host(num_classes=10), "linear"), other, out=tmp_path / "a", resume=True, **options)


def test_generators_of_gpus_are_given_back_too(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(7)
    with caller_randomness_kept():
        seed_all(1, 2)
    assert seeded[-1] == 7  # a GPU that nobody has used yet begins as if nobody had seeded it meanwhile


def test_the_callers_random_numbers_are_left_alone(make_host, colours):
    torch.manual_seed(3)
    expected = torch.rand(3)
    model = _model(make_host)
    torch.manual_seed(3)
    fit(model, *colours, **SHORT)
    assert torch.equal(torch.rand(3), expected)


def test_the_pace_of_gates_counts_the_changes_of_the_weights(make_host, colours):
    paces = set()

    class Watching(Silent):
        def step(self, figures):
            paces.update(gate.bias_pace.item() for gate in dispatchers(model.backbone).values())

    model = _model(make_host, "dyt")
    options = SHORT | {"epochs": 3, "batch_size": len(colours[0]) // 4, "accumulate": 3, "lr": 1e-3}
    fit(model, *colours, progress=Watching(), **options)
    assert [*paces] == pytest.approx([6 / (3 * 2 * 1e-3)])  # 4 steps of an epoch change them twice


def test_the_last_window_of_accumulated_steps_weighs_like_the_others(make_host, colours):
    """60 images in steps of 20, two at a time: the third step is a window of its own, as if of one step."""
    grads = []

    class Spy(torch.optim.AdamW):
        def step(self, *arguments, **keywords):
            grads.append(self.param_groups[0]["params"][-1].grad.clone())
            return super().step(*arguments, **keywords)

    def run(accumulate):
        grads.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim, "AdamW", Spy)
            fit(
                _model(make_host, "linear"),
                *colours,
                **SHORT | {"epochs": 1, "lr": 1e-12, "min_lr": 0.0},
                accumulate=accumulate,
            )
        return [g.norm().item() for g in grads]

    single, double = run(1), run(2)
    assert len(single) == 3 and len(double) == 2
    assert double[1] == pytest.approx(single[2], rel=1e-3)


def test_mixing_an_odd_batch_keeps_every_image(colours):
    images, labels = (t[:7].clone() for t in colours[0].tensors)
    settings = TrainSettings(mixup=0.8, label_smoothing=0.1)
    mixed_images, targets = Classification().mix(images.clone(), labels, 5, settings)
    assert mixed_images.shape == images.shape and targets.shape == (7, 5)
    torch.testing.assert_close(targets.sum(1), torch.ones(7))
    assert torch.equal(mixed_images[6], images[6])
    assert targets[6, labels[6]].item() == pytest.approx(0.9 + 0.1 / 5)
    alone, target = Classification().mix(images[:1].clone(), labels[:1], 5, settings)
    assert torch.equal(alone, images[:1]) and target.shape == (1, 5)


@pytest.mark.parametrize(
    "options", [{"device": "banana"}, {"select": "best"}, {"seed": -1}, {"clip_norm": 0.0}, {"epochs": 1.5}]
)
def test_wrong_values_are_refused_before_anything_runs(options):
    with pytest.raises(TrainingError, match="expected"):
        TrainSettings(**options)


def test_a_head_that_is_not_that_of_the_data_is_refused(make_host):
    from dyntune.data import load_data

    digits = load_data("digits")
    for classes in (2, 1000):
        with pytest.raises(TrainingError, match="num_classes=10"):
            fit(dyntune.tune(make_host(num_classes=classes), "linear"), digits.train)
    with pytest.raises(TrainingError, match="no head"):
        fit(dyntune.tune(make_host(num_classes=0), "dyt"), digits.train)


def test_class_names_of_the_data_are_kept(make_host, tmp_path):
    from dyntune.data import ImageSubset, load_data

    digits = load_data("digits")
    model = dyntune.tune(make_host(num_classes=10), "linear")
    fit(model, ImageSubset(digits.train, range(20)), out=tmp_path / "run", epochs=1, device="cpu")
    assert model.classes == digits.classes
    assert dyntune.load(tmp_path / "run", backbone=make_host(num_classes=10)).classes == digits.classes


def test_a_model_that_is_wholly_frozen_is_refused(make_host, colours):
    with pytest.raises(TrainingError, match="every parameter is frozen"):
        fit(_model(make_host).requires_grad_(False), *colours, **SHORT)


HEADS = {
    "of two maps": lambda: nn.Sequential(nn.Linear(32, 7), nn.ReLU(), nn.Dropout(0.1), nn.Linear(7, 5)),
    "dropout and map": lambda: nn.Sequential(nn.Dropout(0.1), nn.Linear(32, 5)),
    "with batch norm": lambda: nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 5)),
    "without a map": lambda: _Prototypes(32, 5),
}


class _Prototypes(nn.Module):
    """Logits are distances, so that only what comes out tells how many classes there are."""

    def __init__(self, width, classes):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(classes, width))

    def forward(self, x):
        return -torch.cdist(x, self.centres)


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_of_ones_own_is_trained_saved_and_loaded(make_host, colours, tmp_path, kind):
    def host():
        torch.manual_seed(0)
        made = make_host()
        made.head = HEADS[kind]()
        return made

    model = dyntune.tune(host(), "linear")
    before = evaluate(model, colours[1], count_macs=False).loss
    fit(model, *colours, out=tmp_path / "run", **SHORT | {"epochs": 4, "lr": 1e-2})
    assert evaluate(model, colours[1], count_macs=False).loss < before
    assert model.backbone.classes == 5
    images = colours[1].tensors[0]
    assert torch.equal(dyntune.load(tmp_path / "run", backbone=host())(images), model(images))


def test_a_head_with_other_classes_than_the_data_is_refused(make_host, photos):
    host = make_host()
    host.head = HEADS["of two maps"]()
    with pytest.raises(TrainingError, match="head has 5 classes, the data set 3"):
        fit(dyntune.tune(host, "linear"), dyntune.data.load_data(str(photos)).train, **SHORT)


@pytest.mark.parametrize("call", [fit, evaluate, lambda model, data: dyntune.cost(model)], ids=["fit", "eval", "cost"])
def test_wrapped_models_are_refused_with_a_word_on_what_to_do(make_host, colours, call):
    model = _model(make_host)
    for wrapped, word in (
        (nn.DataParallel(model), "torchrun"),
        (torch.compile(model), "compile"),
        (make_host(), "tune"),
    ):
        with pytest.raises(SpecError, match=word):
            call(wrapped, colours[1])


def test_quantised_hosts_are_refused(make_host):
    quantised = torch.ao.quantization.quantize_dynamic(make_host(), {nn.Linear})
    with pytest.raises(BackboneError, match=r"blocks\.0\.attn\.qkv is a quantised Linear.*--precision int8"):
        dyntune.tune(quantised, "dyt")


def test_wrapped_hosts_and_copies_of_data_parallel_are_refused(make_host, images_for):
    with pytest.raises(BackboneError, match="torchrun"):
        dyntune.tune(nn.DataParallel(make_host()), "dyt")
    model = _model(make_host)
    replica = model.backbone._replicate_for_data_parallel()  # as torch makes them, one for each GPU
    model._modules["backbone"] = replica
    with pytest.raises(BackboneError, match="torchrun"):
        model(images_for(replica.host, 1))


def test_batch_norms_of_a_hybrid_keep_their_statistics(colours, tmp_path):
    """They are no parameters, so that nothing saves what training would make of them."""

    def host():
        torch.manual_seed(0)
        sizes = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 4, "num_classes": 5}
        return timm.create_model("vit_small_resnet26d_224", **sizes)

    model = dyntune.tune(host(), "dyt:scale=1")
    fit(model, colours[0], out=tmp_path / "run", **SHORT | {"epochs": 1})
    images = colours[1].tensors[0]
    assert torch.equal(dyntune.load(tmp_path / "run", backbone=host())(images), model(images))


def _states_equal(first, second):
    a, b = RunState.read(first), RunState.read(second)
    assert (a.epoch, a.step) == (b.epoch, b.step) and a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(tensor, b.tensors[name]) for name, tensor in a.tensors.items())


LONGER = {
    "constant rate": ({"lr": 1e-3, "min_lr": 1e-3, "warmup_epochs": 0}, {}),
    "cool-down": ({"warmup_epochs": 0.2}, {"cooldown_epochs": 1}),
}


@pytest.mark.parametrize("kind", LONGER)
def test_a_run_is_made_longer_where_that_changes_nothing_of_what_is_done(make_host, colours, tmp_path, kind):
    options, more = LONGER[kind]
    short = SHORT | options
    long = short | more | {"epochs": 3}
    fit(_model(make_host, "linear"), *colours, out=tmp_path / "run", **short)
    fit(_model(make_host, "linear"), *colours, out=tmp_path / "run", resume=True, **long)
    fit(_model(make_host, "linear"), *colours, out=tmp_path / "whole", **long)
    _states_equal(tmp_path / "run", tmp_path / "whole")
    assert [r["step"] for r in read_log(tmp_path / "run") if r["kind"] == "val"] == [3, 6, 9]


def test_other_lengths_are_refused_with_a_way_to_go_on(make_host, colours, tmp_path):
    fit(_model(make_host, "linear"), *colours, out=tmp_path / "linear", **SHORT)
    with pytest.raises(TrainingError, match=r"cooldown_epochs=2, warmup_epochs=0\.2"):
        fit(_model(make_host, "linear"), *colours, out=tmp_path / "linear", resume=True, **SHORT | {"epochs": 4})
    state = RunState.read(tmp_path / "linear")  # of a version with an option that is no more
    RunState(
        **vars(state) | {"identity": state.identity | {"settings": state.identity["settings"] | {"old": 1}}}
    ).write(tmp_path / "linear")
    with pytest.raises(TrainingError, match=r"cooldown_epochs=2, warmup_epochs=0\.2"):
        fit(_model(make_host, "linear"), *colours, out=tmp_path / "linear", resume=True, **SHORT | {"epochs": 4})
    advised = SHORT | {"epochs": 4, "cooldown_epochs": 2, "warmup_epochs": 0.2}
    fit(_model(make_host, "linear"), *colours, out=tmp_path / "linear", resume=True, **advised)
    fit(_model(make_host), *colours, out=tmp_path / "dyt", **SHORT)
    with pytest.raises(TrainingError, match="follows the length of the training"):
        fit(_model(make_host), *colours, out=tmp_path / "dyt", resume=True, **advised)


@pytest.mark.parametrize(("batch_size", "processes"), [(10, 2), (5, 4), (40, 1), (20, 3)])
def test_a_run_goes_on_in_other_processes_with_the_same_images_in_a_step(
    make_host, colours, tmp_path, batch_size, processes
):
    """The state is that of a run of several processes: their order of images and steps are those of one."""
    fit(_model(make_host, "linear"), *colours, out=tmp_path / "whole", **SHORT)
    with pytest.raises(TrainingInterrupted):
        fit(_model(make_host, "linear"), *colours, out=tmp_path / "run", progress=_CtrlC(4), **SHORT)
    state = RunState.read(tmp_path / "run")
    state.identity |= {"processes": processes, "settings": state.identity["settings"] | {"batch_size": batch_size}}
    state.write(tmp_path / "run")
    resume = functools.partial(fit, _model(make_host, "linear"), *colours, out=tmp_path / "run", resume=True)
    if batch_size * processes == SHORT["batch_size"]:
        resume(**SHORT)
        _states_equal(tmp_path / "run", tmp_path / "whole")
    else:
        with pytest.raises(
            TrainingError, match=f"with batch_size={batch_size * processes} it goes on|batch_size was 40"
        ):
            resume(**SHORT)
