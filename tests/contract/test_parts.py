"""What holds for every registered tuning method, token policy and preset."""

import dataclasses
import json
import re
from typing import get_type_hints

import pytest
import torch

import dyntune
from dyntune.parts.methods.base import TuningMethod
from dyntune.parts.policies.base import TokenPolicy
from dyntune.parts.policies.dispatcher import Dispatcher
from dyntune.parts.policies.reducing import ReducingPolicy
from dyntune.parts.presets.base import Preset
from dyntune.parts.registry import expand, part_from_dict, registered, resolve
from dyntune.parts.spec import format_spec

NAMES = tuple(registered())
METHODS = tuple(name for name, cls in registered().items() if issubclass(cls, TuningMethod))
PRESETS = tuple(name for name, cls in registered().items() if issubclass(cls, Preset))
REDUCING = tuple(name for name, cls in registered().items() if issubclass(cls, ReducingPolicy))
DEEP = {"evit": "evit:layers=0/1", "dynamicvit": "dynamicvit:keep=0.8/0.5,layers=1/2"}
"""Parts whose published layers a host of three blocks does not have, with layers that it has."""
CHANGES_AT_ONCE = {
    "ssf": "its scales and shifts start with a deviation of 0.02, as published",
    "vpt": "prompts are attended to from the start",
    "noah": "it has prompts",
    "res-tuning-bypass": "the head reads the bypass",
}
"""Parts whose published form changes the logits before any training."""
_SEVERAL = "several gates at the same time"
_ATTENTION = "reads queries and keys of all tokens"
REFUSES_DISPATCH = {
    **{
        (name, where): _ATTENTION
        for name in ("tome", "evit", "pyra", "fpet")
        for where in ("attn", "attn-mlp", "layer")
    },
    **{(name, where): _SEVERAL for name in ("dispatch", "dyt") for where in ("mlp", "attn-mlp", "layer")},
    ("auto", "attn"): _ATTENTION,
    ("res-tuning-bypass", "any"): "no gradient into the backbone",
    ("moe-adapter", "layer"): "looks at all tokens",
    ("convpass", "layer"): "looks at all tokens",
}
"""Pairings that are not defined, and what the error says."""
REFUSES_REDUCTION = {"convpass": "every patch in its place", "res-tuning-bypass": "no gradient into the backbone"}
"""Methods that tokens may not be taken from, and what the error says."""
UNREACHED = r"^blocks\.2\.mlp\.reducers\.pyra\."
"""What a class token does not read any more: PYRA's merge in the last block. Published checkpoints have it."""


def host_for(make_host, part_name):
    return make_host("registers", depth=12) if part_name in DEEP else make_host("registers")


def shallow(name):
    """The part for a host of three blocks."""
    return DEEP.get(name, name)


@pytest.fixture(params=NAMES)
def part_name(request):
    return request.param


@pytest.fixture
def fresh(make_host, part_name):
    torch.manual_seed(0)
    return dyntune.tune(host_for(make_host, part_name), part_name)


def trained(model, images_for, steps=3):
    """The model after ``steps`` optimiser steps on its training loss, each of which must move what is trained."""
    torch.manual_seed(1)
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01)
    for step in range(steps):
        loss = dyntune.training_loss(model, images_for(model.backbone.host, 8, step), torch.arange(8) % 5)
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
    return model.eval()


def test_registry_knows_the_parts_of_the_package():
    assert {"adaptformer", "moe-adapter", "full", "linear", "dispatch", "dyt"} <= set(NAMES)
    for name, cls in registered().items():
        assert cls.name() == name
        assert issubclass(cls, TuningMethod | TokenPolicy | Preset)


@torch.no_grad()
def test_fresh_part_leaves_the_hosts_logits_unchanged(make_host, images_for, fresh, part_name):
    host = host_for(make_host, part_name)
    images = images_for(host, 4)
    if part_name in CHANGES_AT_ONCE:
        assert (fresh.eval().run(images, complete=True).logits - host(images)).abs().max() > 1e-4
        return
    torch.testing.assert_close(fresh.eval().run(images, complete=True).logits, host(images), atol=1e-6, rtol=1e-5)


def test_training_moves_the_trainable_tensors_and_nothing_else(images_for, fresh):
    before = {name: p.detach().clone() for name, p in fresh.backbone.named_parameters()}
    buffers = {name: b.clone() for name, b in fresh.backbone.named_buffers()}
    trainable = {name for name, p in fresh.backbone.named_parameters() if p.requires_grad}
    trained(fresh, images_for)
    moved = {name for name, p in fresh.backbone.named_parameters() if not torch.equal(p, before[name])}
    moved |= {name for name in trainable if re.search(UNREACHED, name)}
    assert moved == trainable == set(fresh.tuned_state())
    assert {"host.head.weight", "host.head.bias"} <= moved
    assert all(torch.equal(b, buffers[name]) for name, b in fresh.backbone.named_buffers())


@torch.no_grad()
def test_masked_equals_compact_after_training(images_for, fresh):
    with torch.enable_grad():
        trained(fresh, images_for)
    images = images_for(fresh.backbone.host, 4, seed=9)
    masked, compact = (fresh.run(images, execution=how).logits for how in ("masked", "compact"))
    torch.testing.assert_close(masked, compact, atol=1e-5, rtol=1e-5)


def test_saved_and_loaded_model_is_equal(make_host, images_for, fresh, part_name, tmp_path):
    trained(fresh, images_for)
    loaded = dyntune.load(fresh.save(tmp_path / "adapter"), backbone=host_for(make_host, part_name))
    assert loaded.spec == fresh.spec
    assert loaded.parts == fresh.parts
    with torch.no_grad():
        images = images_for(fresh.backbone.host, 4, seed=9)
        assert torch.equal(loaded(images), fresh(images))


@torch.no_grad()
def test_merged_equals_unmerged(images_for, fresh, part_name):
    with torch.enable_grad():
        trained(fresh, images_for)
    images = images_for(fresh.backbone.host, 4, seed=9)
    expected, before = fresh(images), dyntune.cost(fresh).macs
    merged = fresh.merge()
    torch.testing.assert_close(merged(images), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fresh(images), expected, atol=1e-4, rtol=1e-4)
    assert merged is (fresh if fresh.unmerged else fresh.backbone.host)
    assert dyntune.cost(fresh).macs <= before
    if not fresh.unmerged:
        assert dyntune.cost(fresh).macs == fresh.dense_macs
        assert not list(fresh.backbone.shared)
    assert fresh.merge() is merged
    with pytest.raises(dyntune.DyntuneError, match="merged"):
        fresh.save("nowhere")


@pytest.mark.parametrize("where", ["mlp", "attn", "attn-mlp", "layer"])
def test_dispatch_on_it_skips_and_learns(make_host, images_for, part_name, where):
    """Any method takes a gate: masked equals compact, and the gates, the method and the head all learn."""
    torch.manual_seed(0)
    reason = REFUSES_DISPATCH.get((part_name, where)) or REFUSES_DISPATCH.get((part_name, "any"))
    if reason:
        with pytest.raises(dyntune.DyntuneError, match=reason):
            dyntune.tune(make_host("registers"), shallow(part_name), f"dispatch:where={where}")
        return
    model = dyntune.tune(make_host("registers"), shallow(part_name), f"dispatch:where={where},rate=0.4")
    before = {name: p.detach().clone() for name, p in model.tuned_state().items()}
    trained(model, images_for)
    assert all(not torch.equal(p, before[name]) for name, p in model.tuned_state().items())
    images = images_for(model.backbone.host, 4, seed=9)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Dispatcher):  # a few steps at this rate may have opened or closed every gate
                module.gate.weight.normal_()
                module.gate.bias.zero_()
        masked, compact = (model.run(images, execution=how) for how in ("masked", "compact"))
    assert 0 < sum(float(gate.values.mean()) for gate in compact.gates) / len(compact.gates) < 1
    torch.testing.assert_close(masked.logits, compact.logits, atol=1e-5, rtol=1e-5)
    cost = dyntune.cost(model)
    with dyntune.MacCounter() as counter, torch.no_grad():
        model.run(images[:1], complete=True)
    assert cost.macs < counter.macs - cost.head_macs


@pytest.mark.parametrize("policy", REDUCING)
@pytest.mark.parametrize("method", METHODS)
def test_reduction_with_it_learns(make_host, images_for, method, policy):
    """Any method takes a policy that reduces tokens: all of it learns, and fewer MACs run than without the policy."""
    torch.manual_seed(0)
    if method in REFUSES_REDUCTION:
        with pytest.raises(dyntune.DyntuneError, match=REFUSES_REDUCTION[method]):
            dyntune.tune(make_host("registers"), method, shallow(policy))
        return
    model = dyntune.tune(make_host("registers"), method, shallow(policy))
    before = {name: p.detach().clone() for name, p in model.tuned_state().items() if not re.search(UNREACHED, name)}
    trained(model, images_for, steps=12 if method == "noah" else 3)  # each step draws one size of noah's modules
    assert not [name for name, p in before.items() if torch.equal(p, model.tuned_state()[name])]
    images = images_for(model.backbone.host, 4, seed=9)
    with torch.no_grad():
        masked, compact = (model.run(images, execution=how) for how in ("masked", "compact"))
        torch.testing.assert_close(masked.logits, compact.logits, atol=1e-5, rtol=1e-5)
        with dyntune.MacCounter() as counter:
            model.run(images[:1])
        with dyntune.MacCounter() as complete:
            model.run(images[:1], complete=True)
    assert compact.reductions
    assert counter.macs < complete.macs
    cost = dyntune.cost(model)
    assert cost.macs + cost.head_macs == counter.macs


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_gives_the_same_gradients(make_host, images_for, name):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = dyntune.tune(make_host(), shallow(name)).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.backbone.host.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        dyntune.training_loss(model, images_for(model.backbone.host, 4), torch.arange(4)).total.backward()
        gradients.append({n: p.grad for n, p in model.tuned_state().items()})
    for tensor, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][tensor], value, atol=1e-5, rtol=1e-4, msg=tensor)


@torch.no_grad()
def test_runs_under_mixed_precision_and_compiled(make_host, images_for, part_name):
    torch.manual_seed(0)
    depth = 3 if part_name in (*DEEP, "auto") else 2
    model = dyntune.tune(make_host("registers", depth=depth), shallow(part_name)).eval()
    images = images_for(model.backbone.host, 4)
    expected = model.run(images, complete=True).logits
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.run(images, complete=True).logits
    assert (mixed.float() - expected).abs().max() < 0.2 * expected.abs().max()
    torch._dynamo.reset()
    whole = not any(policy.gates(unit) for policy in model.policies for unit in model.backbone.all_units())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=whole)(images)
    torch.testing.assert_close(compiled, model(images), atol=1e-5, rtol=1e-5)


def test_cost_adds_up(fresh):
    cost = dyntune.cost(fresh)
    counted = {name: p.numel() for name, p in fresh.tuned_state().items()}
    assert cost.trainable_params + cost.head_params == sum(counted.values())
    assert cost.total_params == sum(p.numel() for p in fresh.backbone.parameters())
    surrogates = sum(buffer.numel() for name, buffer in fresh.named_buffers() if ".surrogate." in name)  # in bf16
    assert cost.adapter_bytes == 4 * sum(counted.values()) + 2 * surrogates
    assert json.loads(json.dumps(cost.to_dict())) == cost.to_dict()


def variants(cls):
    """The default part, and one for each other value that a field can plainly take."""
    yield cls()
    for field in dataclasses.fields(cls):
        for value in (0.25, 3, True, False, "learnable", "attn", "attn-mlp", "layer", "sigmoid", "none", "outputs"):
            try:
                part = cls(**{field.name: value})
            except dyntune.DyntuneError:
                continue
            yield part


def test_round_trip_as_json(part_name):
    for part in variants(registered()[part_name]):
        data = json.loads(json.dumps(part.to_dict()))
        assert data["type"] == part_name
        assert part_from_dict(data) == part


def test_round_trip_as_spec(part_name):
    seen = set()
    for part in variants(registered()[part_name]):
        text = format_spec(part)
        assert resolve([text]) == (part,)
        seen.add(text)
    assert part_name in seen
    assert len(seen) > bool(dataclasses.fields(registered()[part_name]))


def test_every_option_is_described_once(part_name):
    cls = registered()[part_name]
    assert list(cls.options()) == [field.name for field in dataclasses.fields(cls)]
    assert all(len(text) > 5 for text in cls.options().values())


def test_summary_and_source_are_given(part_name):
    cls = registered()[part_name]
    assert cls.summary().endswith(".")
    assert cls.source


OWN_FORMS = {"dyt": ("scale",)}
"""Options of a preset that have values which its parts do not know: a recipe chooses DyT's scale."""


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_take_their_options_from_the_parts_that_they_stand_for(preset):
    cls = registered()[preset]
    assert {type(item) for part in variants(cls) for item in expand([part])} == set(cls.parts)
    taken = [(part, name) for part in cls.parts for name in part.options() if name in cls.options()]
    assert {part for part, _ in taken} == set(cls.parts)
    for part, name in taken:
        if name not in OWN_FORMS.get(preset, ()):
            assert get_type_hints(part)[name] == get_type_hints(cls)[name]
    assert any(cls.options()[name] == part.options()[name] for part, name in taken)


def test_presets_stand_for_methods_and_policies(part_name):
    for part in variants(registered()[part_name]):
        inner = expand([part])
        assert all(isinstance(item, TuningMethod | TokenPolicy) for item in inner)
        assert isinstance(part, Preset) or inner == (part,)
