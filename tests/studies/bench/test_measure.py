"""What is counted and checked of each candidate."""

import pytest
import torch
from torch.utils.data import TensorDataset

import dyntune
from dyntune.core.errors import DyntuneError
from dyntune.core.timing import Latency, Spread
from dyntune.studies.bench.measure import Row, measure
from dyntune.studies.bench.peers import candidates, untouched
from dyntune.training.evaluate import evaluate


@pytest.fixture
def model(make_host, randomise):
    return randomise(dyntune.tune(make_host(), "dyt"), seed=3).eval()


def measured(model, images, calls=None, against=("dense", "tome:r=2"), **options):
    entries = [
        (candidate, (calls or {}).get(candidate.name, candidate.eager))
        for candidate in candidates("ours", model, against, trained=True)
    ]
    return {row.name: row for row in measure(entries, images, runtime="eager", rounds=3, seconds=0, **options)}


def test_macs_and_activation_are_those_that_ran(model, images_for):
    images = images_for(model.backbone.host, 6)
    rows = measured(model, images)
    found = evaluate(model, TensorDataset(images, torch.zeros(6, dtype=torch.long)), batch_size=6)
    assert rows["ours"].macs == pytest.approx(found.macs) and rows["ours"].active == pytest.approx(found.activation)
    assert rows["dense"].macs == model.dense_macs and rows["dense"].active is None
    assert rows["tome:r=2"].macs == dyntune.cost(dyntune.tune(untouched(model), "tome:r=2")).macs
    assert rows["ours"].macs_ratio == pytest.approx(model.dense_macs / found.macs)
    assert max(row.difference for row in rows.values()) < 1e-5


def test_efficiency_is_the_speedup_over_dense_by_the_macs_ratio(model, images_for):
    rows = measured(model, images_for(model.backbone.host, 2))
    dense = rows["dense"]
    assert dense.speedup == Spread(1, 1, 1) and dense.macs_ratio == dense.skip_efficiency == 1
    assert set(dense.speedups) == {"ours", "tome:r=2"} and set(rows["ours"].speedups) == {"dense", "tome:r=2"}
    for row in rows.values():
        assert row.skip_efficiency == pytest.approx(row.speedup.median / row.macs_ratio)
        assert row.latency.calls == 3 and row.batch_size == 2 and row.images_per_second.low > 0
    assert rows["ours"].speedups["dense"].median == pytest.approx(1 / rows["dense"].speedups["ours"].median)


def test_a_model_with_other_logits_is_not_timed(model, images_for):
    images = images_for(model.backbone.host, 4)
    calls = []

    def wrong(images):
        calls.append(1)
        return model(images) * 1.01

    with pytest.raises(DyntuneError, match="ours in eager gave other logits"):
        measured(model, images, {"ours": wrong})
    assert len(calls) == 1
    rows = measured(model, images, {"ours": wrong}, exact=False)
    assert rows["ours"].difference == pytest.approx(0.01, rel=0.01)
    with pytest.raises(DyntuneError, match=r"shape \(4, 2\); expected \(4, 5\)"):
        measured(model, images, {"ours": lambda images: model(images)[:, :2]}, exact=False)
    with pytest.raises(DyntuneError, match="other logits"):
        measured(model, images, {"ours": lambda images: model(images) * torch.nan})


def test_an_image_whose_gate_a_rounding_error_flips_is_reported_only(model, images_for):
    def flipped(images):
        logits = model(images).clone()
        logits[0] += 0.5
        return logits

    rows = measured(model, images_for(model.backbone.host, 4), {"ours": flipped})
    assert rows["ours"].difference > 1e-2


def test_a_row_is_read_as_it_was_written():
    spread = Spread(2.0, 1.0, 3.0)
    row = Row(
        "eager", "cpu", 8, "x", 1e9, 1.5, None, spread, Latency(1.0, 2.0, 3.0, 40), 7, {"dense": spread}, 1.3, 0.0
    )
    assert Row.from_dict(row.to_dict()) == row and row.speedup == spread
