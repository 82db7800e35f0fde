"""The contract of hosts on transformers' towers: every part on one of them, gates and PEFT on a few."""

import pytest
import torch
from test_hosts import GATES, OPTIONS, check, half_open, trained

import dyntune
from dyntune.parts.registry import registered

pytest.importorskip("transformers")

EVERY_PART_ON = "dinov2-registers"


@pytest.fixture
def build(make_hf, randomise):
    """``build(kind)``: a tower with a classifier of five classes, with equal weights each time."""

    def make(kind):
        torch.manual_seed(0)
        host = make_hf(kind)
        return randomise(dyntune.add_classifier(host, 5) if kind == "dinov3" else host).eval()

    return make


def images(batch, seed=0):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def of_any_host(host, batch, seed=0):
    return images(batch, seed)


@pytest.mark.parametrize("part", registered())
def test_a_part_on_a_tower(build, tmp_path, part):
    torch.manual_seed(0)
    model = dyntune.tune(build(EVERY_PART_ON), OPTIONS.get(part, part))
    before = {name: p.detach().clone() for name, p in model.backbone.named_parameters()}
    trainable = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    trained(model, of_any_host, steps=8 if part == "noah" else 2)  # each step draws one size of noah's modules
    moved = {name for name, p in model.backbone.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trainable
    check(half_open(model), build(EVERY_PART_ON), images(4, seed=9), tmp_path)


@pytest.mark.parametrize("where", GATES)
@pytest.mark.parametrize("kind", ["vit", "dinov3", "siglip"])
def test_a_gate_on_a_tower(build, tmp_path, kind, where):
    torch.manual_seed(0)
    model = half_open(trained(dyntune.tune(build(kind), "lora:targets=q/v", f"dispatch:where={where}"), of_any_host))
    rates = [gate.values.mean().item() for gate in model.run(images(4, seed=9)).gates]
    assert 0 < sum(rates) / len(rates) < 1
    check(model, build(kind), images(4, seed=9), tmp_path)


@torch.no_grad()
def test_a_policy_that_needs_a_class_token_is_refused_without_one(build):
    host = build("siglip")
    names = [name for name, _ in host.named_modules()]
    with pytest.raises(dyntune.DyntuneError, match="no class token"):
        dyntune.tune(host, "lora:targets=qkv/proj", OPTIONS["evit"])
    assert [name for name, _ in host.named_modules()] == names  # what lora had put there is gone


def old_or_new(host, *names):
    """Those of the names that this version of transformers has for a module."""
    return sorted({name for name in names if any(path.endswith(name) for path, _ in host.named_modules())})


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "dinov2-registers", "dinov3"])
def test_peft_on_a_tower_and_dispatch(build, tmp_path, kind):
    peft = pytest.importorskip("peft")

    def wrapped():
        torch.manual_seed(1)
        host = build(kind)
        config = peft.LoraConfig(
            target_modules=old_or_new(host, "q_proj", "v_proj", "query", "value"),
            rank_pattern={r"\d\.attention.*v(_proj|alue)": 4},
            modules_to_save=["classifier"],
            init_lora_weights=False,
        )
        return peft.get_peft_model(host, config)

    model = half_open(dyntune.tune(wrapped(), "dispatch:where=attn-mlp")).eval()
    masked, compact = (model.run(images(4), execution=how).logits for how in ("masked", "compact"))
    torch.testing.assert_close(masked, compact, atol=1e-5, rtol=1e-5)
    recipe = model.describe()["peft"]["adapters"]["default"]
    assert recipe["target_modules"] == [f"blocks.{block}.attn.{name}" for block in range(3) for name in ("q", "v")]
    assert recipe["rank_pattern"] == {f"blocks.{block}.attn.v": 4 for block in range(3)}
    assert recipe["modules_to_save"] == ["head"]
    loaded = dyntune.load(model.save(tmp_path / "adapter"), backbone=build(kind))
    assert torch.equal(loaded(images(4)), compact)
    torch.testing.assert_close(model.merge()(images(4)), compact, atol=1e-5, rtol=1e-5)
