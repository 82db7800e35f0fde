"""Sites: where they are on each kind of host, and what a change on them may rely on."""

import pytest
import torch
from torch import nn

import dyntune
from dyntune.backbones.hosts import wrap
from dyntune.backbones.sites import Change, Changed, Site
from dyntune.core.errors import BackboneError

PER_BLOCK = ["norm1", "qkv", "proj", "norm2", "fc1", "fc2"]


class Double(Change):
    def forward(self, x, y):
        return 2 * y

    @torch.no_grad()
    def fold(self, site):
        site.weight.mul_(2)
        if site.bias is not None:
            site.set_bias(2 * site.bias)


class Plus(Change):
    def forward(self, x, y):
        return y + 1


@pytest.mark.parametrize(
    "name,kinds,last",
    [
        ("plain", PER_BLOCK, "norm"),
        ("clip", PER_BLOCK, "norm"),
        ("average", PER_BLOCK, "fc_norm"),
        ("swiglu", [*PER_BLOCK[:5], "fc1", "fc2"], "norm"),
        ("swiglu_packed", PER_BLOCK, "norm"),
    ],
)
def test_every_host_shows_its_sites_in_order(make_host, name, kinds, last):
    host = make_host(name)
    sites = list(wrap(host).sites())
    assert [site.kind for site in sites] == ["patch", *kinds * 3, "norm"]
    assert sites[-1].path == last
    assert [site.block for site in sites[1:-1]] == [index for index in range(3) for _ in kinds]
    for site in sites:
        assert host.get_submodule(site.path) is site.module
        assert site.channels == site.module.weight.shape[0]


def test_sites_of_some_kinds(make_host):
    backbone = wrap(make_host())
    assert [site.path for site in backbone.sites("qkv", "fc2")][:2] == ["blocks.0.attn.qkv", "blocks.0.mlp.fc2"]
    assert {site.channel_dim for site in backbone.sites("patch")} == {1}
    assert {site.channel_dim for site in backbone.sites("qkv", "norm")} == {-1}


@torch.no_grad()
def test_changes_act_in_turn_and_show_the_attributes_of_what_they_change(make_host):
    host = make_host()
    site = next(wrap(host).sites("qkv"))
    x = torch.randn(2, 17, 32)
    plain = host.blocks[0].attn.qkv
    expected = plain(x)
    site.add("twice", Double())
    site.add("plus", Plus())
    changed = host.blocks[0].attn.qkv
    assert isinstance(changed, Changed)
    torch.testing.assert_close(changed(x), 2 * expected + 1)
    assert site.module is plain
    assert list(site.changes) == ["twice", "plus"]
    assert (changed.in_features, changed.weight) == (32, plain.weight)
    with pytest.raises(AttributeError):
        _ = changed.no_such_thing
    with pytest.raises(BackboneError, match=r"plus is already installed at blocks\.0\.attn\.qkv"):
        site.add("plus", Plus())
    site.restore()
    assert host.blocks[0].attn.qkv is plain


@torch.no_grad()
def test_fold_writes_the_change_into_the_weights(make_host):
    host = make_host()
    site = next(wrap(host).sites("qkv"))
    x = torch.randn(2, 17, 32)
    expected = 4 * host.blocks[0].attn.qkv(x)
    site.add("twice", Double())
    site.add("again", Double())
    site.fold()
    assert type(host.blocks[0].attn.qkv) is nn.Linear
    torch.testing.assert_close(host.blocks[0].attn.qkv(x), expected)


def test_a_host_that_carries_changes_is_refused(make_host):
    host = make_host()
    dyntune.tune(host, "lora")
    with pytest.raises(BackboneError, match="another tuned model has changed its modules"):
        dyntune.tune(host, "linear")


def test_a_refused_part_takes_its_changes_off_again(make_host):
    host = make_host()
    with pytest.raises(BackboneError, match="already installed"):
        dyntune.tune(host, "lora", "lora")
    assert not [module for module in host.modules() if isinstance(module, Changed)]
    assert all(p.requires_grad for p in host.parameters())


def test_nothing_stands_behind_a_whole_block(make_host):
    with pytest.raises(BackboneError, match=r"cannot stand behind blocks\.0, a whole block"):
        wrap(make_host()).blocks[0].add_sequential("double", nn.Identity())


def test_the_parts_of_a_map_are_thirds_or_what_the_family_says():
    owner = torch.nn.Module()
    owner.qkv = torch.nn.Linear(4, 8)
    site = Site("qkv", 0, "blocks.0.attn.qkv", owner, "qkv", sizes=(4, 2, 2))
    assert [site.part(kind).rows for kind in ("q", "k", "v")] == [(0, 4), (4, 6), (6, 8)]
    assert torch.equal(site.part("k").weight, owner.qkv.weight[4:6])
    with pytest.raises(BackboneError, match="gives 8 channels"):
        Site("qkv", 0, "blocks.0.attn.qkv", owner, "qkv").part("q")
