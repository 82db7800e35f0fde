"""What lowers a training step's cost: it computes less, and the loss and its expected gradient stay what they were."""

from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import dyntune
from dyntune.commands.main import app
from dyntune.core.errors import SpecError, TrainingError
from dyntune.model import forward
from dyntune.model.executions import Masked, Sampled
from dyntune.model.forward import run
from dyntune.parts.policies.base import CompletePass, Gate
from dyntune.parts.policies.gating import GatingPolicy
from dyntune.training.settings import TrainSettings
from dyntune.training.state import RunState

TARGETS = torch.tensor([0, 3, 1, 4])
DRAWS = 150
BARE = "dispatch:recipe=published,complete_weight=0,distill_weight=0,rate_weight=0"


@dataclass(frozen=True)
class GivenGates(GatingPolicy):
    """Gates the MLPs with given values, which the test asks for the gradient of."""

    values: tuple
    share: float | None

    def __post_init__(self):
        pass

    def gates(self, unit):
        return unit.kind == "mlp"

    def gate(self, unit, tokens):
        return Gate(unit.path, self.values[int(unit.path.split(".")[1])], self)

    def explored(self, unit):
        return self.share


@pytest.fixture
def build(make_host, randomise):
    """``build(spec, name)``: a model in train mode with random weights."""

    def build(spec, name="registers", **changes):
        return randomise(dyntune.tune(make_host(name, **changes), spec), 1).train()

    return build


def gates_for(model, images, seed=0):
    """Random gates, one tensor per block; the first image is skipped as a whole and the second computed as a whole."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = model.backbone.grid
    values = []
    for _ in model.backbone.blocks:
        gate = (torch.rand(len(images), rows * columns, generator=generator) > 0.6).float()
        gate[0], gate[1] = 0, 1
        values.append(gate.requires_grad_())
    return tuple(values)


def gradients(model, images, gates, execution, share):
    """Logits, gradients of the gates, and those of the trained parameters."""
    logits = run(model.backbone, (GivenGates(gates, share),), images, execution).logits
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(F.cross_entropy(logits, TARGETS), [*gates, *trained])
    return logits, torch.stack(found[: len(gates)]), found[len(gates) :]


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_forward_is_that_of_masked(build, images_for, any_host_name, share):
    model = build("adaptformer:dropout=0", any_host_name)
    images = images_for(model.backbone.host, 4)
    gates = gates_for(model, images)
    masked = run(model.backbone, (GivenGates(gates, None),), images, Masked()).logits
    torch.manual_seed(0)
    sampled = run(model.backbone, (GivenGates(gates, share),), images, Sampled()).logits
    torch.testing.assert_close(sampled, masked, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["adaptformer:dropout=0", "lora:dropout=0", "ssf"])
def test_gate_gradients_are_those_of_masked_on_average_and_all_others_in_every_draw(build, images_for, method):
    model = build(method, "average")  # a head that reads every token, so that every gate matters
    images = images_for(model.backbone.host, 4)
    gates = gates_for(model, images)
    _, expected, others = gradients(model, images, gates, Masked(), None)
    torch.manual_seed(0)
    draws, rest = [], []
    for _ in range(DRAWS):
        _, found, own = gradients(model, images, gates, Sampled(), 0.3)
        draws.append(found)
        rest.append(torch.cat([gradient.flatten() for gradient in own]))
    drawn = torch.stack(draws)
    theirs = torch.cat([gradient.flatten() for gradient in others]).expand(DRAWS, -1)
    torch.testing.assert_close(torch.stack(rest), theirs, atol=1e-6, rtol=1e-3)
    active = torch.stack(gates) > 0.5
    torch.testing.assert_close(drawn[:, active], expected[active].expand(len(drawn), -1), atol=1e-6, rtol=1e-3)
    skipped = drawn[:, ~active]
    counted = skipped != 0
    assert 0.25 < counted.float().mean() < 0.35
    whole = (expected[~active] / 0.3).expand_as(skipped)
    torch.testing.assert_close(skipped[counted], whole[counted], atol=1e-6, rtol=1e-3)
    # Each gate's mean over draws of probability 0.3 has a standard error of this share of its value.
    standard = (0.7 / 0.3 / DRAWS) ** 0.5
    error = (skipped.mean(0) - expected[~active]).abs() / expected[~active].abs().clamp_min(1e-9)
    assert error.max() < 5 * standard
    assert expected[~active].abs().max() > 1e-4


@pytest.mark.parametrize("where", ["mlp", "attn-mlp"])
def test_exploring_everything_gives_the_published_loss_and_gradient(build, images_for, where):
    results = []
    for explore in ("none", "1"):
        model = build(f"dyt:dispatch={where},explore={explore}").double()
        torch.manual_seed(3)
        loss = dyntune.training_loss(model, images_for(model.backbone.host, 4).double(), TARGETS)
        loss.total.backward()
        results.append((loss.terms, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (terms, published), (same_terms, same) = results
    torch.testing.assert_close(same_terms, terms)
    assert published.keys() == same.keys() and any("dispatcher" in name for name in published)
    torch.testing.assert_close(same, published)


def rows_of_the_mlp(model, images, block=0):
    """Rows that a block's MLP computes with a graph and without, and its active patches."""
    rows = {True: 0, False: 0}

    def count(_, inputs, output):
        rows[torch.is_grad_enabled()] += inputs[0].flatten(0, -2).shape[0]

    with model.backbone.host.blocks[block].mlp.register_forward_hook(count):
        output = model.run(images)
    return rows[True], rows[False], int(output.gates[block].values.sum())


def test_only_active_and_explored_tokens_are_computed_and_the_explored_ones_without_a_graph(build, images_for):
    model = build(f"adaptformer+{BARE},explore=0.2")
    images = images_for(model.backbone.host, 32)
    torch.manual_seed(0)
    graph, bare, active = rows_of_the_mlp(model, images)
    patches, prefix = 32 * 16, 32 * 5
    assert graph == active + prefix
    assert 0 < bare < 0.3 * (patches - active) < patches - active
    model = build(f"adaptformer+{BARE},explore=1")
    torch.manual_seed(0)
    graph, bare, active = rows_of_the_mlp(model, images)
    assert (graph, bare) == (active + prefix, patches - active)


def test_images_of_which_nothing_is_active_still_teach_their_gates(build, images_for):
    model = build(f"{BARE},explore=0.5", "siglip")
    for unit in model.backbone.units("mlp"):
        torch.nn.init.constant_(unit.dispatcher.gate.bias, -50.0)
    torch.manual_seed(0)
    output = model.run(images_for(model.backbone.host, 4))
    assert sum(gate.values.sum() for gate in output.gates) == 0
    F.cross_entropy(output.logits, TARGETS).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_mlps_that_are_dropped_for_whole_images_are_masked(build, images_for):
    model = build(f"{BARE},explore=0.1", drop_path_rate=0.3)
    images = images_for(model.backbone.host, 4)
    graph, _, active = rows_of_the_mlp(model, images, block=0)  # which is never dropped
    assert graph == active + 4 * 5 < 4 * 21
    assert rows_of_the_mlp(model, images, block=1)[:2] == (4 * 21, 0)


@pytest.mark.parametrize("spec", ["dyt:explore=0.3", "dyt:explore=0.3,dispatch=attn-mlp"])
def test_recomputed_blocks_draw_the_same_tokens(build, images_for, spec):
    results = []
    for checkpointing in (False, True):
        model = build(spec)
        model.backbone.switch_gradient_checkpointing(checkpointing)
        torch.manual_seed(5)
        loss = dyntune.training_loss(model, images_for(model.backbone.host, 4), TARGETS).total
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, plain), (same_loss, recomputed) = results
    assert loss == same_loss
    assert any("dispatcher" in name for name in plain)
    torch.testing.assert_close(recomputed, plain)


def test_recomputed_blocks_tell_pytorch_their_device(build, images_for, monkeypatch):
    """torch.utils.checkpoint keeps the random state of the devices of its tensor arguments, whatever they contain."""
    given = []
    original = forward.checkpoint
    monkeypatch.setattr(forward, "checkpoint", lambda *a, **k: given.append(a) or original(*a, **k))
    model = build("dyt")
    model.backbone.switch_gradient_checkpointing(True)
    model(images_for(model.backbone.host, 2))
    assert len(given) == 3
    assert all(any(isinstance(a, torch.Tensor) for a in arguments) for arguments in given)


@pytest.mark.parametrize("explore", ["0.3", "1"])
def test_bfloat16_autocast_explores(build, images_for, explore):
    model = build(f"dyt:rate=0.45,explore={explore}")  # not what the gates happen to let through
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = dyntune.training_loss(model, images_for(model.backbone.host, 4), TARGETS)
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert all(unit.dispatcher.gate.weight.grad.abs().max() > 0 for unit in model.backbone.units("mlp"))


def test_weights_that_autocast_casts_for_both_kinds_of_tokens_are_trained(build, images_for):
    model = build("full+dyt:explore=1,complete_weight=0")
    with torch.autocast("cpu", torch.bfloat16):
        loss = dyntune.training_loss(model, images_for(model.backbone.host, 4), TARGETS)
    loss.total.backward()
    for block in model.backbone.host.blocks:
        assert block.mlp.fc1.weight.grad.abs().max() > 0


# The complete model


def complete_runs(model):
    """Whether a graph was built for the logits of each complete pass from now on, and how many images it had."""
    seen = []
    original = model.run

    def watched(images, *, complete=False, execution=None):
        output = original(images, complete=complete, execution=execution)
        if complete:
            seen.append((output.logits.requires_grad, len(images)))
        return output

    model.run = watched
    return seen


def loss_of(model, images_for, **options):
    torch.manual_seed(3)
    return dyntune.training_loss(model, images_for(model.backbone.host, 4), TARGETS, **options)


def test_complete_model_without_a_loss_of_its_own_is_a_teacher_without_a_graph(build, images_for):
    expected = loss_of(build("dyt:dropout=0"), images_for).terms["distill"]
    model = build("dyt:dropout=0,complete_weight=0")
    seen = complete_runs(model)
    loss = loss_of(model, images_for)
    assert seen == [(False, 4)]
    assert set(loss.terms) == {"task", "rate", "distill", "feature"}
    torch.testing.assert_close(loss.terms["distill"], expected)
    assert loss.terms["distill"].requires_grad


def test_complete_model_runs_in_every_kth_step_and_counts_k_times(build, images_for):
    once = loss_of(build("dyt:dropout=0"), images_for).terms
    model = build("dyt:dropout=0,complete_every=3,complete_during=0/1")
    for step in range(7):
        terms = loss_of(model, images_for, step=step).terms
        assert ("complete" in terms) == ("distill" in terms) == (step in (0, 3, 6))
        if step in (0, 3, 6):
            torch.testing.assert_close(terms["complete"], 3 * once["complete"])
            torch.testing.assert_close(terms["distill"], 3 * once["distill"])
        torch.testing.assert_close(terms["task"], once["task"])
    torch.testing.assert_close(loss_of(model, images_for).terms, once)


def test_steps_of_the_complete_model_are_counted_where_the_training_has_been_told(build, images_for):
    model = build("dyt:dropout=0,complete_every=3,complete_during=0/1")
    seen = complete_runs(model)

    def passes(steps=4, **options):
        """In which of the next steps the complete model ran."""
        ran = []
        for index in range(steps):
            before = len(seen)
            loss_of(model, images_for, **options)
            ran += [index] if len(seen) > before else []
        return ran

    assert passes() == [0, 1, 2, 3]
    model.begin_training(10, 1e-3)
    assert passes() == [0, 3]
    assert passes(1, step=5) == [] and passes() == [0, 3]  # steps 6 to 9
    model.eval()
    assert passes(2) == [0, 1], "no step of the training"
    model.train()
    model.end_training()
    assert passes() == [0, 1, 2, 3]


@pytest.mark.parametrize("share,count", [("0.1", 1), ("0.5", 2), ("0.6", 3)])
def test_complete_model_runs_on_a_share_of_the_batch_and_its_terms_are_means_over_it(build, images_for, share, count):
    model = build(f"dyt:dropout=0,complete_share={share}", "average")
    seen = complete_runs(model)
    loss = loss_of(model, images_for)
    assert seen == [(True, count)]
    with torch.no_grad():
        complete = model.run(images_for(model.backbone.host, 4)[:count], complete=True).logits
    torch.testing.assert_close(loss.terms["complete"], F.cross_entropy(complete, TARGETS[:count]))
    log_p, log_q = complete.log_softmax(-1), loss.output.logits[:count].log_softmax(-1)
    torch.testing.assert_close(loss.terms["distill"], (log_p.exp() * (log_p - log_q)).sum() / count)


def test_several_policies_share_one_complete_pass_of_the_largest_demand():
    first, second = CompletePass(1, 0, every=4, share=0.2), CompletePass(0.5, 2, every=3, share=0.1)
    assert first.joined(second) == second.joined(first) == CompletePass(1, 2, every=3, share=0.2)
    nothing = CompletePass()
    assert first.joined(nothing) == nothing.joined(first) == first
    assert not nothing.joined(nothing).wanted


@pytest.mark.parametrize("option", ["explore=0", "explore=1.5", "complete_every=0", "complete_share=0"])
def test_senseless_values_are_refused(make_host, option):
    with pytest.raises(SpecError, match=f"expected {option.split('=')[0]}"):
        dyntune.tune(make_host(), f"dyt:{option}")


# Whole runs


def photographs(host, count=24):
    generator = torch.Generator().manual_seed(0)
    shape = (count, host.in_chans, *host.patch_embed.img_size)
    return TensorDataset(torch.randn(shape, generator=generator), torch.arange(count) % 5)


def fitted(build, spec, out=None, resume=False, progress=None, **options):
    model = build(spec)
    options = {"epochs": 2, "batch_size": 4, "lr": 1e-2, "device": "cpu"} | options
    dyntune.fit(model, photographs(model.backbone.host), out=out, resume=resume, progress=progress, **options)
    return model


class StopAt:
    """Fails at a step, as a crash does between two of them."""

    def __init__(self, step):
        self.left = step

    def __enter__(self):
        return self

    def __exit__(self, *error): ...

    def epoch(self, *position): ...

    def step(self, figures):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def evaluated(self, evaluation): ...

    def saved(self, epoch, folder): ...


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_stopped_run_that_explores_continues_to_the_same_bits(build, tmp_path, accumulate):
    spec = "dyt:explore=0.3,complete_every=4"  # 6 steps in an epoch, so that the turns do not begin anew with it
    options = {"epochs": 3, "accumulate": accumulate}
    whole = fitted(build, spec, **options)
    with pytest.raises(KeyboardInterrupt):
        fitted(build, spec, tmp_path / "run", progress=StopAt(9), **options)
    assert RunState.read(tmp_path / "run").epoch == 1
    resumed = fitted(build, spec, tmp_path / "run", resume=True, **options)
    for name, tensor in whole.tuned_state().items():
        assert torch.equal(tensor, resumed.tuned_state()[name]), name


def test_fit_counts_the_steps_of_the_whole_run_for_the_complete_model(build):
    terms = []

    class Watch(StopAt):
        def step(self, figures):
            terms.append("loss_complete" in figures)

    fitted(build, "dyt:complete_every=4,complete_during=0/1", progress=Watch(0))
    assert [index for index, there in enumerate(terms) if there] == [0, 4, 8]
    assert len(terms) == 12


def test_gradient_checkpointing_trains_to_the_same_weights_and_leaves_the_switch_alone(build):
    recomputed = []

    class Watch(StopAt):
        def step(self, figures):
            recomputed.append(figures["loss"])

    plain = fitted(build, "dyt:explore=0.3")
    model = fitted(build, "dyt:explore=0.3", gradient_checkpointing=True, progress=Watch(0))
    for name, tensor in plain.tuned_state().items():
        torch.testing.assert_close(model.tuned_state()[name], tensor, msg=name)
    assert recomputed
    assert not model.backbone.gradient_checkpointing


def test_gradient_checkpointing_is_on_while_training_and_may_change_on_resume(build, tmp_path, monkeypatch):
    calls = []
    original = forward.checkpoint
    monkeypatch.setattr(forward, "checkpoint", lambda *a, **k: calls.append(1) or original(*a, **k))
    with pytest.raises(KeyboardInterrupt):
        fitted(build, "dyt:complete_during=0/1", tmp_path / "run", progress=StopAt(9))
    assert not calls
    fitted(build, "dyt:complete_during=0/1", tmp_path / "run", resume=True, gradient_checkpointing=True)
    assert len(calls) == 6 * 3 * 2, "steps, blocks, and the two passes of a step"
    assert TrainSettings(gradient_checkpointing=True).differences({}) == []
    with pytest.raises(TrainingError, match="true or false"):
        TrainSettings(gradient_checkpointing="yes")


# What autograd does not keep


def test_nothing_is_kept_for_the_backward_pass_before_the_first_trained_tensor(build, images_for):
    model = build("dyt", "average")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tokens = model.backbone.embed(images_for(model.backbone.host, 4))
        first = model.backbone.blocks[0]
        tokens = Masked().plain(first.attn, tokens)
        assert not kept and not tokens.x.requires_grad
        tokens, _ = Masked().gated(first.mlp, tokens, model.policies[0])
        assert kept and tokens.x.requires_grad


@pytest.mark.parametrize("command,trains,method", [("train", "fit", "--method"), ("compare", "compare", "--methods")])
def test_the_command_line_asks_for_gradient_checkpointing(photos, tmp_path, monkeypatch, command, trains, method):
    class Asked(Exception):
        pass

    def stop(*_, settings, **__):
        raise Asked(settings)

    monkeypatch.setattr(import_module(f"dyntune.commands.{command}"), trains, stop)
    words = [command, str(photos), method, "linear", "--out", str(tmp_path / "run")]
    for more, expected in (([], False), (["--grad-checkpointing"], True)):
        raised = CliRunner().invoke(app, words + more).exception
        assert isinstance(raised, Asked), raised
        assert raised.args[0].gradient_checkpointing is expected


@pytest.mark.parametrize("where", ["attn", "layer"])
def test_exploring_is_refused_where_there_is_no_gated_mlp(where):
    with pytest.raises(SpecError, match="MLPs have gates of their own"):
        dyntune.tune(torch.nn.Identity(), f"dispatch:where={where},explore=0.1")
