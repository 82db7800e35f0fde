"""What holds for a joint host that is made of an image ViT: parts on it, its names, and the image model's logits."""

import pytest
import torch
from test_hosts import OPTIONS, check, half_open, trained

import dyntune
from dyntune import InflatedViT
from dyntune.backbones.hosts import create_backbone

FRAMES = 4
PARTS = ("dyt", "dispatch", "adaptformer", "lora", "vpt", "full", "tome", "evit", "pyra")


@pytest.fixture
def build(make_host):
    """``build(kind)``: an inflated model with equal weights each time, the vectors of its slices among them."""

    def make(kind="plain", tubelet=2):
        torch.manual_seed(5)
        host = InflatedViT(make_host(kind, depth=2), FRAMES, tubelet)
        torch.nn.init.normal_(host.temporal.time)
        return host.eval()

    return make


def clips_for(host, batch, seed=0):
    size = host.vit.patch_embed.img_size
    return torch.randn((batch, host.frames, 3, *size), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("part", PARTS)
def test_a_part_on_an_inflated_host(build, tmp_path, part):
    spec = OPTIONS.get(part, part).replace("layers=1/2", "layers=0/1")
    torch.manual_seed(0)
    model = dyntune.tune(build(), spec)
    before = model.backbone.host.temporal.time.detach().clone()
    trained(model, clips_for, steps=2)
    assert not torch.equal(model.backbone.host.temporal.time, before)
    check(half_open(model), build(), clips_for(model.backbone.host, 3, seed=9), tmp_path)


def test_modules_that_read_an_image_are_refused(build):
    with pytest.raises(dyntune.DyntuneError, match="are of a whole clip"):
        dyntune.tune(build(), "convpass")


@torch.no_grad()
def test_gates_are_about_tubelets_and_see_the_whole_clip(build):
    torch.manual_seed(0)
    model = half_open(dyntune.tune(build(), "dyt:dispatch=attn-mlp")).eval()
    clips = clips_for(model.backbone.host, 2)
    assert model.backbone.grid == (8, 4) and model.backbone.slices == 2
    assert all(gate.values.shape == (2, 32) for gate in model.run(clips).gates)
    assert not torch.allclose(model(clips), model(clips.flip(1)), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("tubelet", [1, 2, 4])
def test_a_clip_in_which_nothing_moves_is_the_image(make_host, tubelet):
    """Without a class token, which would be one among more patches, and before the slices' vectors are trained."""
    vit = make_host("siglip").eval()
    images = torch.randn(2, 3, *vit.patch_embed.img_size)
    expected = vit(images)
    host = InflatedViT(vit, FRAMES, tubelet).eval()
    torch.testing.assert_close(host(images[:, None].expand(-1, FRAMES, -1, -1, -1)), expected, atol=1e-5, rtol=1e-5)
    moving = clips_for(host, 2)
    torch.testing.assert_close(host(moving), host(moving.flip(1)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_tokens_of_a_clip_stand_together(make_host):
    host = InflatedViT(make_host("plain", depth=2), FRAMES, 2).eval()
    model = dyntune.tune(host, "adaptformer").eval()
    for count in (2, FRAMES):
        clips = clips_for(host, count)
        tokens, behind = model.forward_intermediates(clips)
        assert torch.equal(tokens, model.forward_features(clips))
        assert tokens.shape == (count, 1 + FRAMES // 2 * 16, 32) and behind[0].shape == (count, 32, FRAMES // 2 * 4, 4)
        torch.testing.assert_close(model.forward_head(tokens), model(clips))
    with pytest.raises(dyntune.DyntuneError, match="tokens of a clip"):
        model.forward_head(tokens[0])


@torch.no_grad()
def test_a_saved_inflated_model_is_built_again_by_name(tmp_path):
    torch.manual_seed(0)
    host = create_backbone("inflated:vit_mini_patch4_32.dyntune", num_classes=4, frames=2, tubelet=1)
    model = dyntune.tune(host, "dyt").eval()
    clips = torch.randn(1, 2, 3, 32, 32)
    again = dyntune.load(model.save(tmp_path))
    assert torch.equal(again(clips), model(clips)) and again.preprocessing.clip.frames == 2
    assert model.origin.places == () and again.backbone.host.tubelet == 1


def test_what_is_refused(make_host):
    with pytest.raises(dyntune.DyntuneError, match="whole tubelets of 2"):
        InflatedViT(make_host("plain"), 3)
    with pytest.raises(dyntune.DyntuneError, match="at most 65536"):
        InflatedViT(make_host("plain"), 8194)
    for kind, changes in (("plain", {"global_pool": ""}), ("swin", {}), ("eva02", {})):
        with pytest.raises(dyntune.DyntuneError, match="cannot take the tokens of a whole clip"):
            InflatedViT(make_host(kind, **changes), 2)
