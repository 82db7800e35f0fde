"""Recipes of dispatch: the course of target and noise, the pace of gates, what files and other loops see of them."""

import copy
import json
import math
import statistics

import pytest
import torch
from timm.utils import ModelEmaV3
from torch.utils.data import TensorDataset

import dyntune
from dyntune.backbones.training import Paced
from dyntune.core.errors import SpecError, TrainingError
from dyntune.core.files import SEAL
from dyntune.model.activation import activation_rates
from dyntune.model.adapter_folder import CONFIG
from dyntune.model.rates import dispatchers
from dyntune.model.worth import unit_worth
from dyntune.parts.policies.course import Course
from dyntune.parts.policies.dispatch import Dispatch
from dyntune.parts.policies.dispatcher import Dispatcher
from dyntune.parts.registry import expand, part_from_dict, resolve
from dyntune.training.identity import identity_changes, run_identity
from dyntune.training.progress import Silent
from dyntune.training.settings import TrainSettings


@pytest.fixture
def model(make_host):
    torch.manual_seed(0)
    return dyntune.tune(make_host(), "dyt:rate=0.4").train()


@pytest.fixture(scope="module")
def data():
    images = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return TensorDataset(images, torch.arange(20) % 5)


def steps(model, images_for, count, lr):
    images, labels = images_for(model.backbone.host, 4), torch.arange(4)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(count):
        dyntune.training_loss(model, images, labels).total.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_target_falls_along_half_a_cosine_and_the_noise_to_none():
    course = Course((0.4, 0.4), (0.2, 0.6), 0.8)
    expected = {0.0: (1, 1), 0.2: (1, 0.75), 0.4: (0.7, 0.5), 0.6: (0.4, 0.25), 0.8: (0.4, 0), 0.95: (0.4, 0)}
    for progress, (target, noise) in expected.items():
        course.begin_step(progress=progress)
        assert (course.target, course.noise) == (pytest.approx(target), pytest.approx(noise))
    course.begin_step(progress=0.3)
    assert course.target == pytest.approx(1 - 0.6 * (1 - math.cos(math.pi / 4)) / 2)
    assert course.eval().target == 0.4


@pytest.mark.parametrize("at", [0.3, 1.0])
def test_the_target_may_fall_at_once(at):
    course = Course((0.4, 0.4), (at, at), 0.8)
    for progress, target in {0.0: 1, at - 0.01: 1, at: 0.4}.items():
        course.begin_step(progress=progress)
        assert course.target == target


def test_without_a_known_length_the_rate_is_the_target_and_the_noise_whole():
    course = Course((0.4, 0.4), (0.2, 0.6), 0.8)
    assert (course.target, course.noise) == (0.4, 1.0)
    course.begin_step(progress=0.7)
    course.end_course()
    assert (course.target, course.noise) == (0.4, 1.0)
    assert not isinstance(course, Paced), "it has no tensors that a pace, or a run that goes on, would be about"
    published = Course((0.4, 0.4), (0.0, 0.0), None)
    published.begin_step(progress=0.0)
    assert (published.target, published.noise) == (0.4, 1.0)


@pytest.mark.parametrize("options", ["quiet=0.85", "quiet=0"])
def test_gates_without_noise_decide_in_training_as_in_evaluation(make_host, images_for, options):
    torch.manual_seed(0)
    model = dyntune.tune(make_host(), f"dyt:rate=0.4,{options}").train()
    images = images_for(model.backbone.host, 4)
    gate = model.backbone.blocks[0].mlp.dispatcher
    with torch.no_grad():
        gate.gate.weight.normal_()
        gate.gate.bias.zero_()
    model.begin_training(10, 1e-3)
    model.backbone.begin_step(step=9)
    quiet = model.run(images).gates[0]
    assert torch.equal(quiet.values, (quiet.logits > 0).float()) and 0 < quiet.values.mean() < 1
    model.backbone.begin_step(step=0)
    first = model.run(images).gates[0]
    assert torch.equal(first.values, (first.logits > 0).float()) == (options == "quiet=0")


def test_behind_the_fall_the_weight_of_the_rate_loss_grows(make_host, images_for):
    torch.manual_seed(0)
    model = dyntune.tune(make_host(), "dyt:rate=0.4,dropout=0,rate_weight=10/100").train()
    images = images_for(model.backbone.host, 4)
    model.begin_training(10, 1e-3)
    seen = {}
    for step in (4, 6, 8):
        loss = dyntune.training_loss(model, images, torch.arange(4), step=step)
        target = loss.output.gates[0].course.target
        distance = activation_rates(loss.output.gates).mean().item() - target
        seen[step] = loss.terms["rate"].item() / distance**2
    assert seen == {4: pytest.approx(10, rel=1e-4), 6: pytest.approx(10, rel=1e-4), 8: pytest.approx(55, rel=1e-4)}
    model.end_training()
    loss = dyntune.training_loss(model, images, torch.arange(4))
    assert loss.terms["rate"].item() == pytest.approx(10 * 0.6**2, rel=0.2), "nobody knows how far this is"


@pytest.mark.parametrize(
    ("spec", "follows"),
    [
        *(("dyt", True), ("dyt:course=0/0", True), ("dyt:recipe=published", False), ("tome:r=2", False)),
        *(("dyt:recipe=published,rate_weight=2/20", True), ("dyt:recipe=published,lead=1/3", True)),
    ],
)
def test_what_follows_the_length_of_a_training_says_so(make_host, spec, follows):
    model = dyntune.tune(make_host(), spec)
    assert any(policy.follows_length for policy in model.policies) == follows


@pytest.mark.parametrize(
    ("spec", "refused"), [("dyt:recipe=published", False), ("dyt:recipe=published,rate_weight=2/20", True)]
)
def test_a_run_that_follows_its_length_is_not_made_longer(make_host, data, tmp_path, spec, refused):
    def train(epochs, **options):
        torch.manual_seed(0)
        model = dyntune.tune(make_host(), spec)
        settings = {"batch_size": 20, "device": "cpu", "out": tmp_path / "run", "warmup_epochs": 0.5}
        return dyntune.fit(model, data, epochs=epochs, cooldown_epochs=epochs - 1, **settings, **options)

    train(1)
    if refused:
        with pytest.raises(TrainingError, match="follows the length of the training"):
            train(2, resume=True)
    else:
        assert train(2, resume=True).best_epoch == 2


def skip(unit):
    """Lets no patch through a unit."""
    with torch.no_grad():
        unit.dispatcher.gate.weight.zero_()
        unit.dispatcher.gate.bias.fill_(-9.0)


@pytest.mark.parametrize("options", ["", ",dispatch=attn", ",dispatch=attn-mlp", ",dispatch=layer", ",experts=2"])
def test_gates_of_units_that_the_model_needs_more_start_further_open(make_host, images_for, options):
    """Where features change twice as much, by one logit; the change is that of a gate that lets nothing through."""
    torch.manual_seed(0)
    model = dyntune.tune(make_host(), f"dyt:rate=0.4,spread=none,surrogate=none{options}").eval()
    images = images_for(model.backbone.host, 4)
    units = [unit for unit in model.backbone.all_units() if unit.dispatcher is not None]

    def features(source):
        output = source.run(images)
        return model.backbone.pooled(output.tokens)

    with torch.no_grad():
        for unit in units:
            unit.dispatcher.gate.weight.zero_()
        whole = features(model)
        changes = []
        for number in range(len(units)):
            other = copy.deepcopy(model)
            skip([unit for unit in other.backbone.all_units() if unit.dispatcher is not None][number])
            changes.append(((features(other) - whole).norm() / whole.norm()).item())
    expected = [min(max(math.log2(max(change, 1e-9) / statistics.median(changes)), 0), 3) for change in changes]
    assert max(expected) > 0
    model.train().begin_training(10, 1e-3)
    assert all(unit.dispatcher.linear.bias.item() == 2 for unit in units)
    dyntune.training_loss(model, images, torch.arange(4))
    starts = [unit.dispatcher.linear.bias.item() - 2 for unit in units]
    assert starts == pytest.approx(expected, abs=1e-4)
    assert all(module.training for module in model.modules())
    dyntune.training_loss(model, images, torch.arange(4))
    assert [unit.dispatcher.linear.bias.item() - 2 for unit in units] == pytest.approx(expected, abs=1e-4), "once"


@pytest.mark.parametrize("moves", ["6/15", "none"])
def test_logits_start_spread_around_the_bias_whatever_the_features(make_host, images_for, moves):
    torch.manual_seed(0)
    host = make_host()
    with torch.no_grad():  # features of which patches have much in common
        host.pos_embed.add_(torch.linspace(-3, 3, host.pos_embed.shape[-1]))
    model = dyntune.tune(host, f"dyt:rate=0.4,dropout=0,moves={moves}").train()
    model.begin_training(10, 1e-3)
    output = dyntune.training_loss(model, images_for(host, 4), torch.arange(4)).output
    for gate, learned in zip(output.gates, dispatchers(model.backbone).values(), strict=True):
        assert gate.logits.mean().item() == pytest.approx(2 + learned.lead.item(), abs=1e-3)
        assert gate.logits.std(correction=0).item() == pytest.approx(0.5, abs=1e-3)
    weights = [gate.linear.weight.clone() for gate in dispatchers(model.backbone).values()]
    dyntune.training_loss(model, images_for(host, 8)[4:], torch.arange(4))
    for gate, weight in zip(dispatchers(model.backbone).values(), weights, strict=True):
        torch.testing.assert_close(gate.linear.weight, weight, msg="once")


def test_only_gates_as_they_were_made_are_opened_further(model, images_for):
    """Those that have been trained stay where that left them."""
    images = images_for(model.backbone.host, 4)
    gates = [*dispatchers(model.backbone).values()]
    with torch.no_grad():
        gates[0].gate.bias.fill_(0.5)
    model.begin_training(10, 1e-3)
    assert [gate.unweighed for gate in gates] == [False, *[True] * (len(gates) - 1)]
    dyntune.training_loss(model, images, torch.arange(4))
    assert gates[0].lead is None and gates[0].linear.bias.item() == pytest.approx(0.5, abs=1e-5)
    assert all(gate.lead is not None for gate in gates[1:])
    model.end_training()
    assert not any(gate.unweighed or gate.lead is not None for gate in gates)


def test_a_training_that_goes_on_keeps_the_lead_without_a_pace(make_host, images_for):
    images = images_for(make_host(), 4)
    runs = []
    for stopped in (False, True):
        torch.manual_seed(0)
        model = dyntune.tune(make_host(), "dyt:rate=0.4,moves=none,explore=none,dropout=0").train()
        model.begin_training(10, 1e-3)
        dyntune.training_loss(model, images, torch.arange(4), step=0)
        if stopped:
            course, state = model.backbone.course_state(), copy.deepcopy(model.state_dict())
            assert {name.rpartition(".")[2] for name in course} == {"lead", "unfitted"}
            model = dyntune.tune(make_host(), "dyt:rate=0.4,moves=none,explore=none,dropout=0").train()
            model.begin_training(10, 1e-3)
            model.backbone.resume_course(course)
            model.load_state_dict(state)
        dyntune.training_loss(model, images, torch.arange(4), step=1)
        runs.append([gate.linear.bias.item() for gate in dispatchers(model.backbone).values()])
    assert runs[0] == runs[1] and len({*runs[0]}) > 1


def test_gates_start_alike_where_nobody_tells_the_length_or_the_recipe_is_the_published_one(make_host, images_for):
    for spec, told in (("dyt", False), ("dyt:recipe=published", True), ("dyt:lead=none,spread=none", True)):
        model = dyntune.tune(make_host(), spec).train()
        if told:
            model.begin_training(10, 1e-3)
        dyntune.training_loss(model, images_for(model.backbone.host, 4), torch.arange(4))
        gates = dispatchers(model.backbone).values()
        assert len({round(gate.linear.bias.item(), 4) for gate in gates}) == 1, spec


def test_what_units_are_worth_draws_no_random_number_and_leaves_no_gradient(model, images_for):
    images = images_for(model.backbone.host, 4)
    model.begin_training(10, 1e-3)
    policy = model.policies[0]
    before = torch.get_rng_state()
    worth = unit_worth(model.eval().backbone, policy.unweighed(model.backbone), images)
    assert torch.equal(before, torch.get_rng_state())
    assert [unit.path for unit in worth] == [*dispatchers(model.backbone)]
    assert [*worth.values()][-1] == 0, "behind the last block, the head reads the class token alone"
    assert min([*worth.values()][:-1]) > 0


@pytest.mark.parametrize("lr", [1e-4, 1e-2])
def test_the_pace_lets_the_length_decide_how_far_gates_move(make_host, images_for, lr):
    """In 4 of 40 steps, Adam moves a bias by at most 4 / 40 of 6 logits, and comes near it where gradients agree."""
    torch.manual_seed(0)
    model = dyntune.tune(make_host(), "dyt:rate=0.4,lead=none").train()
    model.begin_training(40, lr)
    model.backbone.shared["dispatch-mlp"].falls = (0.0, 0.0)  # the rate is the target at once, so all biases fall
    steps(model, images_for, 4, lr)
    for unit, gate in dispatchers(model.backbone).items():
        assert gate.bias_pace.item() == pytest.approx(6 / (40 * lr))
        assert 0.3 < 2.0 - (gate.gate.bias * gate.bias_pace).item() < 0.61, unit


def test_the_pace_of_weights_is_for_features_around_their_mean(make_host, images_for):
    torch.manual_seed(0)
    model = dyntune.tune(make_host(), "dyt:rate=0.4,lead=none,spread=none").train()
    images = images_for(model.backbone.host, 4)
    gates = dispatchers(model.backbone)
    before = {unit: copy.deepcopy(gate.linear) for unit, gate in gates.items()}
    seen = {}

    def watched(unit, scores):
        return lambda patches: scores(seen.setdefault(unit, patches))

    model.begin_training(40, 1e-3)
    for unit, gate in gates.items():
        gate.scores = watched(unit, gate.scores)
    output = dyntune.training_loss(model, images, torch.arange(4)).output
    for unit, gate, recorded in zip(gates, gates.values(), output.gates, strict=True):
        patches = seen[unit].flatten(0, 1)
        size = (patches - patches.mean(0)).square().mean().sqrt().item()
        torch.testing.assert_close(gate.centre, patches.mean(0))
        assert gate.weight_pace.item() == pytest.approx(15 / (40 * 1e-3 * 32 * size), rel=1e-4)
        torch.testing.assert_close(gate.linear.weight, before[unit].weight)
        torch.testing.assert_close(recorded.logits, before[unit](seen[unit]).squeeze(-1), atol=1e-5, rtol=1e-5)


def test_states_are_averaged_as_timm_does(model, images_for):
    """``docs/python.md``: made before the first step, and told its number."""
    average, states = ModelEmaV3(model.train(), decay=0.5), []
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    model.begin_training(8, 1e-2)
    for step in range(3):
        dyntune.training_loss(model, images_for(model.backbone.host, 4), torch.arange(4)).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, step=step)
        states.append({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})
    for name, tensor in average.module.state_dict().items():
        _, second, third = (state[name] for state in states)  # the first two are copied
        if "surrogate" in name:
            assert torch.equal(tensor, third) and tensor.any(), name
        elif tensor.is_floating_point():
            torch.testing.assert_close(tensor, second / 2 + third / 2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("half", ["autocast", "weights"])
def test_gates_learn_in_half_precision_what_they_learn_in_full(half):
    """Features of which most is in common, as in front of MLPs: it cancels out."""
    patches, towards = 5 + 0.5 * torch.randn(8, 64, 32), torch.randn(8, 64)
    learned = []
    for precise in (True, False):
        torch.manual_seed(0)
        gate = Dispatcher(32, 5.0, moves=(6.0, 15.0)).train()
        gate.begin_course(1.0)
        gate = gate.to(torch.bfloat16) if half == "weights" and not precise else gate
        given = patches.to(gate.gate.weight.dtype)
        for _ in range(2):  # the first sets the pace
            gate.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast" and not precise):
                loss = (gate.scores(given).float() * towards).mean()
            loss.backward()
        learned.append(gate.gate.weight.grad.float())
    assert (learned[0] - learned[1]).norm() < (1e-4 if half == "autocast" else 0.1) * learned[0].norm()


@pytest.mark.parametrize("rounding", [0.0, 1e-6])
def test_features_that_are_all_alike_leave_the_weights_as_they_are(model, rounding):
    gate = model.backbone.blocks[0].mlp.dispatcher
    weight = gate.linear.weight.clone()
    model.begin_training(40, 1e-3)
    logits = gate.logits(3.0 + rounding * torch.randn(2, 16, 32))
    torch.testing.assert_close(gate.linear.weight, weight)
    assert gate.weight_pace.item() == pytest.approx(15 / (40 * 1e-3 * 32))
    torch.testing.assert_close(logits, torch.full((2, 16), 2.0), atol=1e-4, rtol=0)


def test_weights_of_zero_are_left_so(model, images_for):
    for gate in dispatchers(model.backbone).values():
        torch.nn.init.zeros_(gate.gate.weight)
    model.begin_training(40, 1e-3)
    dyntune.training_loss(model, images_for(model.backbone.host, 4), torch.arange(4))
    for gate in dispatchers(model.backbone).values():
        assert not gate.linear.weight.any()
        assert gate.linear.bias.item() == pytest.approx(2 + gate.lead.item())


def test_saved_merged_optimised_and_ended_in_the_middle_of_a_training(model, make_host, images_for, tmp_path):
    images = images_for(model.backbone.host, 2)
    model.begin_training(6, 1e-2)
    steps(model, images_for, 5, 1e-2)
    model.eval()
    gates = [gate.values for gate in model.run(images).gates]
    logits = model(images)
    model.save(tmp_path)
    loaded = dyntune.load(tmp_path, backbone=make_host())
    assert not any(gate.paced for gate in dispatchers(loaded.backbone).values())
    optimised = dyntune.optimize(model, masks=True)
    for other in (loaded, optimised):
        torch.testing.assert_close(other(images), logits, atol=1e-5, rtol=1e-5)
        assert all(map(torch.equal, gates, (gate.values for gate in other.run(images).gates)))
    model.end_training()
    assert not any(gate.paced for gate in dispatchers(model.backbone).values())
    torch.testing.assert_close(model(images), logits, atol=1e-6, rtol=1e-5)
    for name, tensor in model.tuned_state().items():
        torch.testing.assert_close(tensor, loaded.tuned_state()[name])


def test_another_training_begins_at_the_weights_of_the_last(model, images_for):
    model.begin_training(6, 1e-2)
    steps(model, images_for, 3, 1e-2)
    bias = [gate.linear.bias.item() for gate in dispatchers(model.backbone).values()]
    model.begin_training(100, 1e-4)
    assert [gate.gate.bias.item() for gate in dispatchers(model.backbone).values()] == pytest.approx(bias)


def test_steps_are_counted_where_nobody_numbers_them(model, images_for):
    model.begin_training(10, 1e-3)
    course = model.backbone.shared["dispatch-mlp"]
    seen = []
    for _ in range(3):
        dyntune.training_loss(model, images_for(model.backbone.host, 2), torch.arange(2))
        seen.append(course.progress)
    assert seen == [0.0, 0.1, 0.2]
    dyntune.training_loss(model, images_for(model.backbone.host, 2), torch.arange(2), step=8)
    assert course.progress == 0.8


def test_a_loop_that_does_not_say_its_length_is_told_once(make_host, images_for, caplog):
    model = dyntune.tune(make_host(), "dyt:rate=0.45,bottleneck=3").train()
    for _ in range(2):
        dyntune.training_loss(model, images_for(model.backbone.host, 2), torch.arange(2))
    assert caplog.text.count("model.begin_training(steps, lr)") == 1
    caplog.clear()
    published = dyntune.tune(make_host(), "dyt:rate=0.45,bottleneck=3,recipe=published").train()
    dyntune.training_loss(published, images_for(model.backbone.host, 2), torch.arange(2))
    assert not caplog.text


@pytest.mark.parametrize("options", [{"steps": 0, "lr": 1e-3}, {"steps": 3, "lr": 1e-3, "accumulate": 0}])
def test_a_training_has_steps(model, options):
    with pytest.raises(SpecError, match="at least 1"):
        model.begin_training(**options)


def test_fit_tells_the_length_and_leaves_plain_gates(make_host, data):
    class Noting(Silent):
        def __init__(self, course):
            self.course, self.seen = course, []

        def step(self, figures):
            self.seen.append(self.course.progress)

    model = dyntune.tune(make_host(), "dyt")
    noting = Noting(model.backbone.shared["dispatch-mlp"])
    dyntune.fit(model, data, epochs=2, batch_size=10, lr=1e-3, device="cpu", progress=noting)
    assert noting.seen == [0.0, 0.25, 0.5, 0.75]
    assert model.backbone.steps is None and noting.course.progress is None
    assert not any(gate.paced for gate in dispatchers(model.backbone).values())


def test_sgd_gives_gates_no_pace(make_host, data):
    model = dyntune.tune(make_host(), "dyt")
    dyntune.fit(model, data, epochs=1, batch_size=10, lr=1e-3, device="cpu", optimizer="sgd")
    assert not any(gate.paced for gate in dispatchers(model.backbone).values())


@pytest.mark.parametrize(
    ("options", "epoch"),
    [("course=0.1/0.4,quiet=0.6", 4), ("course=0.1/0.4,quiet=0.9", 5), ("course=0/0,quiet=0.4", 2), ("quiet=0", 4)],
)
def test_an_epoch_before_gates_have_settled_is_not_the_best(make_host, data, monkeypatch, options, epoch):
    """Validation accuracy falls from epoch to epoch; the first at which the gates do what they will do is kept."""
    from dyntune.training import trainer

    scores = iter([0.9, 0.8, 0.7, 0.6, 0.5])
    evaluate = trainer.evaluate

    def falling(*args, **options):
        evaluation = evaluate(*args, **options)
        evaluation.figures["accuracy"] = next(scores)
        return evaluation

    monkeypatch.setattr(trainer, "evaluate", falling)
    model = dyntune.tune(make_host(), f"dyt:{options}")
    result = dyntune.fit(model, data, data, epochs=5, batch_size=20, device="cpu")
    assert (result.best_epoch, result.best_accuracy) == (epoch, [0.9, 0.8, 0.7, 0.6, 0.5][epoch - 1])


PUBLISHED = {
    "bias": 0.0,
    "course": (0.0, 0.0),
    "quiet": None,
    "moves": None,
    "lead": None,
    "spread": None,
    "rate_weight": 2.0,
    "rate_of": "training",
    "explore": None,
}


def test_the_published_recipe_and_options_that_differ_from_a_recipe():
    published = Dispatch(recipe="published")
    assert {name: published.chosen(name) for name in PUBLISHED} == PUBLISHED
    explicit = Dispatch(**PUBLISHED)
    assert {name: explicit.chosen(name) for name in PUBLISHED} == PUBLISHED
    assert Dispatch(quiet=0.7).chosen("quiet") == 0.7 and Dispatch(quiet=0.7).chosen("bias") == 2.0
    (dyt,) = resolve(["dyt:recipe=published,gate_bias=1,moves=5/9,quiet=none"])
    adapter, dispatch = dyt.expand()
    assert adapter.scale == 0.1 and resolve(["dyt"])[0].expand()[0].scale == 1.0
    assert [dispatch.chosen(name) for name in ("bias", "moves", "quiet", "rate_weight")] == [1.0, (5.0, 9.0), None, 2.0]


@pytest.mark.parametrize(
    "options",
    [
        "course=0.5",
        "course=0.6/0.1",
        "complete_during=0.6/0.1",
        "complete_during=0.2/1.2",
        "complete_during=0.2/0.4/0.6",
        "course=0.5/1.5",
        "quiet=1.1",
        "moves=1",
        "moves=0/3",
        "lead=1",
        "lead=0/3",
        "recipe=slow",
    ],
)
def test_options_that_make_no_sense(options):
    with pytest.raises(SpecError):
        resolve([f"dyt:{options}"])


def test_files_that_know_no_recipe_mean_the_published_one():
    old = {"type": "dispatch", "rate": 0.7, "where": "mlp", "bias": 0.0, "rate_weight": 2.0, "rate_of": "training"}
    part = part_from_dict(old)
    assert part.recipe == "published" and {name: part.chosen(name) for name in PUBLISHED} == PUBLISHED
    assert part_from_dict(Dispatch(rate=0.7).to_dict()).recipe == "steady"


def test_an_older_run_goes_on_with_the_recipe_that_it_began_with(make_host, data):
    def identity(spec):
        return run_identity(dyntune.tune(make_host(), spec), TrainSettings(), data, 1)

    old = identity("dyt:rate=0.7,recipe=published") | {"spec": "dyt:rate=0.7"}
    del old["parts"]
    assert identity_changes(old, identity("dyt:rate=0.7,recipe=published")) == []
    (change,) = identity_changes(old, identity("dyt:rate=0.7"))
    assert "recipe=published" in change
    (change,) = identity_changes(identity("dyt:rate=0.7"), identity("dyt:rate=0.6"))
    assert change == "spec was dyt:rate=0.7, is dyt:rate=0.6"
    assert identity_changes(identity("dyt"), identity("adaptformer:scale=1+dispatch")) == []


def test_a_run_whose_recipe_chose_otherwise_does_not_go_on_with_todays(make_host, data):
    def identity(spec):
        return run_identity(dyntune.tune(make_host(), spec), TrainSettings(), data, 1)

    before = "lead=none,spread=none,rate_weight=10,complete_during=0/1,feature_weight=0,surrogate=none"
    old = identity("dyt:rate=0.7")
    old["parts"] = [part.to_dict() for part in expand(resolve(["dyt:rate=0.7"]))]
    (change,) = identity_changes(old, identity("dyt:rate=0.7"))
    assert "lead=none,spread=none,course=0.1/0.6,quiet=0.85," in change and "stands for something else" in change
    assert identity_changes(old, identity(f"dyt:rate=0.7,quiet=0.85,{before}")) == []
    former = identity("dyt:rate=0.7")
    del former["parts"][1]["lead"], former["parts"][1]["spread"]
    del former["parts"][1]["complete_during"], former["parts"][1]["surrogate"]
    del former["parts"][1]["feature_weight"]
    former["parts"][1]["rate_weight"] = 10.0
    (change,) = identity_changes(former, identity("dyt:rate=0.7"))
    assert "lead=none" in change and "rate_weight=10" in change
    assert "complete_during=0/1,surrogate=none" in change
    assert identity_changes(former, identity(f"dyt:rate=0.7,{before}")) == []
    assert identity_changes(identity("dispatch:where=attn"), identity("dispatch:where=attn,bias=2")) == []


def test_parts_of_an_older_run_are_those_of_its_files():
    (dyt,) = resolve(["dyt:recipe=published"])
    assert expand([part_from_dict({"type": "dyt"})]) == expand([dyt])


def test_resuming_with_another_recipe_is_refused(make_host, data, tmp_path):
    dyntune.fit(dyntune.tune(make_host(), "dyt"), data, out=tmp_path, epochs=1, batch_size=20, device="cpu")
    with pytest.raises(TrainingError, match="recipe=published"):
        other = dyntune.tune(make_host(), "dyt:recipe=published")
        dyntune.fit(other, data, out=tmp_path, resume=True, epochs=1, batch_size=20, device="cpu")


def test_the_complete_model_runs_during_a_part_of_the_training(make_host, images_for):
    model = dyntune.tune(make_host(), "dyt:complete_during=0.2/0.6,lead=none").train()
    images, labels = images_for(model.backbone.host, 4), torch.arange(4)

    def complete(step):
        seen.clear()
        terms = dyntune.training_loss(model, images, labels, step=step).terms.keys()
        return len(seen) == 2 and terms == {"task", "rate", "complete", "distill", "feature"}

    seen = []
    model.backbone.host.head.register_forward_hook(lambda *_: seen.append(1))
    assert complete(0), "nobody has said how long the training is"
    model.begin_training(10, 1e-3)
    assert [step for step in range(12) if complete(step)] == [2, 3, 4, 5]
    model.eval()
    assert complete(7), "evaluation is no part of the training"
    always = dyntune.tune(make_host(), "dyt:complete_during=0/1,lead=none").train()
    always.begin_training(10, 1e-3)
    steps = [dyntune.training_loss(always, images, labels, step=step).terms for step in (0, 9, 12)]
    assert all("complete" in terms for terms in steps)


def test_files_of_a_version_with_an_option_that_is_no_more_are_read(make_host):
    (dyt,) = resolve(["dyt"])
    assert part_from_dict(dyt.to_dict() | {"complete_course": False}) == dyt


def test_a_saved_model_that_knows_no_recipe_keeps_the_name_of_its_preset(make_host, tmp_path):
    dyntune.tune(make_host(), "dyt:rate=0.7,recipe=published").save(tmp_path)
    file = tmp_path / CONFIG
    config = json.loads(file.read_text())
    config["spec"] = "dyt:rate=0.7"
    del config[SEAL]
    for name in ("recipe", "course", "quiet", "moves", "lead", "spread", "complete_during"):
        del config["parts"][1][name]
    config["parts"][1] |= {"bias": 0.0, "rate_weight": 2.0, "rate_of": "training", "explore": None}
    file.write_text(json.dumps(config))
    loaded = dyntune.load(tmp_path, backbone=make_host())
    (dispatch,) = loaded.policies
    assert {name: dispatch.chosen(name) for name in PUBLISHED} == PUBLISHED
    assert loaded.methods[0].scale == 0.1
    assert loaded.spec == "dyt:rate=0.7,recipe=published"
