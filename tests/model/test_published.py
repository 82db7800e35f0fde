"""Checkpoints under the names of the public code."""

import pytest
import torch

import dyntune
from dyntune.core.errors import CheckpointError


@pytest.fixture
def trained(make_host, randomise):
    model = dyntune.tune(make_host(), "dyt:bottleneck=4")
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
    model = dyntune.tune(make_host(seed=9), "dyt:bottleneck=4").eval()
    images = images_for(model.backbone.host, 4)
    assert not torch.allclose(model(images), trained(images), atol=1e-3)
    dyntune.load_published(model, state)
    assert torch.equal(model(images), trained(images))


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_changes(trained, make_host):
    model = dyntune.tune(make_host(), "dyt:bottleneck=4")
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


def test_the_names_of_our_own_files_are_taken_too(trained, make_host):
    model = dyntune.tune(make_host(), "dyt:bottleneck=4").eval()
    saved = {name: p.detach().clone() for name, p in trained.saved_state().items()}
    dyntune.load_published(model, saved)
    assert all(torch.equal(p, saved[name]) for name, p in model.saved_state().items())
