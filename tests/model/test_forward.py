"""The two executions agree with each other, with the host's own forward, and with what the equations say."""

import copy
import io
import pickle
import threading
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import dyntune
from dyntune.core import attention
from dyntune.core.errors import BackboneError, SpecError
from dyntune.core.tokens import Projected, Tokens
from dyntune.model.activation import activation_rates
from dyntune.model.executions import Compact, Masked
from dyntune.model.forward import run
from dyntune.parts.policies.base import Gate
from dyntune.parts.policies.gating import GatingPolicy

VARIANTS = ("mlp", "attn", "attn-mlp", "layer")
DTYPES = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class GivenMasks(GatingPolicy):
    """Gates the units whose path is a key by the mask that is its value."""

    masks: dict

    def __post_init__(self):
        pass

    def gates(self, unit):
        return unit.path in self.masks

    def gate(self, unit, tokens):
        return Gate(unit.path, self.masks[unit.path].to(tokens.x.dtype), self)


def gated_paths(variant, depth=3):
    kinds = {"mlp": (".mlp",), "attn": (".attn",), "attn-mlp": (".attn", ".mlp"), "layer": ("",)}[variant]
    return [f"blocks.{index}{kind}" for index in range(depth) for kind in kinds]


def both(model, images):
    return model.run(images, execution="masked"), model.run(images, execution="compact")


def assert_same(first, second, tolerance=1e-5):
    assert torch.isfinite(first).all()
    scale = max(1.0, second.abs().max().item())
    assert (first - second).abs().max().item() <= tolerance * scale


@pytest.fixture
def tuned(make_host, randomise):
    """``tuned(host, *parts)``: a model in eval mode with random non-zero weights everywhere."""

    def build(name="plain", *parts, seed=1):
        return randomise(dyntune.tune(make_host(name), *(parts or ("dyt",))), seed).eval()

    return build


@torch.no_grad()
def test_dense_run_is_the_hosts_own_forward(make_host, images_for, any_host_name):
    host = make_host(any_host_name)
    images = images_for(host, 3)
    expected = host(images)
    model = dyntune.tune(host, "linear").eval()
    assert_same(model(images), expected)
    assert expected.std() > 0.05


@torch.no_grad()
def test_run_uses_the_named_execution_and_refuses_others(tuned, images_for):
    model = tuned()
    with pytest.raises(SpecError, match="masked, compact"):
        model.run(images_for(model.backbone.host, 1), execution="sparse")


@torch.no_grad()
def test_image_of_another_size_is_computed_by_a_host_with_dynamic_size(make_host, randomise, images_for):
    host = make_host("plain", dynamic_img_size=True)
    images = torch.randn(2, 3, 24, 48, generator=torch.Generator().manual_seed(0))
    expected = host(images)
    model = dyntune.tune(host, "dispatch")
    assert_same(model.run(images, complete=True).logits, expected)
    assert model.run(images).gates[0].values.shape == (2, 18)
    assert model.backbone.embed(images).grid == (3, 6)


@pytest.mark.parametrize("shape", [(2, 3, 32, 40), (2, 1, 32, 32), (3, 32, 32)])
def test_images_of_a_wrong_shape_are_refused(tuned, shape):
    with pytest.raises(BackboneError, match="32"):
        tuned()(torch.zeros(shape))


@pytest.mark.parametrize("batch", [1, 3, 32])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_masked_equals_compact(tuned, images_for, any_host_name, variant, batch):
    model = tuned(any_host_name, f"dyt:dispatch={variant}")
    masked, compact = both(model, images_for(model.backbone.host, batch))
    assert_same(masked.logits, compact.logits)
    for one, other in zip(masked.gates, compact.gates, strict=True):
        assert torch.equal(one.values, other.values)
    if batch == 32:
        counts = torch.stack([gate.values.sum(1) for gate in compact.gates])
        assert len(counts.unique()) > 2
        assert 0 < activation_rates(compact.gates).mean() < 1


@pytest.mark.parametrize("bias", [-1.0, 1.0])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_masked_equals_compact_when_a_block_is_wholly_open_or_closed(tuned, images_for, any_host_name, variant, bias):
    model = tuned(any_host_name, f"dyt:dispatch={variant}")
    images = images_for(model.backbone.host, 3)
    dense = model.run(images, complete=True).logits
    for unit in [unit for unit in model.backbone.units(variant) if "blocks.1" in unit.path]:
        unit.dispatcher.gate.weight.zero_()
        unit.dispatcher.gate.bias.fill_(bias)
    masked, compact = both(model, images)
    assert_same(masked.logits, compact.logits)
    forced = {gate.values.mean().item() for gate in compact.gates if "blocks.1" in gate.unit}
    assert forced == {float(bias > 0)}
    for unit in model.backbone.units(variant):
        unit.dispatcher.gate.weight.zero_()
        unit.dispatcher.gate.bias.fill_(bias)
    masked, compact = both(model, images)
    assert_same(masked.logits, compact.logits)
    if bias > 0:
        assert_same(compact.logits, dense)
    else:
        assert (compact.logits - dense).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["plain", "registers", "siglip"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_masked_equals_compact_when_one_image_has_no_active_patch(tuned, images_for, name, variant):
    model = tuned(name, "adaptformer")
    masks = {}
    for seed, path in enumerate(gated_paths(variant)):
        mask = torch.rand(4, 16, generator=torch.Generator().manual_seed(seed)) > 0.4
        mask[seed % 4] = False
        mask[(seed + 1) % 4] = True
        masks[path] = mask
    images = images_for(model.backbone.host, 4)
    outputs = [run(model.backbone, (GivenMasks(masks),), images, how).logits for how in (Masked(), Compact())]
    assert_same(*outputs)


@st.composite
def cases(draw):
    variant = draw(st.sampled_from(VARIANTS))
    batch = draw(st.integers(1, 4))
    name = draw(st.sampled_from(["plain", "registers", "siglip", "oblong"]))
    patches = 15 if name == "oblong" else 16
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for path in gated_paths(variant):
        share = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
        masks[path] = torch.rand(batch, patches, generator=generator) < share
    return name, masks, batch, seed, draw(st.sampled_from(list(DTYPES)))


@given(cases())
@settings(max_examples=50, deadline=None, derandomize=True)
@torch.no_grad()
def test_masked_equals_compact_for_any_mask(make_host, randomise, images_for, case):
    name, masks, batch, seed, dtype = case
    model = randomise(dyntune.tune(make_host(name), "adaptformer:where=attn-mlp,dropout=0"), seed).eval().to(dtype)
    images = images_for(model.backbone.host, batch, seed).to(dtype)
    outputs = [run(model.backbone, (GivenMasks(masks),), images, how).logits for how in (Masked(), Compact())]
    assert outputs[0].dtype is dtype
    assert_same(*outputs, tolerance=DTYPES[dtype])


@pytest.mark.parametrize("execution", [Masked(), Compact()], ids=["masked", "compact"])
@pytest.mark.parametrize("variant", ["mlp", "attn", "layer"])
@torch.no_grad()
def test_skipped_tokens_get_exactly_the_adapters_update(tuned, images_for, variant, execution):
    model = tuned("plain", f"adaptformer:where={variant}")
    bare = tuned("plain", "linear")
    unit = next(model.backbone.units(variant))
    unit_without_adapter = next(bare.backbone.units(variant))
    tokens = model.backbone.embed(images_for(model.backbone.host, 3))
    mask = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    policy = GivenMasks({unit.path: mask})
    skipped = torch.cat([torch.zeros(3, 1, dtype=torch.bool), ~mask], dim=1)
    out = execution.gated(unit, tokens, policy)[0].x
    adapter = unit.parallel["adapter"]
    update = 0.1 * (F.relu(tokens.x @ adapter.down_proj.weight.T + adapter.down_proj.bias) @ adapter.up_proj.weight.T)
    update = update + 0.1 * adapter.up_proj.bias
    torch.testing.assert_close(out[skipped], (tokens.x + update)[skipped], atol=1e-6, rtol=1e-6)
    assert (out - tokens.x - update)[~skipped].abs().max(dim=-1).values.min() > 1e-3
    out = execution.gated(unit_without_adapter, tokens, policy)[0].x
    assert torch.equal(out[skipped], tokens.x[skipped])


def heads(generator, *shape, heads=2, width=4):
    return [torch.randn(*shape, heads, width, generator=generator, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("counts", [(3, 5), (1,), (4, 0, 2), (0, 0, 3), (0, 0), (7, 1, 1, 7)])
def test_padded_attention_equals_attention_one_by_one(counts):
    q, k, v = heads(torch.Generator().manual_seed(0), sum(counts))
    padded = attention._padded(q, k, v, counts, None, 0.0)
    expected, start = torch.empty_like(v), 0
    for count in counts:
        image = slice(start, start + count)
        weights = torch.einsum("ihd,jhd->hij", q[image], k[image]).div(2).softmax(-1)
        expected[image] = torch.einsum("hij,jhd->ihd", weights, v[image])
        start += count
    torch.testing.assert_close(padded, expected)
    torch.testing.assert_close(attention._one_by_one(q, k, v, counts, None, 0.0), expected)


@pytest.mark.parametrize("counts", [(3, 3), (4, 0, 2)])
def test_attention_of_ragged_tokens_equals_that_of_each_image_alone(counts):
    q, k, v = heads(torch.Generator().manual_seed(0), sum(counts))
    ragged = attention.attend(Projected(q, k, v, k), Tokens(torch.empty(0), 0, (1, 1), counts=counts))
    dense = Tokens(torch.empty(0), 0, (1, 1))
    alone = [
        attention.attend(Projected(*(t[None] for t in (*image, image[1]))), dense)[0]
        for image in zip(*(t.split(counts) for t in (q, k, v)), strict=True)
    ]
    torch.testing.assert_close(ragged, torch.cat(alone))


def gated(q, k, v, keys):
    """``_gated`` for ``(B, N, H, D)``, with heads back where they came from."""
    return attention._gated(*(t.transpose(1, 2) for t in (q, k, v)), keys, None, 0.0).transpose(1, 2)


def naive(q, k, v, keys):
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    weights = scores.exp() * keys[:, None, None]
    return torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), v)


def test_gated_attention_is_the_softmax_among_active_tokens():
    q, k, v = heads(torch.Generator().manual_seed(1), 3, 6)
    keys = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.float64)
    out = gated(q, k, v, keys)
    for image, open_keys in enumerate(keys.bool()):
        scores = torch.einsum("ihd,jhd->hij", q[image], k[image, open_keys]) / 2
        expected = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[image, open_keys])
        torch.testing.assert_close(out[image], expected, atol=1e-6, rtol=1e-5)


def test_gated_attention_without_any_active_key_is_finite():
    """Upstream is zero for closed queries, as it is where the update is multiplied by the same mask."""
    q, k, v = heads(torch.Generator().manual_seed(1), 2, 4)
    keys = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 1]], dtype=torch.float64, requires_grad=True)
    out = gated(q, k, v, keys)
    (out * keys.detach()[..., None, None]).sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(keys.grad).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_stays_finite_when_no_token_at_all_is_active(tuned, images_for, variant):
    model = tuned("siglip", f"dyt:dispatch={variant}").train()
    with torch.no_grad():
        for unit in model.backbone.units(variant):
            unit.dispatcher.gate.bias.fill_(-1e4)
    images = images_for(model.backbone.host, 2)
    loss = dyntune.training_loss(model, images, torch.tensor([0, 1]))
    assert activation_rates(loss.output.gates).max() == 0
    loss.total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_gradient_with_every_key_open_is_that_of_plain_attention():
    gradients = []
    for formula in (lambda q, k, v: gated(q, k, v, torch.ones(3, 6)), naive_dense):
        inputs = [t.requires_grad_() for t in heads(torch.Generator().manual_seed(1), 3, 6)]
        upstream = torch.randn(3, 6, 2, 4, generator=torch.Generator().manual_seed(3))
        (formula(*inputs) * upstream).sum().backward()
        gradients.append([t.grad for t in inputs])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


def naive_dense(q, k, v):
    weights = torch.einsum("bihd,bjhd->bhij", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def test_gradient_of_gates_is_that_of_the_naive_formula():
    """Where no closed key exceeds the strongest open one the two formulas are the same function."""
    q, k, v = heads(torch.Generator().manual_seed(2), 2, 5)
    q, k = q.abs() + 0.1, k.abs()
    k[:, 0] = k.amax(1) + 0.1  # the first key is open and the strongest for every query and head
    pattern = torch.tensor([[1, 0, 1, 0, 1], [1, 0, 0, 0, 1]], dtype=torch.float64)
    upstream = torch.randn(2, 5, 2, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gradients = []
    for formula in (gated, naive):
        inputs = [t.clone().requires_grad_() for t in (q, k, v, pattern)]
        (formula(*inputs) * upstream).sum().backward()
        gradients.append([t.grad for t in inputs])
    assert gradients[1][3].abs().min() > 1e-3
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_stays_finite_when_closed_keys_are_far_stronger(dtype):
    q, k, v = (t.to(dtype) for t in heads(torch.Generator().manual_seed(2), 1, 5))
    q, k = q.abs() + 0.5, k.abs()
    k[:, 2] += 1e4
    keys = torch.tensor([[1, 1, 0, 1, 0]], dtype=dtype, requires_grad=True)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out = gated(*inputs, keys)
    out.sum().backward()
    expected = gated(*(t[:, [0, 1, 3]] for t in (q, k, v)), torch.ones(1, 3, dtype=dtype))
    torch.testing.assert_close(out[:, [0, 1, 3]], expected, atol=1e-2, rtol=1e-2)
    for t in (*inputs, keys):
        assert torch.isfinite(t.grad).all()
    # opening the closed key gives it at most the weight of the strongest open one, for each of the 5 queries
    bound = sum((v[:, j].float() - out.float().detach()[:, i]).abs().sum() for i in range(5) for j in range(5))
    assert keys.grad.float().abs().max() <= bound


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_changes_nothing(tuned, images_for, variant):
    results = []
    for checkpointing in (False, True):
        model = tuned("registers", f"dyt:dispatch={variant}").train()
        model.backbone.host.set_grad_checkpointing(checkpointing)
        assert model.backbone.gradient_checkpointing is checkpointing
        torch.manual_seed(5)
        loss = dyntune.training_loss(model, images_for(model.backbone.host, 4), torch.tensor([0, 1, 2, 3]))
        loss.total.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((loss.total.detach(), gradients))
    (plain, ours), (checkpointed, theirs) = results
    assert plain == checkpointed
    assert ours.keys() == theirs.keys()
    assert any("dispatcher" in name for name in ours)
    for name, gradient in ours.items():
        torch.testing.assert_close(theirs[name], gradient, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_dispatcher_learns_from_the_task_alone(tuned, images_for, variant):
    model = tuned("average", f"dyt:dispatch={variant}").train()
    torch.manual_seed(0)
    F.cross_entropy(model(images_for(model.backbone.host, 4)), torch.tensor([0, 1, 2, 3])).backward()
    for unit in model.backbone.units(variant):
        assert unit.dispatcher.gate.weight.grad.abs().max() > 0


@torch.no_grad()
def test_deepcopy_and_pickle_give_an_independent_equal_model(tuned, images_for):
    model = tuned("registers", "dyt:dispatch=attn-mlp")
    images = images_for(model.backbone.host, 2)
    expected = model(images)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(copied(images), expected)
        assert copied.spec == model.spec
        for parameter in copied.parameters():
            parameter.zero_()
        assert copied(images).abs().max() == 0
        assert torch.equal(model(images), expected)


def test_deepcopy_trains_with_its_own_gates(tuned, images_for):
    model = copy.deepcopy(tuned()).train()
    loss = dyntune.training_loss(model, images_for(model.backbone.host, 2), torch.tensor([0, 1]))
    assert set(loss.terms) == {"task", "rate", "complete", "distill", "feature"}


@torch.no_grad()
def test_threads_share_a_model(tuned, images_for):
    model = tuned("plain", "dyt:dispatch=attn-mlp")
    batches = [images_for(model.backbone.host, 3, seed) for seed in range(12)]
    expected = [model(batch) for batch in batches]
    found = [[None] * len(batches) for _ in range(2)]

    def work(results):
        with torch.no_grad():
            for index, batch in enumerate(batches):
                results[index] = model(batch)

    threads = [threading.Thread(target=work, args=(results,)) for results in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results in found:
        for result, reference in zip(results, expected, strict=True):
            assert torch.equal(result, reference)


def rounded_to_bfloat16(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


@pytest.mark.parametrize("execution", ["masked", "compact"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_bfloat16_model_is_near_the_float32_model(tuned, images_for, variant, execution):
    model = rounded_to_bfloat16(tuned("plain", f"dyt:dispatch={variant}"))
    images = images_for(model.backbone.host, 3).bfloat16()
    masks = {gate.unit: gate.values for gate in model.run(images.float()).gates}
    how = {"masked": Masked(), "compact": Compact()}[execution]
    expected = run(model.backbone, (GivenMasks(masks),), images.float(), how).logits
    model.bfloat16()
    found = run(model.backbone, (GivenMasks(masks),), images, how).logits
    assert found.dtype is torch.bfloat16
    assert_same(found.float(), expected, tolerance=0.1)
    assert model.run(images, execution=execution).logits.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_autocast_trains_and_evaluates(tuned, images_for, variant):
    model = tuned("plain", f"dyt:dispatch={variant}").train()
    images = images_for(model.backbone.host, 3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = dyntune.training_loss(model, images, torch.tensor([0, 1, 2]))
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        masked, compact = both(model, images)
    assert_same(masked.logits.float(), compact.logits.float(), tolerance=0.1)


@torch.no_grad()
def test_parts_put_on_a_bfloat16_host_run(make_host, images_for):
    host = make_host().bfloat16()
    model = dyntune.tune(host, "dyt").eval()
    assert model(images_for(host, 2).bfloat16()).isfinite().all()


def test_a_refused_part_leaves_the_host_as_trainable_as_it_was(make_host):
    host = make_host()
    with pytest.raises(BackboneError):
        dyntune.tune(host, "adaptformer", "adaptformer")
    assert all(p.requires_grad for p in host.parameters())
