"""Auto: what it finds is within the budget and near it, concrete, and found without touching the host."""

import copy
import logging
import re

import pytest
import timm
import torch

import dyntune
from dyntune.core.shapes import shapes_only

WIDE = {"img_size": 112, "depth": 4, "embed_dim": 192}
"""A host with 196 patches, whose quarters are single blocks."""


def share(model):
    return dyntune.cost(model).macs / model.dense_macs


@pytest.mark.parametrize(
    ("method", "policy", "budget"),
    [
        ("vpt", "tome", 0.6),
        ("adaptformer", "evit", 0.5),
        ("adaptformer", "dynamicvit", 0.6),
        ("adaptformer", "dispatch", 0.5),
    ],
)
def test_budget_is_met_within_a_hundredth(make_host, method, policy, budget):
    model = dyntune.tune(make_host("registers", **WIDE), method, f"auto:budget={budget},policy={policy}")
    assert budget * 0.99 < share(model) <= budget


def test_budget_is_met_on_vit_base():
    with shapes_only():
        host = timm.create_model("vit_base_patch16_224", num_classes=100)
    model = dyntune.tune(host, "adaptformer", "auto:budget=0.6")
    assert 0.599 < share(model) <= 0.6


def test_budget_is_met_on_every_host(make_host, host_name):
    model = dyntune.tune(make_host(host_name), "lora", "auto:budget=0.7")
    assert 0.6 < share(model) <= 0.7


def test_no_uniform_schedule_within_the_budget_is_nearer(make_host):
    found = share(dyntune.tune(make_host(), "adaptformer", "auto:budget=0.6"))
    uniform = [share(dyntune.tune(make_host(), "adaptformer", f"tome:r={r}")) for r in range(4, 9)]
    assert max(other for other in uniform if other <= 0.6) <= found


def test_it_searches_beside_another_policy(make_host):
    model = dyntune.tune(make_host(**WIDE), "dyt:rate=0.5", "auto:budget=0.4")
    assert 0.39 < share(model) <= 0.4
    assert model.spec.startswith("dyt+tome:r=")


def test_more_merges_stand_in_late_blocks(make_host):
    merges = dyntune.tune(make_host(**WIDE), "linear", "auto:budget=0.73").policies[0].r
    assert merges[0] == min(merges)
    assert max(merges) - min(merges) <= 2


@pytest.mark.parametrize("policy", ["tome", "dynamicvit"])
def test_found_policy_is_as_if_given(make_host, policy):
    """The same parts and the same random numbers, whether searched or written out."""
    torch.manual_seed(0)
    searched = dyntune.tune(make_host(), "adaptformer", f"auto:budget=0.75,policy={policy}")
    method, found = searched.spec.split("+")
    torch.manual_seed(0)
    given = dyntune.tune(make_host(), method, found)
    assert found.startswith(policy)
    assert searched.parts == given.parts
    states = [model.backbone.state_dict() for model in (searched, given)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_saved_and_loaded_without_a_search(make_host, images_for, tmp_path, caplog):
    model = dyntune.tune(make_host(**WIDE), "adaptformer", "auto").eval()
    folder = model.save(tmp_path)
    caplog.clear()
    loaded = dyntune.load(folder, backbone=make_host(**WIDE))
    assert not caplog.records
    assert loaded.spec == model.spec
    assert "auto" not in loaded.spec
    images = images_for(model.backbone.host, 2)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


@torch.no_grad()
def test_log_says_what_was_found(make_host, images_for, caplog):
    model = dyntune.tune(make_host("registers", **WIDE), "linear", "dispatch:rate=0.5", "auto:budget=0.5").eval()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    text = record.getMessage()
    assert text.startswith(f"auto:budget=0.5,policy=tome is {model.spec.split('+')[-1]}: ")
    macs, dense = (int(number.replace(",", "")) for number in re.search(r": ([\d,]+) of ([\d,]+) MACs", text).groups())
    assert (macs, dense) == (dyntune.cost(model).macs, model.dense_macs)
    counts = [reduction.count for reduction in model.run(images_for(model.backbone.host, 2)).reductions]
    assert f"tokens in the MLP of each block: {' '.join(map(str, counts))};" in text
    assert text.endswith("gated unit: 0.5 0.5 0.5 0.5.")


@torch.no_grad()
def test_what_runs_costs_what_was_promised(make_host, images_for):
    model = dyntune.tune(make_host(**WIDE), "adaptformer", "auto:budget=0.55").eval()
    with dyntune.MacCounter() as counter:
        model(images_for(model.backbone.host, 1))
    assert counter.macs - dyntune.cost(model).head_macs == dyntune.cost(model).macs


def test_a_budget_that_needs_no_reduction_gets_none(make_host):
    model = dyntune.tune(make_host(), "linear", "auto:budget=1")
    assert model.spec == "linear+tome:r=0"
    assert dyntune.cost(model).macs == model.dense_macs


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "parts", "reason"),
    [
        ("plain", ("adaptformer", "auto:budget=0.2,policy=dispatch"), r"takes between 0\.\d+ and 1\.\d+ of"),
        ("siglip", ("adaptformer", "auto:policy=evit"), "no class token"),
        ("plain", ("convpass", "auto"), "needs every patch"),
        ("plain", ("dyt", "auto:policy=dispatch"), "several gates"),
        ("plain", ("auto", "auto"), "only once"),
    ],
)
def test_refused_and_the_host_untouched(make_host, images_for, name, parts, reason):
    host = make_host(name)
    images = images_for(host, 2)
    modules = [(path, id(module)) for path, module in host.named_modules()]
    before = copy.deepcopy(host.state_dict()), [p.requires_grad for p in host.parameters()], host(images)
    with pytest.raises(dyntune.DyntuneError, match=reason):
        dyntune.tune(host, *parts)
    assert [(path, id(module)) for path, module in host.named_modules()] == modules
    assert all(torch.equal(host.state_dict()[key], value) for key, value in before[0].items())
    assert [p.requires_grad for p in host.parameters()] == before[1]
    assert torch.equal(host(images), before[2])
    dyntune.tune(host, "adaptformer")


def test_the_range_that_is_named_can_be_had(make_host):
    with pytest.raises(dyntune.DyntuneError) as error:
        dyntune.tune(make_host(), "adaptformer", "auto:budget=0.1,policy=dispatch")
    lowest = re.search(r"between ([\d.]+) and", str(error.value))[1]
    assert share(dyntune.tune(make_host(), "adaptformer", f"auto:budget={lowest},policy=dispatch")) <= float(lowest)


@pytest.mark.parametrize("spec", ["auto:budget=0", "auto:budget=1.01", "auto:policy=dyt"])
def test_bad_options_are_refused(make_host, spec):
    with pytest.raises(dyntune.DyntuneError, match=r"auto: .*(expected|one of)"):
        dyntune.tune(make_host(), "linear", spec)


def test_other_number_formats(make_host):
    model = dyntune.tune(make_host().to(torch.bfloat16), "adaptformer", "auto")
    assert model.spec == dyntune.tune(make_host(), "adaptformer", "auto").spec


def test_hosts_that_peft_has_wrapped(make_host):
    peft = pytest.importorskip("peft")

    def wrapped():
        return peft.get_peft_model(make_host(**WIDE), peft.LoraConfig(r=4, target_modules=["qkv", "fc1"]))

    host = wrapped()
    trained = {name for name, p in host.named_parameters() if p.requires_grad}
    model = dyntune.tune(host, "linear", "auto:budget=0.6")
    assert 0.594 < share(model) <= 0.6
    assert trained <= {name for name, p in host.named_parameters() if p.requires_grad}
    assert not any(p.is_meta for p in host.parameters())


def test_rates_have_three_decimals(make_host):
    for budget in (0.6, 0.7, 0.8):
        rate = dyntune.tune(make_host(), "linear", f"auto:budget={budget},policy=dispatch").policies[0].rate
        assert rate == round(rate, 3)
