"""Checkpoints under the names of the public code."""

import re

import pytest
import torch

import dyntune
from dyntune.core.errors import CheckpointError


@pytest.fixture
def trained(make_host, randomise):
    model = dyntune.tune(make_host(), "dyt:recipe=published,scale=1,bottleneck=4")
    randomise(model, seed=1)
    return model.eval()


def _published(model):
    """The model's tensors as the public DyT code names them."""
    names = {}
    for name, tensor in model.backbone.named_parameters():
        name = name.removeprefix("host.")
        name = name.replace(".mlp.parallel.adapter.", ".adaptmlp.")
        names[name.replace(".mlp.dispatcher.gate.", ".mlp_token_select.mlp_head.")] = tensor.detach().clone()
    return names


def test_a_published_checkpoint_gives_its_logits(trained, make_host, images_for):
    state = _published(trained)
    assert {"blocks.0.adaptmlp.down_proj.weight", "blocks.2.mlp_token_select.mlp_head.bias", "head.weight"} < set(state)
    model = dyntune.tune(make_host(seed=9), "dyt:recipe=published,scale=1,bottleneck=4").eval()
    images = images_for(model.backbone.host, 4)
    assert not torch.allclose(model(images), trained(images), atol=1e-3)
    dyntune.load_published(model, state)
    assert torch.equal(model(images), trained(images))


@pytest.mark.parametrize("start", ["module.", "model.", "module._orig_mod."])
def test_a_whole_checkpoint_of_a_wrapped_model_is_taken(trained, make_host, images_for, start):
    state = {f"{start}{name}": tensor for name, tensor in _published(trained).items()}
    model = dyntune.tune(make_host(seed=9), "dyt:recipe=published,scale=1,bottleneck=4").eval()
    dyntune.load_published(model, {"model": state | {"steps": 3}, "epoch": 9})
    images = images_for(model.backbone.host, 4)
    assert torch.equal(model(images), trained(images))
    with pytest.raises(CheckpointError, match="holds no tensors"):
        dyntune.load_published(model, {"epoch": 9})


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_changes(trained, make_host):
    model = dyntune.tune(make_host(), "dyt:recipe=published,scale=1,bottleneck=4")
    before = {name: p.clone() for name, p in model.named_parameters()}
    whole = _published(trained)
    cases = {
        "has no place": whole | {"blocks.0.lora_q.weight": torch.zeros(2)},
        "are the sizes": whole | {"blocks.0.adaptmlp.up_proj.bias": torch.zeros(3)},
        "lacks blocks.1.mlp.dispatcher.gate.bias": {
            name: tensor for name, tensor in whole.items() if name != "blocks.1.mlp_token_select.mlp_head.bias"
        },
    }
    for words, state in cases.items():
        with pytest.raises(CheckpointError, match=words):
            dyntune.load_published(model, state)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_the_public_code_stores_and_never_uses_is_let_pass(make_host):
    model = dyntune.tune(make_host(), "noah:prompts=2,ranks=0,bottlenecks=0")
    head = {f"head.{name}": p.detach().clone() for name, p in model.backbone.host.head.named_parameters()}
    state = {f"blocks.{index}.visual_prompt_token": torch.full((1, 4, 32), float(index)) for index in range(3)}
    unused = {"visual_prompt_token": torch.zeros(1, 2, 32), "blocks.0.attn.LoRA_a.weight": torch.zeros(4, 32)}
    dyntune.load_published(model, head | state | unused)
    assert model.tuned_state()["blocks.2.prompts.noah.prompts"].tolist() == [[2.0] * 32] * 2
    with pytest.raises(CheckpointError, match="has no place"):
        dyntune.load_published(model, head | state | {"blocks.0.attn.LoRA_c.weight": torch.zeros(4, 32)})


def test_the_names_of_our_own_files_are_taken_too(make_host, randomise):
    """Those of surrogates, which public code does not know, as well."""
    donor = randomise(dyntune.tune(make_host(), "dyt:bottleneck=4"), 3)
    model = dyntune.tune(make_host(), "dyt:bottleneck=4").eval()
    saved = {name: p.detach().clone() for name, p in donor.saved_state().items()}
    assert any("surrogate" in name for name in saved)
    dyntune.load_published(model, saved)
    assert all(torch.equal(p, saved[name]) for name, p in model.saved_state().items())


HEAD = {"weight": torch.linspace(-1, 1, 5 * 32).reshape(5, 32), "bias": torch.linspace(-1, 1, 5)}


def _split(state, names, joint):
    """A state with the map to queries, keys and values as three, under ``names``."""
    split = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            for part, own in zip(tensor.chunk(3), names, strict=True):
                split[name.replace(".attn.qkv.", f".attn.{own}.")] = part
        else:
            split[name] = tensor
    return {joint(name): tensor for name, tensor in split.items()}


def _as_adaptformer(name):
    return re.sub(r"^(blocks\.\d+)\.mlp\.", r"\1.", name)


def _as_vpt(name):
    for ours, theirs in (
        ("patch_embed.proj", "embeddings.patch_embeddings"),
        ("pos_embed", "embeddings.position_embeddings"),
        ("cls_token", "embeddings.cls_token"),
        ("blocks.", "encoder.layer."),
        (".norm1.", ".attention_norm."),
        (".norm2.", ".ffn_norm."),
        (".mlp.", ".ffn."),
        (".attn.proj.", ".attn.out."),
    ):
        name = name.replace(ours, theirs)
    return "enc.transformer." + re.sub(r"^norm\.", "encoder.encoder_norm.", name)


@torch.no_grad()
def test_whole_files_of_adaptformer_are_read_with_the_norm_in_front_of_their_head(make_host, randomise, images_for):
    model = randomise(dyntune.tune(make_host(), "adaptformer:bottleneck=4,scale=learnable"), seed=1).eval()
    images = images_for(model.backbone.host, 4)
    state = _split(_published(model), ("q_proj", "k_proj", "v_proj"), _as_adaptformer)
    assert {"blocks.0.attn.k_proj.bias", "blocks.1.fc1.weight", "blocks.0.adaptmlp.down_proj.weight"} < set(state)
    norm = torch.nn.BatchNorm1d(32, affine=False, eps=1e-6).eval()
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    for name in ("weight", "bias"):
        del state[f"head.{name}"]
        state[f"head.1.{name}"] = HEAD[name]
    state |= {f"head.0.{name}": tensor for name, tensor in norm.state_dict().items()}
    for name in [*state]:
        if name.endswith("adaptmlp.scale"):
            state[name] = state[name][None]  # (1,) in the public code
    other = dyntune.tune(make_host(seed=9), "adaptformer:bottleneck=4,scale=learnable").eval()
    dyntune.load_published(other, {"model": state, "epoch": 3})
    features = {}
    model.backbone.host.head.register_forward_pre_hook(lambda _, inputs: features.update(x=inputs[0]))
    model(images)
    expected = torch.nn.functional.linear(norm(features["x"]), HEAD["weight"], HEAD["bias"])
    torch.testing.assert_close(other(images), expected, atol=1e-5, rtol=1e-5)
    del state["blocks.2.attn.v_proj.bias"]
    with pytest.raises(CheckpointError, match=r"lacks host\.blocks\.2\.attn\.qkv\.bias"):
        dyntune.load_published(other, state)


@torch.no_grad()
@pytest.mark.parametrize("spec", ["vpt:prompts=2", "vpt:prompts=2,deep=false", "linear"])
def test_whole_files_of_vpt_are_read(make_host, randomise, images_for, spec):
    model = randomise(dyntune.tune(make_host(), spec), seed=1).eval()
    images = images_for(model.backbone.host, 4)
    host = {n.removeprefix("host."): p for n, p in model.backbone.named_parameters() if n.startswith("host.")}
    head = {f"head.last_layer.{name}": host.pop(f"head.{name}") for name in ("weight", "bias")}
    state = _split(host, ("query", "key", "value"), _as_vpt) | head
    assert {"enc.transformer.encoder.layer.0.ffn.fc1.weight", "enc.transformer.encoder.layer.2.attn.out.bias"} < set(
        state
    )
    if spec != "linear":
        first, *deep = (p for name, p in model.tuned_state().items() if "vpt" in name)
        state["enc.transformer.prompt_embeddings"] = first[None]
        state |= {"enc.transformer.deep_prompt_embeddings": torch.stack(deep)} if deep else {}
    other = dyntune.tune(make_host(seed=9), spec).eval()
    dyntune.load_published(other, {name: tensor.clone() for name, tensor in state.items()})
    assert torch.equal(other(images), model(images))


@torch.no_grad()
def test_petl_vits_names_of_adaptformer_are_taken(make_host, randomise, images_for):
    spec = "adaptformer:bottleneck=4,bias=false,scale=1"
    model = randomise(dyntune.tune(make_host(), spec), seed=1).eval()
    state = {
        re.sub(
            r"\.mlp\.parallel\.adapter\.(down|up)_proj", r".adapter_mlp.adapter_\1", n.removeprefix("host.")
        ): p.clone()
        for n, p in model.backbone.named_parameters()
    }
    assert "blocks.1.adapter_mlp.adapter_up.weight" in state
    other = dyntune.tune(make_host(seed=9), spec).eval()
    dyntune.load_published(other, state)
    images = images_for(model.backbone.host, 4)
    assert torch.equal(other(images), model(images))


def test_the_second_name_of_noahs_bias_is_passed_over(make_host):
    model = dyntune.tune(make_host(), "noah:prompts=0,ranks=0,bottlenecks=2")
    state = {f"head.{name}": p.detach().clone() for name, p in model.backbone.host.head.named_parameters()}
    for index in range(3):
        state |= {
            f"blocks.{index}.adapter.ln1.weight": torch.ones(4, 32),
            f"blocks.{index}.adapter.ln1.bias": torch.ones(4),
            f"blocks.{index}.adapter.ln2.weight": torch.ones(32, 4),
            f"blocks.{index}.adapter.ln2.bias": torch.full((32,), 3.0),
            f"blocks.{index}.adapter.sampled_bias_1": torch.full((32,), 3.0),
        }
    dyntune.load_published(model, state)
    assert model.tuned_state()["blocks.1.mlp.sequential.noah.up_proj.bias"].tolist() == [3.0] * 32


def test_numbers_that_are_not_finite_are_refused(trained, make_host):
    state = _published(trained)
    state["blocks.1.adaptmlp.up_proj.bias"][3] = torch.nan
    with pytest.raises(CheckpointError, match=r"blocks\.1\.adaptmlp\.up_proj\.bias' of the checkpoint is not finite"):
        dyntune.load_published(dyntune.tune(make_host(), "dyt:recipe=published,scale=1,bottleneck=4"), state)


@torch.no_grad()
def test_a_filled_model_is_saved_whole_where_its_backbone_was_filled_too(trained, make_host, images_for, tmp_path):
    model = dyntune.tune(make_host(seed=9), "dyt:recipe=published,scale=1,bottleneck=4").eval()
    dyntune.load_published(model, _published(trained))
    loaded = dyntune.load(model.save(tmp_path), backbone=make_host(seed=9))
    images = images_for(model.backbone.host, 2)
    assert torch.equal(loaded(images), trained(images))
