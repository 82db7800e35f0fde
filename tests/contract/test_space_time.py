"""What holds for the joint host: VideoMAE's logits and counts, and every part on it that is defined."""

import json

import pytest
import torch
from test_hosts import GATES, OPTIONS, check, half_open, trained

import dyntune
from dyntune.backbones.families.space_time import SpaceTimeViT
from dyntune.backbones.hosts import create_backbone
from dyntune.core.errors import BackboneError
from dyntune.parts.registry import registered

TINY = {"num_classes": 5, "frames": 4, "img_size": 16, "patch_size": 8, "width": 32, "depth": 2, "heads": 4}
REFUSED = {"convpass": "are of a whole clip", "evit": "no class token"}


@pytest.fixture
def build(randomise):
    return lambda: randomise(SpaceTimeViT(**TINY)).eval()


def clips_for(host, batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, host.frames, 3, host.img_size, host.img_size), generator=generator)


@pytest.mark.parametrize("part", registered())
def test_a_part_on_the_joint_host(build, tmp_path, part):
    spec = OPTIONS.get(part, part).replace("layers=1/2", "layers=0/1").replace("r=3", "r=1")
    if part in REFUSED:
        with pytest.raises(dyntune.DyntuneError, match=REFUSED[part]):
            dyntune.tune(build(), spec)
        return
    torch.manual_seed(0)
    model = dyntune.tune(build(), spec)
    trained(model, clips_for)
    check(half_open(model), build(), clips_for(model.backbone.host, 3, seed=9), tmp_path)


@pytest.mark.parametrize("where", GATES)
def test_a_gate_on_the_joint_host(build, tmp_path, where):
    torch.manual_seed(0)
    model = half_open(dyntune.tune(build(), "lora", f"dispatch:where={where}")).eval()
    clips = clips_for(model.backbone.host, 3)
    assert all(gate.values.shape == (3, 8) for gate in model.run(clips).gates)
    check(model, build(), clips, tmp_path)


@torch.no_grad()
def test_an_exported_model_takes_any_number_of_clips(build, tmp_path):
    model = half_open(dyntune.tune(build(), "dyt:dispatch=attn-mlp")).eval()
    opened = dyntune.open_export(dyntune.export(model, tmp_path / "out", runtime="torch"), trust=True)
    for count in (1, 3):
        clips = clips_for(model.backbone.host, count)
        torch.testing.assert_close(opened(clips), model(clips), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("spec", "macs"),
    [
        ("linear", 180_489_096_960),
        ("dyt:recipe=published,bottleneck=64,rate=0.5", 137_924_595_456),
        ("dyt:recipe=published,bottleneck=64,rate=0.5,dispatch=attn-mlp", 83_568_332_544),
    ],
)
def test_macs_of_videomae(spec, macs):
    with torch.device("meta"):
        host = create_backbone("videomae_base_patch16_224", pretrained=False)
        assert sum(p.numel() for name, p in host.named_parameters() if not name.startswith("head.")) == 86_227_200
        assert dyntune.cost(dyntune.tune(host, spec)).macs == macs


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small model of transformers, and the folder that it was saved in."""
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = t.VideoMAEConfig(
        image_size=16, patch_size=8, num_frames=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, num_labels=5,
    )  # fmt: skip
    model = t.VideoMAEForVideoClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path_factory.mktemp("videomae")
    model.save_pretrained(folder)
    t.VideoMAEImageProcessor(image_mean=[0.4] * 3, image_std=[0.3] * 3).save_pretrained(folder)
    return model, folder


@torch.no_grad()
def test_logits_of_transformers(saved, tmp_path):
    model, folder = saved
    host = create_backbone(f"videomae:{folder}").eval()
    clips = clips_for(host, 2)
    expected = model(clips).logits
    torch.testing.assert_close(host(clips), expected, atol=1e-5, rtol=1e-5)
    tuned = dyntune.tune(host, "dyt").eval()
    torch.testing.assert_close(tuned.run(clips, complete=True).logits, expected, atol=1e-5, rtol=1e-5)
    assert tuned.preprocessing.mean == (0.4,) * 3 and tuned.preprocessing.clip.frames == 4
    assert torch.equal(dyntune.load(tuned.save(tmp_path))(clips), tuned(clips))


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "encoder.", "backbone."])
def test_files_of_the_public_code(build, tmp_path, prefix):
    from dyntune.backbones.families.space_time import load_weights

    host = build()
    state = {f"{prefix}{name}": tensor for name, tensor in host.state_dict().items()}
    proj = f"{prefix}patch_embed.proj.weight"
    state[proj] = state[proj].unflatten(1, (3, 2))  # there it is a convolution over space and time
    torch.save({"model": state}, tmp_path / "checkpoint.pth")
    other = SpaceTimeViT(**TINY).eval()
    load_weights(other, tmp_path / "checkpoint.pth")
    clips = clips_for(host, 2)
    assert torch.equal(other(clips), host(clips))
    convolved = torch.nn.functional.conv3d(clips.transpose(1, 2), state[proj], stride=(2, 8, 8)).flatten(2).mT
    bias = host.patch_embed["proj"].bias
    torch.testing.assert_close(host.embed(clips), convolved + bias + host.pos_embed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("videomae_tiny_patch16_224", "unknown joint model"),
        ("videomae_base_patch16_224", "no weights to download"),
        ("videomae:nowhere", "no folder of a VideoMAE"),
    ],
)
def test_what_is_refused(name, message):
    with pytest.raises(dyntune.DyntuneError, match=message):
        create_backbone(name)


CONFIG = {
    "model_type": "videomae", "num_frames": 4, "image_size": 16, "patch_size": 8, "tubelet_size": 2, "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip


def of_config(folder, **changed):
    (folder / "config.json").write_text(json.dumps(CONFIG | changed))
    return create_backbone(f"videomae:{folder}", pretrained=False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tubelet_size", 0),
        ("num_attention_heads", 0),
        ("num_frames", "16"),
        ("num_frames", -16),
        ("num_frames", 4.0),
        ("num_frames", True),
        ("image_size", [16, 24]),
        ("num_hidden_layers", 4000),
        ("hidden_size", 2**20),
        ("intermediate_size", 0),
        ("layer_norm_eps", "small"),
    ],
)
def test_a_number_of_a_folder_that_cannot_be(tmp_path, key, value):
    with pytest.raises(BackboneError, match=rf"config\.json: {key} is .*expected a") as refused:
        of_config(tmp_path, **{key: value})
    assert str(tmp_path) in str(refused.value) and repr(value) in str(refused.value)


def test_numbers_of_a_folder_that_do_not_go_together(tmp_path):
    assert of_config(tmp_path, image_size=[16, 16]).img_size == 16
    with pytest.raises(BackboneError, match=r"heads of equal width") as refused:
        of_config(tmp_path, num_attention_heads=5)
    assert str(tmp_path) in str(refused.value)


def test_weights_that_are_not_finite_and_clips_of_any_length_are_refused(build, tmp_path):
    from dyntune.backbones.families.space_time import load_weights

    host = build()
    state = host.state_dict()
    state["fc_norm.weight"] = torch.full_like(state["fc_norm.weight"], torch.inf)
    torch.save(state, tmp_path / "spoilt.pth")
    with pytest.raises(dyntune.DyntuneError, match=r"not finite in fc_norm\.weight"):
        load_weights(host, tmp_path / "spoilt.pth")
    with pytest.raises(dyntune.DyntuneError, match="at most 65536"):
        SpaceTimeViT(frames=4096, img_size=4096)
