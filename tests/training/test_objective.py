"""The training loss against its terms, computed one by one from the two forward passes."""

import pytest
import torch
import torch.nn.functional as F

import dyntune
from dyntune.core.errors import BackboneError
from dyntune.model.features import features
from dyntune.parts.policies.base import Gate, Output
from dyntune.parts.policies.dispatch import Dispatch

TARGETS = torch.tensor([0, 3, 1, 4])


@pytest.fixture
def build(make_host, randomise):
    """``build(spec)``: a model in train mode with random weights and without dropout, so that only gates are random."""

    def build(spec, name="average"):
        return randomise(dyntune.tune(make_host(name), spec), 1).train()

    return build


def loss_of(model, images_for, **options):
    torch.manual_seed(3)
    return dyntune.training_loss(model, images_for(model.backbone.host, 4), TARGETS, **options)


def passes(model, images_for):
    """The dispatched and the complete pass with the noise of ``loss_of``."""
    torch.manual_seed(3)
    images = images_for(model.backbone.host, 4)
    return model.run(images), model.run(images, complete=True)


def test_rate_term_on_fixed_masks():
    policy = Dispatch(rate=0.5, recipe="published")
    mine = [Gate("a", torch.tensor([[1.0, 1, 1, 0], [1, 1, 1, 0]]), policy), Gate("b", torch.ones(2, 4), policy)]
    other = Gate("c", torch.zeros(2, 4), Dispatch(rate=0.1))
    terms = policy.loss_terms(Output(torch.zeros(2, 2), (*mine, other), (2, 2)), None)
    assert set(terms) == {"rate"}
    assert terms["rate"].item() == pytest.approx(2 * (7 / 8 - 0.5) ** 2)


def test_terms_of_the_complete_model_count_once_however_many_policies_there_are(build, images_for):
    model = build(
        "dispatch:where=attn,rate_weight=0,complete_weight=0.5,distill_weight=3"
        "+dispatch:where=mlp,rate_weight=0,complete_weight=2,distill_weight=1"
    )
    loss = loss_of(model, images_for)
    output, complete = passes(model, images_for)
    torch.testing.assert_close(loss.terms["complete"], 2 * F.cross_entropy(complete.logits, TARGETS))
    log_p = complete.logits.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - output.logits.log_softmax(-1))).sum() / len(TARGETS)
    torch.testing.assert_close(loss.terms["distill"], 3 * divergence, atol=1e-6, rtol=1e-4)


def test_what_units_are_worth_takes_no_gradient_from_the_first_step_in_mixed_precision(build, images_for):
    """What autocast casts without a graph may be kept, and be met by the step that trains."""
    model = build("dyt:rate=0.5")
    model.begin_training(10, 1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, images_for)
    loss.total.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_dyt_loss_is_the_four_published_terms(build, images_for):
    model = build("dyt:rate=0.3,dropout=0,recipe=published")
    loss = loss_of(model, images_for)
    output, complete = passes(model, images_for)
    gates = torch.cat([gate.values.flatten() for gate in output.gates])
    teacher = complete.logits.softmax(-1)
    divergence = (teacher * (teacher.log() - output.logits.log_softmax(-1))).sum() / 4
    expected = {
        "task": F.cross_entropy(output.logits, TARGETS),
        "rate": 2 * (gates.mean() - 0.3) ** 2,
        "complete": F.cross_entropy(complete.logits, TARGETS),
        "distill": divergence,
    }
    assert loss.terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(loss.terms[name], value, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(loss.total, sum(expected.values()))
    assert torch.equal(loss.output.logits, output.logits)
    assert min(value.item() for value in expected.values()) > 1e-4


@pytest.mark.parametrize("term", ["rate", "complete", "distill", "feature"])
def test_coefficients_scale_their_terms_and_zero_drops_them(build, images_for, term):
    reference = loss_of(build("dyt:dropout=0"), images_for).terms
    doubled = loss_of(
        build(f"dyt:dropout=0,{term}_weight={20 if term in ('rate', 'feature') else 2}"), images_for
    ).terms
    dropped = loss_of(build(f"dyt:dropout=0,{term}_weight=0"), images_for)
    torch.testing.assert_close(doubled[term], 2 * reference[term])
    assert set(dropped.terms) == set(reference) - {term}
    torch.testing.assert_close(dropped.total, sum(value for name, value in reference.items() if name != term))


@pytest.mark.parametrize(
    "options,runs", [("", 2), (",complete_weight=0", 2), (",complete_weight=0,distill_weight=0,feature_weight=0", 1)]
)
def test_complete_model_runs_at_most_once(build, images_for, options, runs):
    model = build("dyt:dropout=0" + options)
    seen = []
    model.backbone.host.head.register_forward_hook(lambda *_: seen.append(1))
    loss_of(model, images_for)
    assert len(seen) == runs


def test_model_without_policies_has_the_task_alone(build, images_for):
    loss = loss_of(build("adaptformer:dropout=0"), images_for)
    assert set(loss.terms) == {"task"}
    assert torch.equal(loss.total, loss.terms["task"])


def gradients(model, value):
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True, retain_graph=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None and g.abs().max() > 0}


def test_complete_term_trains_adapters_and_head_but_not_dispatchers(build, images_for):
    model = build("dyt:dropout=0")
    terms = loss_of(model, images_for).terms
    reached = gradients(model, terms["complete"])
    assert any("adapter" in name for name in reached)
    assert any("head" in name for name in reached)
    assert not any("dispatcher" in name for name in reached)
    for name in ("task", "rate", "distill", "feature"):
        assert any("dispatcher" in parameter for parameter in gradients(model, terms[name]))


def test_teacher_is_detached_in_the_distillation(build, images_for):
    model = build("dyt:dropout=0")
    found = gradients(model, loss_of(model, images_for).terms["distill"])
    output, complete = passes(model, images_for)
    fixed = complete.logits.detach().log_softmax(-1)
    expected = gradients(model, F.kl_div(output.logits.log_softmax(-1), fixed, reduction="batchmean", log_target=True))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


def test_the_feature_term_is_how_far_features_are_from_those_of_the_complete_model(build, images_for):
    """Beyond 4 % of the latter's square, as far as that model knows the images; it learns nothing by the term."""
    model = build("dispatch:where=mlp,feature_weight=3")
    quarter = lambda logits, targets: F.cross_entropy(logits, targets) / 4  # noqa: E731
    term = loss_of(model, images_for, criterion=quarter).terms["feature"]
    found = gradients(model, term)
    output, complete = passes(model, images_for)
    own, wanted = (model.backbone.pooled(each.tokens) for each in (output, complete))
    wanted = wanted.detach()
    shares = [((a - b).norm() / b.norm()) ** 2 for a, b in zip(own, wanted, strict=True)]
    knows = quarter(complete.logits, TARGETS).mul(-6).exp().item()
    wished = 3 * knows * sum((share - 0.04).clamp_min(0) for share in shares) / 4
    torch.testing.assert_close(term, wished)
    assert 0.01 < term.item() / 3 / knows < 4 and 1e-3 < knows < 0.2
    expected = gradients(model, wished)
    assert found.keys() == expected.keys() and any("dispatcher" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


def test_criterion_and_soft_targets_are_used_for_both_passes(build, images_for):
    model = build("dyt:dropout=0,distill_weight=0,feature_weight=0,rate_weight=0")
    torch.manual_seed(3)
    targets = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)
    loss = dyntune.training_loss(
        model, images_for(model.backbone.host, 4), targets, lambda logits, shares: (logits - shares).square().sum()
    )
    output, complete = passes(model, images_for)
    torch.testing.assert_close(loss.terms["task"], (output.logits - targets).square().sum())
    torch.testing.assert_close(loss.terms["complete"], (complete.logits - targets).square().sum())


def test_two_policies_each_add_their_rate_loss(build, images_for):
    model = build(
        "dispatch:recipe=published,where=attn,rate=0.2,complete_weight=0,distill_weight=0"
        "+dispatch:recipe=published,where=mlp,rate=0.9,complete_weight=0,distill_weight=0"
    )
    loss = loss_of(model, images_for)
    output, _ = passes(model, images_for)
    expected = F.cross_entropy(output.logits, TARGETS)
    for kind, rate in (("attn", 0.2), ("mlp", 0.9)):
        gates = torch.cat([gate.values.flatten() for gate in output.gates if gate.unit.endswith(kind)])
        expected = expected + 2 * (gates.mean() - rate) ** 2
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(loss.total, sum(loss.terms.values()))


def test_rate_loss_alone_leads_the_gates_to_the_target(build, images_for):
    model = build("dispatch:rate=0.2,temperature=1,complete_weight=0,distill_weight=0,feature_weight=0")
    gates = [unit.dispatcher for unit in model.backbone.units("mlp")]
    optimiser = torch.optim.Adam([p for gate in gates for p in gate.parameters()], lr=0.05)
    torch.manual_seed(0)
    images = images_for(model.backbone.host, 16)
    for _ in range(60):
        rate = dyntune.training_loss(model, images, torch.zeros(16, dtype=torch.long)).terms["rate"]
        optimiser.zero_grad()
        rate.backward()
        optimiser.step()
    with torch.no_grad():
        share = torch.stack([gate.values.mean() for gate in model.run(images).gates]).mean().item()
    assert share == pytest.approx(0.2, abs=0.06)


@pytest.mark.parametrize("pool,policy", [("avg", "tome:r=2"), ("avg", "evit:keep=0.5,layers=1"), ("", "tome:r=2")])
def test_the_feature_term_knows_merged_and_dropped_tokens_and_heads_that_read_every_patch(
    make_host, randomise, images_for, pool, policy
):
    model = randomise(dyntune.tune(make_host(global_pool=pool), f"dispatch:distill_weight=0+{policy}"), 1).train()
    criterion = lambda outputs, _: outputs.square().mean()  # noqa: E731
    terms = loss_of(model, images_for, criterion=criterion, epoch=1.0).terms
    assert 0.01 < terms["feature"].item() / terms["complete"].mul(-6).exp().item() < 100


def test_features_of_a_head_of_another_kind_are_those_of_every_place(make_host, images_for, monkeypatch):
    """Merged patches share those of their token; those of dropped ones are zeros."""

    def pooled(tokens):
        raise BackboneError("a head of another kind")

    images = images_for(make_host(), 2)
    for policy in ("tome:r=2", "evit:keep=0.5,layers=1,fuse=false"):
        model = dyntune.tune(make_host(), policy).eval()
        monkeypatch.setattr(model.backbone, "pooled", pooled)
        output = model.run(images)
        found = features(model.backbone, output)
        whole = features(model.backbone, model.run(images, complete=True))
        assert found.shape == whole.shape == (2, 1 + 16, 32)
        assert torch.equal(found[:, 0], output.tokens.x[:, 0])
        kept = found[:, 1:].abs().sum(-1) > 0
        assert kept.sum().item() == (2 * 16 if policy.startswith("tome") else 2 * 8)
        rows = {tuple(row) for row in found[0, 1:][kept[0]].tolist()}
        assert rows == {tuple(row) for row in output.tokens.patches[0].tolist()}
