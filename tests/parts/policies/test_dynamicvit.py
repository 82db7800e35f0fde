"""DynamicViT against figures recorded from the public code, and against its equations written out."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F

import dyntune
from dyntune.core.errors import BackboneError, SpecError
from dyntune.core.shapes import shapes_only
from dyntune.model.objective import dense_output
from dyntune.parts.policies import dynamicvit
from dyntune.parts.policies.dispatcher import Dispatcher

SPEC = "dynamicvit:keep=0.7/0.4,layers=1/2"
HOSTS = ("plain", "deit3", "registers", "distilled", "average", "qk_norm", "swiglu", "oblong", "clip", "siglip")
OURS = {r"^embed\.": "in_conv.", r"^score\.": "out_conv."}


@pytest.fixture
def silent(monkeypatch):
    """Training without noise."""
    monkeypatch.setattr(dynamicvit, "gumbel_difference", torch.zeros_like)


@pytest.fixture
def build(make_host, randomise, images_for, monkeypatch):
    """``build(host name, *specs)``: a model with random weights whose stages, without noise, keep most patches."""

    def build(name, *specs, **changes):
        model = randomise(dyntune.tune(make_host(name, **changes), *(specs or (SPEC,))), seed=3)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        images = images_for(model.backbone.host, 4)
        for _, stage in stages(model):
            seen = []
            hook = stage.score.register_forward_hook(lambda *made, seen=seen: seen.append(made[-1]))
            with monkeypatch.context() as patch, torch.no_grad():
                patch.setattr(dynamicvit, "gumbel_difference", torch.zeros_like)
                model.train().run(images)
                hook.remove()
                stage.score[-1].bias[0] -= (seen[0][..., 0] - seen[0][..., 1]).quantile(0.2)
        return model.eval()

    return build


def stages(model):
    return [(index, b.reducers["dynamicvit"]) for index, b in enumerate(model.backbone.blocks) if stage_of(b)]


def stage_of(block):
    return [reducer for reducer in block.reducers.values() if isinstance(reducer, dynamicvit.Stage)]


def recorded_model(recorded, spec, bias=0.0):
    model = dyntune.tune(recorded.host(), "linear", spec)
    for number, (_, stage) in enumerate(stages(model)):
        name = f"score_predictor.{number}."
        for part, module in (("in_conv.", stage.embed), ("out_conv.", stage.score)):
            recorded.fill(module, name + part)
        with torch.no_grad():
            if bias:
                stage.score[-1].bias.copy_(torch.tensor([bias, -bias]))
    return model


@pytest.mark.parametrize(
    "keep,line,counts",
    [
        ("0.9/0.7/0.5", ".4704 .6522 -.9105 -2.0532 .4075 | .5043 .5356 -1.2181 | 22.7089", [177, 138, 99]),
        ("0.7/0.49/0.343", ".4718 .6798 -.9290 -2.0275 .3882 | .5439 .5328 -1.1895 | 23.0436", [138, 97, 68]),
    ],
)
@torch.no_grad()
def test_logits_recorded_from_the_public_code(recorded, keep, line, counts):
    model = recorded_model(recorded, f"dynamicvit:keep={keep}").eval()
    output = model.run(recorded.images)
    recorded.check(output.logits, line)
    assert [(record.unit, record.count) for record in output.reductions] == [
        (f"blocks.{layer}", count) for layer, count in zip((3, 6, 9), counts, strict=True)
    ]
    for image, expected in zip(recorded.images, output.logits, strict=True):
        torch.testing.assert_close(model(image[None])[0], expected, atol=1e-5, rtol=1e-5)


def test_training_forward_and_losses_recorded_from_the_public_code(recorded, silent):
    def losses(bias, **options):
        text = "".join(f",{name}={value}" for name, value in options.items())
        model = recorded_model(recorded, f"dynamicvit:distill_weight=1,token_weight=1{text}", bias).train()
        return dyntune.training_loss(model, recorded.images, torch.tensor([3, 7]), teacher=recorded.host())

    loss = losses(0.2)
    output, terms = loss.output, {name: term.item() for name, term in loss.terms.items()}
    recorded.check(output.logits, ".4387 .6979 -.9806 -1.9519 .4426 | .4594 .5082 -1.2564 | 22.9410")
    assert [r.unit for r in output.reductions] == ["blocks.0", "blocks.3", "blocks.6", "blocks.9"]
    kept = torch.stack([record.provenance.present.sum(1) for record in output.reductions])
    assert kept.tolist() == [[196, 196], [118, 173], [118, 173], [114, 171]]
    assert output.tokens.patches.abs().sum().item() == pytest.approx(20163.04, abs=0.05)
    assert terms["task"] == pytest.approx(3.40797, abs=1e-5)
    assert terms["ratio"] / 2 * 3 == pytest.approx(0.13871, abs=1e-5)
    assert terms["teacher"] == pytest.approx(0.00136, abs=1e-5)
    assert terms["teacher_tokens"] == pytest.approx(0.00269, abs=1e-5)
    assert losses(0.2, token_loss="kl").terms["teacher_tokens"].item() == pytest.approx(0.00116, abs=1e-5)


@pytest.mark.parametrize(
    "options,bias,total",
    [
        ("", 0.2, 3.50247),
        ("ratio_weight=5", 0.2, 3.64118),
        ("token_loss=kl", 0.2, 3.50170),
        ("ratio_weight=5,token_loss=kl", 0.2, 3.64040),
        ("", 0.15, 3.53156),
        ("ratio_weight=5", 0.15, 3.71210),
    ],
)
@torch.no_grad()
def test_whole_losses_recorded_from_the_public_code(recorded, silent, options, bias, total):
    model = recorded_model(recorded, f"dynamicvit:{options}" if options else "dynamicvit", bias).train()
    loss = dyntune.training_loss(model, recorded.images, torch.tensor([3, 7]), teacher=recorded.host())
    assert loss.total.item() == pytest.approx(total, abs=2e-5)
    final = loss.output.reductions[-1].provenance.present.sum(1).tolist()
    assert final == ([114, 171] if bias == 0.2 else [77, 135])


def attention(block, x, seen):
    """Update of the attention sub-layer ``(B, N, C)``; ``seen`` is M, ``(B, N, N)``, or None for plain softmax."""
    host, (batch, count, width) = block.attn, x.shape
    q, k, v = F.linear(block.norm1(x), host.qkv.weight, host.qkv.bias).chunk(3, dim=-1)
    q, k, v = (t.view(batch, count, host.num_heads, -1).transpose(1, 2) for t in (q, k, v))
    q, k = host.q_norm(q), host.k_norm(k)
    scores = q @ k.mT * (width // host.num_heads) ** -0.5
    if seen is None:
        weights = scores.softmax(-1)
    else:
        raised = torch.exp(scores - scores.max(-1, keepdim=True).values) * seen[:, None]
        weights = (raised + 1e-6 / count) / (raised.sum(-1, keepdim=True) + 1e-6)
    joined = (weights @ v).transpose(1, 2).reshape(batch, count, width)
    return block.ls1(F.linear(host.norm(joined), host.proj.weight, host.proj.bias))


def keep_probability(stage, patches, present):
    """The log-probability of keeping each patch, ``(B, P)``."""
    norm, embed = stage.embed[0], stage.embed[1]
    hidden = F.layer_norm(patches, patches.shape[-1:], norm.weight, norm.bias, 1e-5)
    hidden = F.gelu(hidden @ embed.weight.T + embed.bias)
    half = hidden.shape[-1] // 2
    mean = torch.einsum("bpc,bp->bc", hidden[..., half:], present) / present.sum(1, keepdim=True)
    hidden = torch.cat([hidden[..., :half], mean[:, None].expand(-1, patches.shape[1], -1)], dim=-1)
    for index, linear in enumerate(stage.score[::2]):
        hidden = (F.gelu(hidden) if index else hidden) @ linear.weight.T + linear.bias
    return hidden.log_softmax(-1)[..., 0]


def straight_line(model, images, decide, parallel=lambda index, x, prefix, present: 0):
    """Logits and what was decided at each stage.

    Args:
        decide: from the stage's number and log-probabilities to the patches that go on, ``(B, K)``, or, as floats,
            to the choice ``(B, P)`` of training.
        beside: what stands beside the MLP of a block.
    """
    host = model.backbone.host
    x = host.norm_pre(host._pos_embed(host.patch_embed(images)))
    prefix, decided = host.num_prefix_tokens, []
    present = torch.ones(len(x), x.shape[1] - prefix)
    hides = False
    for index, block in enumerate(host.blocks):
        stage = next(iter(stage_of(model.backbone.blocks[index])), None)
        if stage is not None:
            chosen = decide(len(decided), keep_probability(stage, x[:, prefix:], present))
            hides = chosen.is_floating_point()
            if hides:
                present = present * chosen
            else:
                kept = torch.stack([image[prefix:][rows] for image, rows in zip(x, chosen, strict=True)])
                x, present = torch.cat([x[:, :prefix], kept], dim=1), torch.ones(chosen.shape)
            decided.append(present if hides else chosen)
        seen = None
        if model.training:
            row = torch.cat([torch.ones(len(x), prefix), present], dim=1)
            seen = row[:, None].expand(-1, x.shape[1], -1).clone()
            seen.diagonal(dim1=1, dim2=2).fill_(1)
        x = x + attention(block, x, seen)
        x = x + block.ls2(block.mlp(block.norm2(x))) + parallel(index, x, prefix, present)
    x = host.norm(x)
    if host.global_pool == "token":
        return host.forward_head(x), decided
    if host.global_pool == "map":
        assert not hides
        return host.forward_head(x), decided
    pooled = (x[:, prefix:] * present[..., None]).sum(1) / present.sum(1, keepdim=True)
    return host.head(host.fc_norm(pooled)), decided


def highest(model, patches):
    shares = [stage.keep for _, stage in stages(model)]
    return lambda number, scores: scores.topk(int(shares[number] * patches)).indices


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_evaluation_is_the_written_out_one(build, images_for, name):
    model = build(name)
    images = images_for(model.backbone.host, 4)
    patches = model.backbone.host.patch_embed.num_patches
    expected, decided = straight_line(model, images, highest(model, patches))
    for how in ("masked", "compact"):
        output = model.run(images, execution=how)
        torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-5)
    first, second = (record.provenance for record in output.reductions)
    assert first.sizes is None and (first.owner >= 0).sum(1).tolist() == [int(0.7 * patches)] * 4
    assert torch.equal(first.owner.gather(1, decided[0]), torch.arange(int(0.7 * patches)).expand(4, -1))
    assert torch.equal(
        second.owner.gather(1, decided[0].gather(1, decided[1])), torch.arange(second.owner.max() + 1).expand(4, -1)
    )
    for image, logits in zip(images, output.logits, strict=True):
        torch.testing.assert_close(model(image[None])[0], logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in HOSTS if name != "siglip"])
@torch.no_grad()
def test_training_is_the_written_out_one(build, images_for, silent, name):
    model = build(name).train()
    images = images_for(model.backbone.host, 4)
    expected, decided = straight_line(model, images, lambda _, scores: (scores.exp() >= 0.5).float())
    output = model.run(images)
    for record, present in zip(output.reductions[1:], decided, strict=True):
        assert torch.equal(record.provenance.present, present)
    assert 0 < output.reductions[-1].provenance.present.mean() < 1
    assert (output.reductions[-1].provenance.present <= output.reductions[-2].provenance.present).all()
    torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*HOSTS, "siglip"])
@torch.no_grad()
def test_hiding_patches_agrees_with_dropping_the_same_ones(build, images_for, silent, name):
    """Up to the epsilon of the masked softmax; the adapter with mixed experts reads the mean over what is there."""
    model = build(name, SPEC)
    images = images_for(model.backbone.host, 4)
    output = model.train().run(images)
    model.eval()
    for number, image in enumerate(images):
        chosen = [record.provenance.present[number] > 0.5 for record in output.reductions[1:]]
        rows = [chosen[0].nonzero().T, chosen[1][chosen[0]].nonzero().T]
        assert rows[1].numel()
        expected, _ = straight_line(model, image[None], lambda stage, _, rows=rows: rows[stage])
        torch.testing.assert_close(output.logits[number : number + 1], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_means_leave_out_hidden_patches(build, images_for, silent):
    """The router of the mixture of adapters in the blocks, and a head that averages."""
    model = build("average", SPEC, "moe-adapter:normalise=sigmoid")
    images = images_for(model.backbone.host, 4)

    def parallel(index, x, prefix, present):
        adapter = model.backbone.blocks[index].mlp.parallel["moe_adapter"]
        weights = torch.cat([torch.ones(len(x), prefix), present], dim=1)[..., None]
        mean = (x * weights).sum(1) / weights.sum(1)
        shares = (mean @ adapter.router.weight.T).sigmoid()
        down = torch.einsum("be,edc->bdc", shares, adapter.down_weight)
        up = torch.einsum("be,ecd->bcd", shares, adapter.up_weight)
        hidden = F.relu(x @ down.mT + (shares @ adapter.down_bias)[:, None])
        return adapter.scale * (hidden @ up.mT + (shares @ adapter.up_bias)[:, None])

    expected, _ = straight_line(model, images, highest(model, 16), parallel)
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
    model.train()
    expected, decided = straight_line(model, images, lambda _, scores: (scores.exp() >= 0.5).float(), parallel)
    assert 0 < decided[-1].mean() < 1
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["plain", "average", "siglip"])
@pytest.mark.parametrize("where", ["mlp", "attn-mlp", "layer"])
def test_nothing_is_nan_when_every_patch_is_dropped(build, images_for, silent, name, where):
    model = build(name, SPEC, f"dispatch:where={where}").train()
    with torch.no_grad():
        stages(model)[0][1].score[-1].bias.copy_(torch.tensor([-9.0, 9.0]))
    host = model.backbone.host
    loss = dyntune.training_loss(model, images_for(host, 2), torch.arange(2), teacher=None)
    assert not loss.output.reductions[-1].provenance.present.any()
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert all(torch.isfinite(p.grad).all() for p in model.tuned_state().values() if p.grad is not None)


def test_the_token_loss_is_zero_when_nothing_is_left(make_host, images_for, build, silent):
    model = build("plain").train()
    with torch.no_grad():
        stages(model)[0][1].score[-1].bias.copy_(torch.tensor([-9.0, 9.0]))
    host = make_host()
    loss = dyntune.training_loss(model, images_for(host, 2), torch.arange(2), teacher=host)
    assert loss.terms["teacher_tokens"].item() == 0 and loss.terms["teacher_tokens"].shape == loss.total.shape == ()
    assert loss.terms["teacher"] > 0


def test_choices_have_the_stated_probability_and_the_gradient_of_the_soft_one():
    torch.manual_seed(0)
    stage = dynamicvit.Stage(8, 0.5, temperature=2.0).train()
    tokens = dynamicvit.Tokens(torch.randn(200, 17, 8), 1, (4, 4))
    stage.logits = lambda _: logits
    logits = torch.full((200, 16), 0.8).requires_grad_()
    present = stage(tokens, None)(tokens).provenance.present
    assert set(present.unique().tolist()) == {0, 1}
    assert present.mean().item() == pytest.approx(torch.sigmoid(torch.tensor(0.8)).item(), abs=0.02)
    torch.manual_seed(1)
    present = stage(tokens, None)(tokens).provenance.present
    present.sum().backward()
    torch.manual_seed(1)
    soft = ((0.8 + dynamicvit.gumbel_difference(logits.detach())) / 2).sigmoid()
    assert torch.equal(soft >= 0.5, present.bool())
    torch.testing.assert_close(logits.grad, soft * (1 - soft) / 2)
    hidden = tokens.with_present(torch.zeros(200, 16))
    assert not stage(hidden, None)(hidden).provenance.present.any()


@pytest.mark.parametrize("other", ["adaptformer", "full", "vpt", "vpt:deep=false", "dyt", "dispatch:where=mlp", "lora"])
def test_it_stands_beside_other_parts(build, make_host, images_for, other):
    specs = (other, SPEC)
    model = build("registers", *specs)
    host = model.backbone.host
    images = images_for(host, 4, seed=5)
    with torch.no_grad():
        masked, compact = (model.run(images, execution=how) for how in ("masked", "compact"))
    torch.testing.assert_close(masked.logits, compact.logits, atol=1e-5, rtol=1e-5)
    assert [record.count for record in compact.reductions][-1] >= 6 + 5
    assert [gate.values.shape[1] for gate in compact.gates] == ([16, 11, 6] if compact.gates else [])
    model.train()
    torch.manual_seed(0)
    dyntune.training_loss(model, images, torch.arange(4), teacher=make_host("registers")).total.backward()
    idle = [name for name, p in model.tuned_state().items() if p.grad is None or not p.grad.any()]
    assert not idle
    assert all(p.grad is None for name, p in model.backbone.named_parameters() if name not in model.tuned_state())


def test_the_rate_counts_the_tokens_that_are_there(build, images_for, silent):
    model = build("plain", SPEC, "dispatch:rate=0.3,rate_weight=2,complete_weight=0,distill_weight=0").train()
    for module in model.modules():
        if isinstance(module, Dispatcher):
            module.decide = lambda logits: (logits > 0).float()
    loss = dyntune.training_loss(model, images_for(model.backbone.host, 4), torch.arange(4))
    present = [record.provenance.present for record in loss.output.reductions]
    rates = [(gate.values * there).sum() / there.sum() for gate, there in zip(loss.output.gates, present, strict=True)]
    assert 0 < present[-1].mean() < 1
    torch.testing.assert_close(loss.terms["rate"], 2 * (sum(rates) / 3 - 0.3) ** 2)


def test_gradients_reach_the_predictors_from_every_term(build, make_host, images_for):
    model = build("registers", SPEC, "linear").train()
    host = make_host("registers", seed=4)
    torch.manual_seed(0)
    loss = dyntune.training_loss(model, images_for(host, 4), torch.arange(4), teacher=host)
    assert set(loss.terms) == {"task", "ratio", "teacher", "teacher_tokens"}
    predictors = {name: p for name, p in model.tuned_state().items() if ".reducers." in name}
    assert len(predictors) == 2 * 10
    assert model.tuned_state().keys() - predictors.keys() == {"host.head.weight", "host.head.bias"}
    for name, term in loss.terms.items():
        found = torch.autograd.grad(term, [*predictors.values()], retain_graph=True, allow_unused=True)
        assert all(g is not None and g.any() for g in found), name
    assert not any(p.grad is not None for p in host.parameters())


def test_the_ratio_loss_alone_leads_to_the_shares(build, images_for):
    model = build("plain", SPEC).train()
    predictors = [p for name, p in model.tuned_state().items() if ".reducers." in name]
    optimiser = torch.optim.Adam(predictors, lr=3e-3)
    torch.manual_seed(0)
    images = images_for(model.backbone.host, 16)
    for _ in range(80):
        ratio = dyntune.training_loss(model, images, torch.zeros(16, dtype=torch.long)).terms["ratio"]
        optimiser.zero_grad()
        ratio.backward()
        optimiser.step()
    with torch.no_grad():
        shares = [r.provenance.present.mean().item() for r in model.run(images).reductions[1:]]
    assert shares == pytest.approx([0.7, 0.4], abs=0.1)


def test_terms_follow_their_weights_and_need_a_teacher(build, make_host, images_for, silent):
    host = make_host(seed=4)
    images = images_for(host, 4)

    def terms(options, teacher=host):
        return dyntune.training_loss(
            build("plain", SPEC + options).train(), images, torch.arange(4), teacher=teacher
        ).terms

    full = terms("")
    assert set(terms("", None)) == {"task", "ratio"}
    assert set(terms(",distill_weight=0")) == {"task", "ratio", "teacher_tokens"}
    assert set(terms(",token_weight=0,ratio_weight=0")) == {"task", "teacher"}
    double = terms(",ratio_weight=4,distill_weight=1,token_weight=1")
    for name in ("ratio", "teacher", "teacher_tokens"):
        torch.testing.assert_close(double[name], 2 * full[name])
    assert not dynamicvit.DynamicViT(distill_weight=0, token_weight=0).distills()
    assert dynamicvit.DynamicViT().distills()
    assert set(dyntune.training_loss(build("plain").eval(), images, torch.arange(4), teacher=host).terms) == {"task"}


def test_its_distillation_stands_beside_that_of_dyt(build, make_host, images_for, silent):
    model = build("plain", SPEC, "dyt:dropout=0").train()
    images, host = images_for(model.backbone.host, 4), make_host(seed=4)
    torch.manual_seed(0)
    both = dyntune.training_loss(model, images, torch.arange(4), teacher=host).terms
    torch.manual_seed(0)
    alone = dyntune.training_loss(model, images, torch.arange(4)).terms
    torch.manual_seed(0)
    with torch.no_grad():
        logits = model.run(images).logits
        taught = F.kl_div(logits.log_softmax(-1), host(images).softmax(-1), reduction="batchmean")
    torch.testing.assert_close(both["distill"], alone["distill"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both["teacher"], 0.5 * taught, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("teacher", ["tome:r=2", "patches", "classes"])
def test_a_teacher_of_another_shape_is_refused(build, make_host, images_for, teacher):
    model = build("plain").train()
    changes = {"patches": {"patch_size": 16}, "classes": {"num_classes": 7}}.get(teacher, {})
    other = make_host(**changes)
    other = other if changes else dyntune.tune(other, teacher)
    with pytest.raises(BackboneError, match=r"gives (patch features|logits) of .* Give a dense teacher"):
        dyntune.training_loss(model, images_for(model.backbone.host, 2), torch.arange(2), teacher=other)


def test_a_tuned_teacher_that_keeps_its_tokens_is_taken(build, images_for):
    model = build("plain").train()
    teacher = build("plain", "dyt")
    images = images_for(model.backbone.host, 2)
    terms = dyntune.training_loss(model, images, torch.arange(2), teacher=teacher).terms
    assert terms["teacher"] > 0 and dense_output(teacher, images).gates


def test_saved_and_loaded_model_is_equal(build, make_host, images_for, tmp_path):
    model = build("registers", SPEC, "adaptformer")
    model.backbone.host.load_state_dict(make_host("registers").state_dict())  # build() has changed frozen tensors too
    loaded = dyntune.load(model.save(tmp_path / "run"), backbone=make_host("registers"))
    images = images_for(model.backbone.host, 4)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert loaded.spec == model.spec == f"{SPEC}+adaptformer"


@torch.no_grad()
def test_a_published_checkpoint_gives_its_logits(build, make_host, images_for):
    model = build("plain")
    state = {}
    for name, tensor in model.backbone.named_parameters():
        for number, layer in enumerate((1, 2)):
            place = f"blocks.{layer}.reducers.dynamicvit."
            name = name.replace(f"{place}embed.", f"score_predictor.{number}.in_conv.")
            name = name.replace(f"{place}score.", f"score_predictor.{number}.out_conv.")
        state[name.removeprefix("host.")] = tensor.clone()
    parts = {f"in_conv.{n}" for n in (0, 1)} | {f"out_conv.{n}" for n in (0, 2, 4)}
    assert {
        name.removeprefix("score_predictor.1.").rsplit(".", 1)[0]
        for name in state
        if ".1.in" in name or ".1.out" in name
    } == parts
    other = build("plain", seed=9)
    for parameter in other.parameters():
        parameter.add_(1)
    dyntune.load_published(other, state)
    images = images_for(model.backbone.host, 4)
    assert torch.equal(other(images), model(images))
    with pytest.raises(dyntune.DyntuneError, match="has no place"):
        dyntune.load_published(other, state | {"score_predictor.2.in_conv.0.weight": torch.ones(32)})


def test_gradient_checkpointing_gives_the_same_gradients(build, images_for):
    gradients = []
    for checkpointing in (False, True):
        model = build("registers", SPEC, "adaptformer").train()
        model.backbone.host.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        dyntune.training_loss(model, images_for(model.backbone.host, 4), torch.arange(4)).total.backward()
        gradients.append({name: p.grad for name, p in model.tuned_state().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_mixed_precision_runs(build, make_host, images_for):
    model = build("plain").train()
    images = images_for(model.backbone.host, 4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = dyntune.training_loss(model, images, torch.arange(4), teacher=make_host())
    loss.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.tuned_state().values())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.isfinite(model.eval()(images)).all()
    model = model.to(torch.bfloat16)
    assert model(images.bfloat16()).dtype == model.train()(images.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options",
    [
        "keep=0.7",
        "keep=0.5/0.7/0.9",
        "keep=0.9/0.7/0",
        "keep=1.1/0.7/0.5",
        "layers=3/6",
        "layers=3/3/6",
        "layers=6/3/9",
        "layers=-1/3/6",
        "temperature=0",
        "ratio_weight=-1",
        "token_loss=l1",
        "keep=a/b/c",
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(SpecError, match=r"dynamicvit: .*expected"):
        dyntune.parts.registry.resolve([f"dynamicvit:{options}"])


def test_what_it_is_not_defined_with_is_refused(make_host):
    with pytest.raises(SpecError, match="layers below 3, for the backbone has 3 blocks"):
        dyntune.tune(make_host(), "dynamicvit")
    with pytest.raises(BackboneError, match="would each decide"):
        dyntune.tune(make_host(), SPEC, "tome")
    with pytest.raises(BackboneError, match="given twice"):
        dyntune.tune(make_host(), SPEC, SPEC)
    with pytest.raises(BackboneError, match="every patch in its place"):
        dyntune.tune(make_host(), SPEC, "convpass")
    with pytest.raises(BackboneError, match="no gradient into the backbone"):
        dyntune.tune(make_host(), SPEC, "res-tuning-bypass")


@torch.no_grad()
def test_dropped_patches_have_no_features(build, images_for):
    model = build("plain")
    with pytest.raises(dyntune.DyntuneError, match="patches were dropped"):
        model.features(images_for(model.backbone.host, 2))


@torch.no_grad()
def test_the_ends_of_its_range(build, images_for):
    """With every share 1 nothing happens; at least one patch stays; a stage may stand in front of the first block."""
    everything = build("plain", "dynamicvit:keep=1,layers=1")
    images = images_for(everything.backbone.host, 2)
    assert everything.run(images).reductions == ()
    own = copy.deepcopy(everything.backbone.host)(images)
    torch.testing.assert_close(everything(images), own, atol=1e-5, rtol=1e-5)
    least = build("average", "dynamicvit:keep=0.01,layers=0")
    assert least.run(images).tokens.patches.shape[1] == 1
    assert len(least.train().run(images).reductions) == 1
    torch.testing.assert_close(
        least.eval()(images), straight_line(least, images, lambda _, scores: scores.topk(1).indices)[0]
    )


def parameters(width):
    return 13 * width**2 // 8 + 17 * width // 4 + 2


def macs(width, depth, dense, tokens, stage_tokens, mlp):
    """MACs from those of the dense backbone: what each block saves, and the predictors."""

    def block(count):
        return 4 * count * width**2 + 2 * count**2 * width + 2 * count * width * mlp + 2 * 5 * count * width

    predictors = sum(count * (13 * width**2 // 8 + width // 2 + 5 * width) for count in stage_tokens)
    norm = 5 * width * (tokens[0] - tokens[-1])
    return dense - depth * block(tokens[0]) + sum(map(block, tokens)) + predictors - norm


def test_parameters_and_macs_are_the_published_ones(make_host):
    with shapes_only():
        model = dyntune.tune(timm.create_model("vit_base_patch16_224", num_classes=100), "dynamicvit")
        adapted = dyntune.tune(
            timm.create_model("vit_base_patch16_224", num_classes=100), "adaptformer:bottleneck=64", "dynamicvit"
        )
    cost = dyntune.cost(model)
    assert parameters(768) == 961_730
    assert cost.trainable_params == 3 * 961_730 == 2_885_190
    assert (cost.macs + cost.head_macs) / 1e9 == pytest.approx(14.0500, abs=5e-5)
    tokens = [197] * 3 + [177] * 3 + [138] * 3 + [99] * 3
    assert cost.macs == macs(768, 12, cost.dense_macs, tokens, (196, 176, 137), 3072)
    adapted = dyntune.cost(adapted)
    assert (adapted.macs + adapted.head_macs) / 1e9 == pytest.approx(14.2302, abs=5e-5)
    small = dyntune.tune(make_host("registers"), SPEC)
    figures = dyntune.cost(small)
    assert figures.trainable_params == 2 * parameters(32)
    assert figures.macs == macs(32, 3, figures.dense_macs, (21, 16, 11), (16, 11), 128)


def test_attention_among_active_tokens_alone_refuses_hidden_ones(make_host, images_for):
    model = dyntune.tune(make_host(), "dispatch:where=attn", "dynamicvit:keep=0.5,layers=1").train()
    images = images_for(model.backbone.host, 2)
    assert model.run(images, execution="masked").gates
    with pytest.raises(dyntune.DyntuneError, match='execution="masked"'):
        model.run(images, execution="compact")
