"""What holds for clips on an image model: every part trains on them, skips tokens, is saved, loaded and merged."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_hosts import GATES, OPTIONS, check, half_open, trained
from torch.utils.data import Dataset

import dyntune
from dyntune.backbones.families.frames import ClipClassifier
from dyntune.data import Video
from dyntune.parts.policies.base import TokenPolicy
from dyntune.parts.registry import registered
from dyntune.training.evaluate import evaluate

FRAMES = 3


@pytest.fixture
def build(make_host, randomise):
    """``build(temporal, time, kind)``: a clip classifier with equal weights each time."""

    def make(temporal="attentive", time=None, kind="plain", frames=FRAMES):
        host = ClipClassifier(make_host(kind, depth=2), frames, temporal, time)
        randomise(host.temporal, 3)
        return host.eval()

    return make


def clips_for(host, batch, seed=0):
    size = host.vit.patch_embed.img_size
    return torch.randn((batch, host.frames, 3, *size), generator=torch.Generator().manual_seed(seed))


def heads_for(number, part):
    """Heads read what policies leave of tokens in ways of their own; other parts meet one of them."""
    return ("attentive", "mixer") if issubclass(part, TokenPolicy) else (("attentive", "mixer")[number % 2],)


@pytest.mark.parametrize(
    ("part", "temporal"),
    [
        (name, temporal)
        for number, (name, part) in enumerate(registered().items())
        for temporal in heads_for(number, part)
    ],
)
def test_a_part_on_clips(build, tmp_path, part, temporal):
    spec = OPTIONS.get(part, part).replace("layers=1/2", "layers=0/1")
    torch.manual_seed(0)
    model = dyntune.tune(build(temporal), spec)
    trainable = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert {name for name in trainable if ".temporal." in name}
    before = {name: p.detach().clone() for name, p in model.backbone.named_parameters()}
    trained(model, clips_for, steps=2)
    moved = {name for name, p in model.backbone.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= trainable and {name for name in moved if ".temporal." in name}
    check(half_open(model), build(temporal), clips_for(model.backbone.host, 3, seed=9), tmp_path)


def test_the_attentive_head_tells_a_hidden_patch_what_it_would_bring(build):
    """Its weight is 0 in DynamicViT's training, and its gradient what a small one would change."""
    head = build("attentive").temporal.double()
    x = torch.randn(1, FRAMES, 6, head.query_token.shape[-1], dtype=torch.float64)
    weights = torch.ones(1, FRAMES, 6, dtype=torch.float64)
    weights[..., ::2] = 0
    gradient = torch.autograd.grad(head(x, weights.requires_grad_()).square().sum(), weights)[0]
    for place in ((0, 0, 0), (0, 1, 2), (0, 0, 1)):
        moved = weights.detach().clone()
        moved[place] += 1e-6
        change = head(x, moved).square().sum() - head(x, weights.detach()).square().sum()
        assert gradient[place].item() == pytest.approx(change.item() / 1e-6, rel=1e-3)


@pytest.mark.parametrize("where", GATES)
def test_a_gate_on_clips(build, tmp_path, where):
    torch.manual_seed(0)
    model = half_open(dyntune.tune(build(), "lora", f"dispatch:where={where}")).eval()
    clips = clips_for(model.backbone.host, 3, seed=9)
    gates = model.run(clips).gates
    assert all(gate.values.shape == (3 * FRAMES, 16) for gate in gates)
    other = clips.clone()
    other[:, 1:] = 0
    for gate, changed in zip(gates, model.run(other).gates, strict=True):  # a frame's gates are its own affair
        assert torch.equal(gate.values[::FRAMES], changed.values[::FRAMES])
    check(model, build(), clips, tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["siglip", "average", "eva02", "naflex", "beit", "dinov3", "swin"])
@pytest.mark.parametrize("temporal", ["mean", "attentive", "mixer"])
def test_on_other_image_models(make_host, tmp_path, kind, temporal):
    def build():
        torch.manual_seed(0)
        return ClipClassifier(make_host(kind), FRAMES, temporal).eval()

    host = build()
    size = host.vit.patch_embed.img_size if hasattr(host.vit, "patch_embed") else (32, 32)
    clips = torch.randn(2, FRAMES, 3, *size)
    expected = host(clips)
    if temporal == "mean":
        logits = host.vit(clips.flatten(0, 1)).unflatten(0, (2, FRAMES)).mean(1)
        torch.testing.assert_close(expected, logits, atol=1e-5, rtol=1e-5)
    model = half_open(dyntune.tune(host, "dyt")).eval()
    torch.testing.assert_close(model.run(clips, complete=True).logits, expected, atol=1e-5, rtol=1e-5)
    check(model, build(), clips, tmp_path)


@torch.no_grad()
@pytest.mark.parametrize(
    ("temporal", "time", "sees"),
    [
        ("mean", None, False),
        ("attentive", "none", False),
        ("mixer", "none", False),
        ("attentive", None, True),
        ("mixer", None, True),
    ],
)
def test_what_sees_the_order_of_frames(build, temporal, time, sees):
    model = dyntune.tune(build(temporal, time), "linear").eval()
    clips = clips_for(model.backbone.host, 2)
    difference = (model(clips) - model(clips.flip(1))).abs().max()
    assert difference > 1e-3 if sees else difference < 1e-5


@torch.no_grad()
def test_the_attentive_head_is_what_is_written(build):
    """One query that attends to the normed tokens of all frames, head by head."""
    host = build("attentive")
    clips = clips_for(host, 2)
    head, width = host.temporal, 32
    tokens = host.vit.forward_features(clips.flatten(0, 1)).unflatten(0, (2, FRAMES)) + head.time
    tokens = tokens.flatten(1, 2)
    query = head.norm_q(head.query_token[0, 0]) @ head.q.weight.T + head.q_bias
    keys, values = head.norm_k(tokens) @ head.k.weight.T, head.norm_v(tokens) @ head.v.weight.T + head.v_bias
    read = torch.zeros(2, width)
    for start in range(0, width, 8):
        part = slice(start, start + 8)
        shares = ((keys[..., part] @ query[part]) * 8**-0.5).softmax(-1)
        read[:, part] = (shares.unsqueeze(-1) * values[..., part]).sum(1)
    torch.testing.assert_close(host(clips), host.vit.head(head.proj(read)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("spec", "macs"),
    [
        ("linear", 142_530_610_944),
        ("adaptformer:bottleneck=64", 144_389_736_192),
        ("dyt:recipe=published,bottleneck=64,rate=0.5", 99_975_546_624),
    ],
)
def test_macs_of_the_published_model(spec, macs):
    import timm

    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=400)
        model = dyntune.tune(ClipClassifier(vit, 8, "attentive", "none"), spec)
    cost = dyntune.cost(model)
    assert cost.macs == macs and cost.dense_macs == 142_530_610_944
    assert cost.head_params == 2_366_976 + 400 * 769 and cost.head_macs == 400 * 768


def test_gates_on_clips_are_calibrated_for_other_rates(build):
    model = dyntune.tune(build(), "dyt:rate=0.5").eval()
    clips = clips_for(model.backbone.host, 6)
    model.calibration = dyntune.calibrate(model, [(clip, 0) for clip in clips], rates=(0.3, 0.7))
    for rate in (0.3, 0.7):
        model.set_rate(rate)
        assert evaluate(model, [(clips, torch.zeros(6, dtype=torch.long))]).activation == pytest.approx(rate, abs=0.05)


class Films(Dataset):
    """Clips of noise, as tensors, as videos of as many frames, or as rows of these, with two labels."""

    def __init__(self, kind, folder, shape, labels=2):
        self.kind, self.labels = kind, labels
        noise = np.random.default_rng(0).integers(0, 255, (6, FRAMES, *shape, 3), dtype=np.uint8)
        self.clips = torch.from_numpy(noise).permute(0, 1, 4, 2, 3).float()
        self.videos = []
        for number, frames in enumerate(noise):
            (folder / str(number)).mkdir()
            for place, frame in enumerate(frames):
                Image.fromarray(frame).save(folder / str(number) / f"{place}.png")
            self.videos.append(Video(folder / str(number)))

    def __len__(self):
        return 6

    def __getitem__(self, index):
        given = self.clips[index] if self.kind == "tensors" else self.videos[index]
        label = index % self.labels
        return {"video": given, "label": label} if self.kind == "rows" else (given, label)


@pytest.mark.parametrize("kind", ["tensors", "videos", "rows"])
def test_clips_of_others_train_and_are_looked_at(make_host, tmp_path, kind):
    host = ClipClassifier(make_host("plain", depth=1, num_classes=2), FRAMES)
    model = dyntune.tune(host, "linear")
    size = model.preprocessing.size
    data = Films(kind, tmp_path, size)
    options = {"epochs": 1, "batch_size": 3, "device": "cpu"}
    assert dyntune.fit(model, data, data, **options).best_accuracy is not None
    assert dyntune.evaluate(model, data).images == 6
    data.labels = 3
    with pytest.raises(dyntune.DyntuneError, match="the label of sample 2 of the training set is 2"):
        dyntune.fit(model, data, **options)
    image_model = dyntune.tune(make_host("plain", depth=1, num_classes=2), "linear")
    with pytest.raises(dyntune.DyntuneError, match=r"the model takes float32 tensors of shape \(3|the data are videos"):
        dyntune.evaluate(image_model, data)
    images = [(torch.zeros(3, *size), 0)] if kind == "tensors" else [(Image.new("RGB", (40, 40)), 0)]
    with pytest.raises(dyntune.DyntuneError, match=r"float32 tensors of shape \(3, 3|the data are images"):
        dyntune.evaluate(model, Rows(images))


class Rows(Dataset):
    """Samples from a list."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@torch.no_grad()
def test_a_saved_clip_model_is_built_again_by_name(tmp_path):
    from dyntune.backbones.hosts import create_backbone

    torch.manual_seed(0)
    host = create_backbone("frames:vit_mini_patch4_32.dyntune", num_classes=4, frames=2, temporal="mixer")
    model = dyntune.tune(host, "dyt").eval()
    clips = torch.randn(1, 2, 3, 32, 32)
    again = dyntune.load(model.save(tmp_path))
    assert torch.equal(again(clips), model(clips))
    assert model.origin.places == () and model.origin.name.startswith("frames:")
    assert replace(model.origin, name="frames:hf:some/where").places == ("hf:some/where",)  # which is asked about
    assert again.preprocessing.clip.frames == 2 and type(again.backbone.host.temporal).__name__ == "Mixer"


@torch.no_grad()
def test_a_checkpoint_of_the_public_code_is_read(build, randomise):
    """Its head is called otherwise, and reads the tokens without their place in time; its folders hold more than it."""
    model, other = (dyntune.tune(build(time="none"), "dyt:recipe=published,bottleneck=4").eval() for _ in range(2))
    randomise(model.backbone, 7)
    state = {}
    for name, tensor in model.backbone.named_parameters():
        name = name.removeprefix("host.").removeprefix("vit.").replace(".mlp.parallel.adapter.", ".adaptmlp.")
        place, _, own = name.partition(".")
        if place == "temporal":
            inside = "cross_attn." if own.split("_")[0] not in ("norm", "query") else ""
            name = own if own == "query_token" else f"attentive_blocks.{inside}{own}"
        state[name.replace(".mlp.dispatcher.gate.", ".mlp_token_select.mlp_head.")] = tensor.clone()
    head = {"query_token", "attentive_blocks.norm_k.bias", "attentive_blocks.cross_attn.q_bias"}
    head |= {"attentive_blocks.cross_attn.proj.weight", "blocks.1.adaptmlp.up_proj.bias"}
    assert head | {"blocks.0.mlp_token_select.mlp_head.weight", "head.weight", "patch_embed.proj.bias"} < state.keys()
    clips = clips_for(model.backbone.host, 2)
    assert not torch.allclose(other(clips), model(clips), atol=1e-3)
    dyntune.load_published(other, {"model": state, "epoch": 11, "optimizer": {}})
    assert torch.equal(other(clips), model(clips))


@torch.no_grad()
def test_an_exported_model_takes_any_number_of_clips(build, tmp_path):
    model = half_open(dyntune.tune(build("attentive"), "dyt")).eval()
    opened = dyntune.open_export(dyntune.export(model, tmp_path / "out", runtime="torch"), trust=True)
    for count in (1, 3):
        clips = clips_for(model.backbone.host, count)
        torch.testing.assert_close(opened(clips), model(clips), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_peft_around_a_clip_classifier(build, tmp_path):
    peft = pytest.importorskip("peft")

    def wrapped():
        torch.manual_seed(1)
        return peft.get_peft_model(build(), peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False))

    model = half_open(dyntune.tune(wrapped(), "dispatch")).eval()
    clips = clips_for(build(), 2)
    loaded = dyntune.load(model.save(tmp_path), backbone=build())
    assert torch.equal(loaded(clips), model(clips))


def test_mixing_treats_all_frames_of_a_clip_alike():
    from dyntune.model.tasks import Classification
    from dyntune.training.settings import TrainSettings

    clips = torch.arange(4.0).view(4, 1, 1, 1, 1).expand(4, 3, 3, 16, 16).clone()
    mixed, shares = Classification().mix(clips, torch.arange(4), 4, TrainSettings(cutmix=1.0))
    assert mixed.shape == clips.shape and shares.shape == (4, 4)
    assert torch.equal(mixed, mixed[:, :1].expand_as(mixed))
    assert torch.allclose(mixed[:, 0, 0].flatten(1).mean(1), shares @ torch.arange(4.0), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temporal": "lstm"}, "unknown temporal head 'lstm'"),
        ({"time": "sine"}, "unknown time 'sine'"),
        ({"temporal": "mean", "time": "learned"}, "cannot see the order"),
        ({"frames": 0}, "at least 1"),
    ],
)
def test_what_is_refused(make_host, changes, message):
    with pytest.raises(dyntune.DyntuneError, match=message):
        ClipClassifier(make_host("plain"), **changes)


@pytest.mark.parametrize(("kind", "changes"), [("plain", {"global_pool": ""}), ("distilled", {})])
def test_a_model_without_one_classifier_is_refused(make_host, kind, changes):
    with pytest.raises(dyntune.DyntuneError, match="linear classifier"):
        ClipClassifier(make_host(kind, **changes))


@torch.no_grad()
def test_without_a_classifier_the_model_gives_features(make_host):
    host = ClipClassifier(make_host("plain", num_classes=0), FRAMES)
    assert dyntune.tune(host, "dyt").eval()(clips_for(host, 2)).shape == (2, 32)


def test_images_and_other_lengths_are_refused(build):
    model = dyntune.tune(build(), "linear")
    for wrong in (torch.zeros(2, 3, 32, 32), torch.zeros(2, FRAMES + 1, 3, 32, 32)):
        with pytest.raises(dyntune.DyntuneError, match="expected clips of shape"):
            model(wrong)
