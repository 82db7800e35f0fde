import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from rich.console import Console
from torch.utils.data import TensorDataset

import dyntune
from dyntune.core.errors import DataError, TrainingError
from dyntune.training.evaluate import evaluate
from dyntune.training.interrupt import TrainingInterrupted
from dyntune.training.progress import EvaluationBar


@pytest.fixture
def model(make_host, randomise):
    tuned = dyntune.tune(make_host(), "dyt")
    randomise(tuned, seed=3)
    return tuned


def test_figures_equal_those_computed_by_hand(model, images_for):
    images, labels = images_for(model.backbone.host, 13), torch.arange(13) % 5
    model.eval()
    with torch.no_grad():
        output = model.run(images)
    result = evaluate(model, TensorDataset(images, labels), batch_size=4)
    assert result.images == 13
    assert result.accuracy == pytest.approx((output.logits.argmax(-1) == labels).float().mean().item())
    assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(output.logits, labels).item(), rel=1e-5)
    rates = {gate.unit: gate.values.mean().item() for gate in output.gates}
    assert result.activation_per_unit == pytest.approx(rates)
    assert result.activation == pytest.approx(sum(rates.values()) / 3)


def test_executed_macs_follow_from_the_active_tokens(model, images_for):
    """Closed form for a block with MLP dispatch: only norm2 and MLP depend on the number of active tokens."""
    images, labels = images_for(model.backbone.host, 6), torch.zeros(6, dtype=torch.long)
    result = evaluate(model, TensorDataset(images, labels), batch_size=6)
    tokens, width, hidden, patches = 17, 32, 128, 16
    fixed = 16 * 3 * 8 * 8 * width + 5 * tokens * width  # patch embedding, last norm
    for rate in result.activation_per_unit.values():
        attention = 4 * tokens * width**2 + 2 * tokens**2 * width + 5 * tokens * width
        active = 1 + rate * patches
        mlp = active * (2 * width * hidden + 5 * width)
        beside = (
            2 * tokens * width * 8 + patches * width + 2 * tokens * width
        )  # adapter, dispatcher, surrogate of rank 1
        fixed += attention + mlp + beside
    assert result.macs == pytest.approx(fixed)


def test_views_go_through_in_pieces_of_a_batch(make_host, randomise, monkeypatch):
    model = dyntune.tune(dyntune.ClipClassifier(make_host("plain", depth=1, num_classes=2), 2), "dyt").eval()
    randomise(model, seed=3)
    clips = torch.randn((5, 3, *model.backbone.input_shape), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(5) % 2
    with torch.no_grad():
        whole = model.run(clips.flatten(0, 1))
    logits = model.task.averaged(whole.logits.unflatten(0, (5, 3)), model.preprocessing.clip.average)
    sizes, run = [], model.run
    monkeypatch.setattr(model, "run", lambda batch, **options: sizes.append(len(batch)) or run(batch, **options))
    result = evaluate(model, iter(list(zip(clips.split(2), labels.split(2), strict=True))))
    assert sizes == [2] * 6 + [1] * 3 and result.images == 5
    assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert result.activation == pytest.approx(whole.gates[0].values.mean().item())


def test_threads_may_evaluate_one_model(model, images_for):
    data = TensorDataset(images_for(model.backbone.host, 8), torch.arange(8) % 5)
    alone = evaluate(model, data, batch_size=2)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: evaluate(model, data, batch_size=2), range(8)))
    assert found == [alone] * 8


def test_masked_evaluation_executes_everything_but_scores_alike(model, images_for):
    data = TensorDataset(images_for(model.backbone.host, 6), torch.arange(6) % 5)
    compact, masked = evaluate(model, data), evaluate(model, data, execution="masked")
    assert masked.macs > compact.macs
    assert masked.accuracy == compact.accuracy and masked.loss == pytest.approx(compact.loss, abs=1e-5)


def test_the_mode_of_the_model_is_left_as_it_was(model, images_for):
    model.train()
    evaluate(model, TensorDataset(images_for(model.backbone.host, 2), torch.zeros(2, dtype=torch.long)))
    assert model.training
    model.backbone.host.eval()  # as who wants no stochastic depth does
    evaluate(model, TensorDataset(images_for(model.backbone.host, 2), torch.zeros(2, dtype=torch.long)))
    assert model.training and not any(module.training for module in model.backbone.host.modules())
    with pytest.raises(DataError, match="no image"):
        evaluate(model, TensorDataset(torch.empty(0, 3, 32, 32), torch.empty(0, dtype=torch.long)))


def test_evaluating_draws_nothing_and_wants_a_head(model, make_host, images_for):
    images = TensorDataset(images_for(model.backbone.host, 6), torch.arange(6) % 5)
    before = torch.get_rng_state()
    evaluate(model, images)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(TrainingError, match="nothing to evaluate: the model has no head"):
        evaluate(dyntune.tune(make_host(num_classes=0), "adaptformer"), images)


def test_tokens_that_are_left_are_reported_by_unit(make_host, images_for):
    images = images_for(make_host(), 5)
    result = evaluate(dyntune.tune(make_host(), "linear", "tome:r=3/0/5"), TensorDataset(images, torch.zeros(5).long()))
    assert result.tokens_per_unit == {"blocks.0.mlp": 14, "blocks.2.mlp": 9}
    assert (result.activation, result.activation_per_unit) == (1.0, {})


def test_who_stops_an_evaluation_is_told_what_came_out_so_far(make_host):
    """And whoever watches it hears of every batch."""
    data = TensorDataset(torch.randn(10, 3, 32, 32), torch.arange(10) % 5)
    model = dyntune.tune(make_host(), "linear")
    heard = []
    whole = evaluate(model, data, batch_size=4, watch=lambda done, figures: heard.append((done, figures["accuracy"])))
    assert [done for done, _ in heard] == [4, 8, 10] and heard[-1][1] == whole.accuracy

    def stopped(done, figures):
        bar(done, figures)
        if done == 8:
            raise KeyboardInterrupt

    with (
        pytest.raises(TrainingInterrupted, match=f"8 of 10 videos, acc {heard[1][1]:.1%}"),
        EvaluationBar(10, "accuracy", Console(file=io.StringIO()), "video") as bar,
    ):
        evaluate(model, data, batch_size=4, watch=stopped)


def test_outputs_that_are_not_finite_are_said(model, images_for, caplog):
    data = TensorDataset(images_for(model.backbone.host, 4), torch.arange(4))
    assert evaluate(model, data).loss < 100 and caplog.text == ""
    with torch.no_grad():
        model.backbone.host.head.weight.fill_(3e38)
    assert not evaluate(model, data).loss < 100
    assert "outputs for 4 of 4 inputs are not finite" in caplog.text
