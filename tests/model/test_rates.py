"""Other activation rates for a trained model: calibration, ``set_rate``, and what is saved of them."""

import json
import logging
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import TensorDataset

import dyntune
from dyntune.core.errors import CheckpointError, DataError, SpecError
from dyntune.core.files import SEAL
from dyntune.model.adapter_folder import CONFIG, write_calibration
from dyntune.model.executions import Compact
from dyntune.model.rates import Calibration, dispatchers

VARIANTS = ("mlp", "attn", "attn-mlp", "layer")
SIZE = {"img_size": 64}
RATES = (0.2, 0.5, 0.8)


def randomised(model, seed=0):
    """Gates that differ between units and between patches."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in dispatchers(model.backbone).values():
            gate.gate.weight.copy_(torch.randn(gate.gate.weight.shape, generator=generator))
            gate.gate.bias.copy_(4 * torch.randn(1, generator=generator))
    return model.eval()


def images(count, seed=0):
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def activation(model, batch):
    with torch.no_grad():
        gates = model.run(batch).gates
    return {gate.unit: gate.values.mean().item() for gate in gates}


def mean(values):
    return sum(values) / len(values)


@pytest.fixture(scope="module")
def calibrated(make_host):
    model = randomised(dyntune.tune(make_host(**SIZE), "dyt"))
    model.calibration = dyntune.calibrate(model, images(96), RATES)
    return model


@pytest.fixture(autouse=True)
def _as_trained(calibrated):
    yield
    calibrated.set_rate(None)
    calibrated.eval()


@pytest.mark.parametrize("spec", [*(f"dyt:dispatch={where}" for where in VARIANTS), "dyt+tome:r=6", "dyt:rate=0.3/0.9"])
def test_the_asked_activation_comes_out_on_other_images(make_host, spec):
    model = randomised(dyntune.tune(make_host(**SIZE), spec))
    trained = mean(activation(model, images(96)).values())
    model.calibration = dyntune.calibrate(model, images(96), RATES)
    held_out = images(96, seed=1)
    came_out = []
    for rate in (0, 0.2, 0.5, 0.8, 1):
        model.set_rate(rate)
        came_out.append(mean(activation(model, held_out).values()))
        assert came_out[-1] == pytest.approx(rate, abs=0.02)
        assert model.target_rate == pytest.approx(rate, abs=0.02)
    assert came_out == sorted(came_out)
    model.set_rate(None)
    assert mean(activation(model, images(96)).values()) == trained


def test_rates_between_the_calibrated_ones_are_interpolated(make_host):
    model = randomised(dyntune.tune(make_host(**SIZE), "dyt:dispatch=layer"))
    model.calibration = dyntune.calibrate(model, images(96), (0.3, 0.4))
    for rate in (0.33, 0.37):
        model.set_rate(rate)
        assert mean(activation(model, images(96, seed=1)).values()) == pytest.approx(rate, abs=0.02)
    shifts = [model.calibration.at(rate)["blocks.1"][0] for rate in (0.3, 0.35, 0.4)]
    assert shifts[1] == pytest.approx((shifts[0] + shifts[2]) / 2)


def test_gates_that_training_left_more_open_stay_so(calibrated):
    before = activation(calibrated, images(96))
    order = sorted(before, key=before.__getitem__)
    assert before[order[-1]] - before[order[0]] > 0.2
    calibrated.set_rate(0.5)
    rates = activation(calibrated, images(96))
    assert sorted(rates, key=rates.__getitem__) == order
    distances = [math.log(r[u] / (1 - r[u])) for r in (before, rates) for u in order]
    moved = [after - as_trained for as_trained, after in zip(distances[:3], distances[3:], strict=True)]
    assert max(moved) - min(moved) < 0.25, "all are to move by the same distance in logits"


def test_calibration_says_what_comes_out(calibrated):
    calibration = calibrated.calibration
    assert calibration.images == 96 and calibration.rates == RATES
    for rate in RATES:
        calibrated.set_rate(rate)
        measured = activation(calibrated, images(96))
        assert {u: a for u, (_, a) in calibration.at(rate).items()} == pytest.approx(measured, abs=1e-6)
        assert calibration.activation(rate) == pytest.approx(rate, abs=0.006)


def test_a_calibration_tells_how_far_it_is(calibrated):
    told = []
    dyntune.calibrate(calibrated, images(8), (0.3, 0.6, 0.3), watch=told.append)
    assert told == [1, 2]


def test_the_model_is_left_as_it_was(calibrated):
    calibrated.train()
    calibrated.backbone.host.eval()
    calibrated.set_rate(0.35)
    modes = {name: module.training for name, module in calibrated.named_modules()}
    before = {name: buffer.clone() for name, buffer in calibrated.named_buffers()}
    again = dyntune.calibrate(calibrated, images(96), RATES)
    assert {name: module.training for name, module in calibrated.named_modules()} == modes
    assert all(torch.equal(buffer, before[name]) for name, buffer in calibrated.named_buffers())
    assert calibrated.target_rate == pytest.approx(0.35, abs=0.01)
    assert again == calibrated.calibration, "a set rate must not change what is measured"
    calibrated.backbone.host.train()


def test_who_runs_the_model_meanwhile_sees_nothing_of_a_calibration(make_host, monkeypatch):
    model = randomised(dyntune.tune(make_host(**SIZE), "dyt")).train()
    batch, seen = images(4, seed=2), []
    model.eval()
    expected = model(batch)
    model.train()
    original = type(model).run

    def run(twin, *arguments, **options):
        modes = model.training
        seen.append((twin is model, modes, torch.equal(original(model.eval(), batch).logits, expected)))
        model.train(modes)
        return original(twin, *arguments, **options)

    monkeypatch.setattr(type(model), "run", run)
    dyntune.calibrate(model, images(8), RATES)
    assert len(seen) > 3 and set(seen) == {(False, True, True)}


def test_threads_that_set_rates_leave_one_of_them(calibrated):
    def switch(rate):
        for _ in range(50):
            calibrated.set_rate(rate)

    threads = [threading.Thread(target=switch, args=(rate,)) for rate in (0.2, 0.5, 0.8, None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    left = {unit: (gate.shift.item(), gate.rate) for unit, gate in dispatchers(calibrated.backbone).items()}
    possible = []
    for rate in (0.2, 0.5, 0.8, None):
        calibrated.set_rate(rate)
        possible.append(
            {unit: (gate.shift.item(), gate.rate) for unit, gate in dispatchers(calibrated.backbone).items()}
        )
    assert left in possible


def test_masked_equals_compact_and_logits_are_the_shifted_ones(calibrated):
    batch = images(8, seed=2)
    for rate in (0, 0.3, 1):
        calibrated.set_rate(rate)
        with torch.no_grad():
            masked, compact = (calibrated.run(batch, execution=how) for how in ("masked", "compact"))
        assert torch.allclose(masked.logits, compact.logits, atol=1e-5)
        for one, other in zip(masked.gates, compact.gates, strict=True):
            assert torch.equal(one.values, other.values)
            assert torch.equal(one.values, (one.logits > 0).float())


def test_cost_follows_the_rate_and_is_what_runs(calibrated):
    data = TensorDataset(images(96), torch.zeros(96, dtype=torch.long))
    dense = dyntune.cost(calibrated).macs
    counted = []
    for rate in (0.2, 0.8):
        calibrated.set_rate(rate)
        counted.append(dyntune.cost(calibrated).macs)
        assert dyntune.evaluate(calibrated, data).macs == pytest.approx(counted[-1], rel=2e-3)
    assert counted[0] < dense < counted[1]
    calibrated.set_rate(1)  # nothing stands in for units that compute every patch
    assert dyntune.evaluate(calibrated, data).macs == dyntune.cost(calibrated).macs


def test_costs_are_counted_in_the_middle_of_a_training_too(make_host):
    model = dyntune.tune(make_host(**SIZE), "dyt").train()
    before = dyntune.cost(model)
    model.begin_training(8, 1e-3)
    dyntune.training_loss(model, images(4), torch.arange(4))
    assert dyntune.cost(model) == before


def test_who_runs_the_model_meanwhile_sees_nothing_of_a_count(make_host, monkeypatch):
    model = randomised(dyntune.tune(make_host(**SIZE), "dyt"))
    batch, seen = images(4, seed=2), []
    expected = model(batch)
    original = Compact.computed

    def computed(self, *given):
        with monkeypatch.context() as plain, torch.no_grad(), ThreadPoolExecutor(1) as other:
            plain.setattr(Compact, "computed", original)
            seen.append(torch.equal(other.submit(model, batch).result(), expected))
        return original(self, *given)

    monkeypatch.setattr(Compact, "computed", computed)
    dyntune.cost(model)
    assert seen and all(seen)


def test_set_rate_calibrates_on_the_images_that_it_is_given(make_host):
    model = randomised(dyntune.tune(make_host(**SIZE), "dyt"))
    brighter = images(64) + 3
    model.set_rate(0.37, TensorDataset(brighter, torch.zeros(64)))
    assert mean(activation(model, brighter).values()) == pytest.approx(0.37, abs=0.006)
    assert model.calibration is None
    with pytest.raises(SpecError, match="not calibrated"):
        model.set_rate(0.37)


def test_images_are_drawn_from_the_whole_data_and_read_once(make_host):
    seen = []

    class Data(TensorDataset):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    model = randomised(dyntune.tune(make_host(**SIZE), "dyt"))
    data = Data(images(40), torch.zeros(40))
    assert dyntune.calibrate(model, data, (0.5,), images=8).images == 8
    first = seen[1:]  # the first one was looked at for its kind
    assert seen[0] == 0 and len(set(first)) == len(first) == 8 and max(first) > 20 and first != sorted(first)
    state = torch.get_rng_state()
    dyntune.calibrate(model, data, (0.5,), images=8)
    assert seen[9:] == [0, *first] and torch.equal(torch.get_rng_state(), state)
    assert dyntune.calibrate(model, data, (0.5,), images=100, batch_size=7).images == 40
    with pytest.raises(DataError, match="needs images"):
        dyntune.calibrate(model, images(0), (0.5,))


def test_gates_without_any_contrast_are_reported(make_host, caplog):
    model = dyntune.tune(make_host(**SIZE), "dyt").eval()
    with torch.no_grad():
        for gate in dispatchers(model.backbone).values():
            gate.gate.weight.zero_()
    with caplog.at_level(logging.WARNING, logger="dyntune"):
        calibration = dyntune.calibrate(model, images(16), (0.5,))
    assert "rate 0.5: on these images the gates came to" in caplog.text
    assert calibration.activation(0.5) in (0, 1)


def test_a_gate_that_lets_everything_through_is_not_closed(make_host):
    model = randomised(dyntune.tune(make_host(**SIZE), "dyt"))
    first = next(iter(dispatchers(model.backbone).values()))
    with torch.no_grad():
        first.gate.weight.zero_()
        first.gate.bias.fill_(3.0)
    calibration = dyntune.calibrate(model, images(64), (0.3, 0.8))
    unit = next(iter(calibration.activations))
    assert calibration.activations[unit] == (1.0, 1.0)


def test_the_order_of_the_images_does_not_matter(make_host):
    model = randomised(dyntune.tune(make_host(**SIZE), "dyt"))
    classes = torch.cat([images(32) * strength for strength in (0.2, 1.0, 4.0)])  # one after the other
    for rate in (0.2, 0.5, 0.8):
        model.set_rate(rate, classes)
        assert mean(activation(model, classes).values()) == pytest.approx(rate, abs=0.02)


@pytest.mark.parametrize(
    "data,words",
    [
        (torch.zeros(4, 3, 32, 32, dtype=torch.uint8), "floating point; given torch.uint8"),
        (torch.zeros(3, 32, 32), "of shape"),
        (iter([]), "given list_iterator"),
    ],
)
def test_what_is_no_set_of_images_is_refused(make_host, data, words):
    with pytest.raises(DataError, match=words):
        dyntune.calibrate(dyntune.tune(make_host(**SIZE), "dyt"), data)


@pytest.mark.parametrize("rates", [0.3, (), (0.0,), (math.nan,), (0.5, 1.0)])
def test_rates_to_calibrate_for_are_checked(make_host, rates):
    with pytest.raises(SpecError, match="above 0 and below 1"):
        dyntune.calibrate(dyntune.tune(make_host(**SIZE), "dyt"), images(4), rates)


def test_images_that_are_not_finite_calibrate_nothing(make_host):
    model = dyntune.tune(make_host(), "dyt")
    with pytest.raises(DataError, match=r"logits of the gate of blocks\.0\.mlp are not finite"):
        dyntune.calibrate(model, torch.full((4, 3, 32, 32), torch.nan), (0.5,))


def test_a_shift_holds_in_evaluation_alone(make_host):
    model = randomised(dyntune.tune(make_host(**SIZE), "dyt"))
    model.set_rate(1.0)
    assert mean(activation(model, images(8)).values()) == 1
    model.train()
    loss = dyntune.training_loss(model, images(8), torch.zeros(8, dtype=torch.long))
    loss.total.backward()
    assert all(gate.gate.bias.grad.abs().sum() > 0 for gate in dispatchers(model.backbone).values())
    assert not all(gate.values.all() for gate in loss.output.gates)


def test_a_shift_stays_in_float32(make_host):
    model = dyntune.tune(make_host(**SIZE), "dyt")
    gate = next(iter(dispatchers(model.backbone).values()))
    gate.set_rate(-9.997, 0.3)
    model.bfloat16()
    assert gate.shift.dtype is torch.float32 and gate.shift.item() == pytest.approx(-9.997, abs=1e-6)


def test_half_precision(make_host):
    model = randomised(dyntune.tune(make_host(**SIZE), "dyt")).bfloat16()
    model.set_rate(0.3, images(64))
    assert mean(activation(model, images(64).bfloat16()).values()) == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("rate", [-0.1, 1.1, 0.1, 0.9, math.nan])
def test_rates_that_cannot_be_had(calibrated, rate):
    expected = "between 0 and 1" if not 0 <= rate <= 1 else "calibrated for rates between 0.2 and 0.8"
    with pytest.raises(SpecError, match=expected):
        calibrated.set_rate(rate)


@pytest.mark.parametrize("spec", ["adaptformer", "adaptformer+tome:r=4"])
def test_models_without_gates(make_host, spec):
    model = dyntune.tune(make_host(**SIZE), spec)
    model.set_rate(None)
    for call in (lambda: model.set_rate(0.5), lambda: model.set_rate(1), lambda: dyntune.calibrate(model, images(4))):
        with pytest.raises(SpecError, match="no learned gates"):
            call()


@pytest.mark.parametrize("rates", [(), (0, 0.5), (0.5, 1)])
def test_rates_to_calibrate_for(calibrated, rates):
    with pytest.raises(SpecError, match="above 0 and below 1"):
        dyntune.calibrate(calibrated, images(4), rates)


def test_save_and_load(calibrated, make_host, tmp_path):
    calibrated.set_rate(0.35)
    calibrated.save(tmp_path)
    loaded = dyntune.load(tmp_path, backbone=make_host(**SIZE))
    assert loaded.calibration == calibrated.calibration
    batch = images(8, seed=3)
    calibrated.set_rate(None)
    assert torch.equal(loaded(batch), calibrated(batch)), "a set rate is not saved"
    for model in (loaded, calibrated):
        model.set_rate(0.35)
    assert torch.equal(loaded(batch), calibrated(batch))
    merged = dyntune.load(tmp_path, backbone=make_host(**SIZE), policy="tome:r=4")
    assert merged.calibration is None, "with other tokens the gates decide otherwise"


def test_a_calibration_is_written_into_a_saved_adapter(calibrated, make_host, tmp_path):
    model = randomised(dyntune.tune(make_host(**SIZE), "dyt"))
    model.save(tmp_path)
    before = json.loads((tmp_path / CONFIG).read_text())
    assert dyntune.load(tmp_path, backbone=make_host(**SIZE)).calibration is None
    write_calibration(tmp_path, calibrated.calibration)
    after = json.loads((tmp_path / CONFIG).read_text())
    assert before.pop(SEAL) != after.pop(SEAL)
    assert after == before | {"calibration": json.loads(json.dumps(calibrated.calibration.to_dict()))}
    assert dyntune.load(tmp_path, backbone=make_host(**SIZE)).calibration == calibrated.calibration
    before.pop("calibration")
    (tmp_path / CONFIG).write_text(json.dumps(before))
    assert dyntune.load(tmp_path, backbone=make_host(**SIZE)).calibration is None, "as in folders of older versions"


def _renamed(data):
    for name in ("shifts", "activations"):
        data[name] = {unit.replace("mlp", "attn"): values for unit, values in data[name].items()}


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda data: data.pop("images"), "not valid"),
        (lambda data: data.pop("rates"), "KeyError"),
        (lambda data: data.update(images=0), "not valid"),
        (lambda data: data.update(images="many"), "not valid"),
        (lambda data: data.update(code="print(1)"), "not valid"),
        (lambda data: data.update(rates=[]), "not valid"),
        (lambda data: data.update(rates=[0.5, 0.2, 0.8]), "not valid"),
        (lambda data: data.update(rates=[0.2, 0.5, 1.0]), "not valid"),
        (lambda data: data["shifts"].update({"blocks.0.mlp": [1.0]}), "not valid"),
        (lambda data: data["shifts"].update({"blocks.0.mlp": [1.0, 2.0, math.inf]}), "finite numbers"),
        (lambda data: data["shifts"].update({"blocks.0.mlp": ["1", "2", "3"]}), "finite numbers"),
        (lambda data: data["activations"].update({"blocks.0.mlp": [0.1, 0.2, 1.3]}), "not valid"),
        (lambda data: data.update(shifts=[1, 2, 3]), "not valid"),
        (_renamed, "not one of this model's gates"),
    ],
)
def test_a_spoilt_calibration_is_refused(calibrated, make_host, tmp_path, spoil, expected):
    calibrated.save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    spoil(config["calibration"])
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=expected):
        dyntune.load(tmp_path, backbone=make_host(**SIZE))


def test_calibration_round_trip(calibrated):
    data = json.loads(json.dumps(calibrated.calibration.to_dict()))
    assert Calibration.from_dict(data) == calibrated.calibration


def test_training_forgets_what_belonged_to_other_weights(make_host):
    model = randomised(dyntune.tune(make_host(**SIZE), "dyt"))
    model.calibration = dyntune.calibrate(model, images(16), RATES)
    model.set_rate(0.2)
    data = TensorDataset(images(8), torch.arange(8) % 5)
    dyntune.fit(model, data, epochs=1, batch_size=8, device="cpu", calibrate=False)
    assert model.calibration is None
    assert model.target_rate == 0.5
    assert all(gate.shift == 0 for gate in dispatchers(model.backbone).values())
    model.calibration = dyntune.calibrate(model, images(16), RATES)
    model.set_rate(0.2)
    model.begin_training(8, 1e-3)  # as a loop of one's own does
    assert model.calibration is None and model.target_rate == 0.5


def test_gates_are_exported_and_compiled_with_their_rate(calibrated):
    calibrated.set_rate(0.35)
    gate = calibrated.backbone.blocks[0].mlp.dispatcher
    patches = torch.randn(2, 64, calibrated.backbone.blocks[0].width)
    exported = torch.export.export(gate, (patches,)).module()
    assert torch.equal(exported(patches), gate(patches))
    compiled = torch.compile(gate, backend="eager", fullgraph=True)
    for rate in (0.35, 0.7, 0, 1):
        calibrated.set_rate(rate)
        assert torch.equal(compiled(patches), gate(patches))
