"""Where backbones come from: weight files of each kind, and hosts that are refused."""

import argparse
import inspect
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.layers import Attention
from timm.models.cait import Cait
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    VisionTransformer,
)

import dyntune
from dyntune.backbones.hosts import create_backbone, rebuild, wrap
from dyntune.backbones.origin import BackboneSource, fingerprint
from dyntune.backbones.timm_names import FILES, nearest
from dyntune.backbones.timm_weights import load_weights
from dyntune.core.errors import BackboneError


class Bomb:
    """Unpickling this makes the directory ``path``."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def google_arrays(host, prefix="", classes=7):
    """The arrays of a ViT under the names and in the layout of Google's files."""
    state = {name: value.numpy() for name, value in host.state_dict().items()}
    heads, width = host.blocks[0].attn.num_heads, host.embed_dim
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": np.ones((width, classes), np.float32),
        "head/bias": np.ones(classes, np.float32),
        "pre_logits/kernel": np.ones((width, width), np.float32),
        "pre_logits/bias": np.ones(width, np.float32),
    }
    for index in range(len(host.blocks)):
        block, theirs = f"blocks.{index}.", f"Transformer/encoderblock_{index}/"
        for norm, name in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays[f"{theirs}{name}/scale"] = state[f"{block}{norm}.weight"]
            arrays[f"{theirs}{name}/bias"] = state[f"{block}{norm}.bias"]
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        weights = np.split(state[f"{block}attn.qkv.weight"], 3)
        biases = np.split(state[f"{block}attn.qkv.bias"], 3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            arrays[f"{attention}{name}/kernel"] = weight.T.reshape(width, heads, -1)
            arrays[f"{attention}{name}/bias"] = bias.reshape(heads, -1)
        arrays[f"{attention}out/kernel"] = state[f"{block}attn.proj.weight"].T.reshape(heads, -1, width)
        arrays[f"{attention}out/bias"] = state[f"{block}attn.proj.bias"]
        for layer, name in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            arrays[f"{theirs}MlpBlock_3/{name}/kernel"] = state[f"{block}mlp.{layer}.weight"].T
            arrays[f"{theirs}MlpBlock_3/{name}/bias"] = state[f"{block}mlp.{layer}.bias"]
    return {prefix + name: np.ascontiguousarray(value) for name, value in arrays.items()}


def write(path, state):
    """Writes tensors in the format that the suffix names."""
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({name: t.contiguous().clone() for name, t in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def assert_same_backbone(host, expected):
    ours, theirs = host.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if not name.startswith("head"):
            torch.testing.assert_close(ours[name], value, atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_google_npz_fills_the_backbone(make_host, images_for, tmp_path, prefix):
    source, host = make_host(seed=1), make_host(seed=2)
    np.savez(tmp_path / "vit.npz", **google_arrays(source, prefix))
    head = host.head.weight.clone()
    load_weights(host, tmp_path / "vit.npz")
    assert_same_backbone(host, source)
    assert torch.equal(host.head.weight, head)
    images = images_for(host, 2)
    with torch.no_grad():
        torch.testing.assert_close(host.forward_features(images), source.forward_features(images))


def test_google_npz_gives_its_head_when_it_fits(make_host, tmp_path):
    host = make_host(seed=2)
    np.savez(tmp_path / "vit.npz", **google_arrays(make_host(seed=1), classes=5))
    load_weights(host, tmp_path / "vit.npz")
    assert (host.head.weight == 1).all()


def test_position_embedding_is_resized(make_host, tmp_path):
    source = make_host(seed=1)
    with torch.no_grad():
        source.pos_embed[:, 1:] = 0.25
    np.savez(tmp_path / "vit.npz", **google_arrays(source))
    write(tmp_path / "vit.safetensors", source.state_dict())
    for name in ("vit.npz", "vit.safetensors"):
        host = make_host(seed=2, img_size=48)
        load_weights(host, tmp_path / name)
        assert host.pos_embed.shape == (1, 37, 32)
        torch.testing.assert_close(host.pos_embed[:, :1], source.pos_embed[:, :1])
        torch.testing.assert_close(host.pos_embed[:, 1:], torch.full((1, 36, 32), 0.25))


@pytest.mark.parametrize(
    "suffix,nested", [(".safetensors", None), (".pth", None), (".pth", "state_dict"), (".pth", "model")]
)
def test_timm_and_jx_files_fill_the_backbone(make_host, tmp_path, suffix, nested):
    source, host = make_host(seed=1), make_host(seed=2)
    state = source.state_dict()
    state |= {"head.weight": torch.zeros(21843, 32), "head.bias": torch.zeros(21843)}
    state |= {"pre_logits.fc.weight": torch.ones(32, 32), "pre_logits.fc.bias": torch.ones(32)}
    head = host.head.weight.clone()
    load_weights(host, write(tmp_path / f"jx{suffix}", {nested: state} if nested else state))
    assert_same_backbone(host, source)
    assert torch.equal(host.head.weight, head)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_head_is_taken_when_it_fits(make_host, tmp_path, suffix):
    source, host = make_host(seed=1), make_host(seed=2)
    load_weights(host, write(tmp_path / f"vit{suffix}", source.state_dict()))
    assert torch.equal(host.head.weight, source.head.weight)


@pytest.mark.parametrize("name", ["registers", "clip", "siglip", "average", "swiglu", "qk_norm"])
def test_every_kind_of_host_is_filled(make_host, tmp_path, name):
    source, host = make_host(name, seed=1), make_host(name, seed=2)
    load_weights(host, write(tmp_path / "vit.safetensors", source.state_dict()))
    assert_same_backbone(host, source)


@pytest.mark.parametrize("changes", [{"embed_dim": 64}, {"depth": 4}, {"depth": 2}, {"mlp_ratio": 2.0}])
@pytest.mark.parametrize("suffix", [".npz", ".pth", ".safetensors"])
def test_weights_of_another_size_are_refused(make_host, tmp_path, suffix, changes):
    source, path = make_host(seed=1), tmp_path / f"vit{suffix}"
    if suffix == ".npz":
        np.savez(path, **google_arrays(source))
    else:
        write(path, source.state_dict())
    with pytest.raises(BackboneError, match=r"fit.* the model \(width") as error:
        load_weights(make_host(**changes), path)
    assert str(path) in str(error.value)


def test_missing_and_foreign_tensors_are_named(make_host, tmp_path):
    state = make_host().state_dict()
    del state["blocks.1.mlp.fc1.weight"]
    with pytest.raises(BackboneError, match=r"blocks\.1\.mlp\.fc1\.weight"):
        load_weights(make_host(), write(tmp_path / "a.safetensors", state))
    state = make_host().state_dict() | {"blocks.0.extra": torch.ones(1)}
    with pytest.raises(BackboneError, match=r"not used: blocks\.0\.extra"):
        load_weights(make_host(), write(tmp_path / "b.safetensors", state))
    arrays = google_arrays(make_host())
    del arrays["Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel"]
    np.savez(tmp_path / "c.npz", **arrays)
    with pytest.raises(BackboneError, match="Dense_0"):
        load_weights(make_host(), tmp_path / "c.npz")


def test_refused_weights_leave_the_model_as_it_was(make_host, tmp_path):
    host = make_host(seed=2)
    state = make_host(seed=1).state_dict()
    del state["norm.bias"]
    with pytest.raises(BackboneError):
        load_weights(host, write(tmp_path / "vit.safetensors", state))
    assert_same_backbone(host, make_host(seed=2))


@pytest.mark.parametrize("suffix", [".npz", ".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 cut off"])
def test_unreadable_files_are_refused(make_host, tmp_path, suffix, content):
    path = tmp_path / f"vit{suffix}"
    path.write_bytes(content)
    with pytest.raises(BackboneError, match=f"vit{suffix}"):
        load_weights(make_host(), path)


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": 5}, torch.ones(3), {"a": {"b": torch.ones(1)}}], ids=repr)
def test_files_that_hold_no_named_tensors_are_refused(make_host, tmp_path, content):
    torch.save(content, tmp_path / "vit.pth")
    with pytest.raises(BackboneError, match=r"vit\.pth"):
        load_weights(make_host(), tmp_path / "vit.pth")


def test_missing_file_is_named(make_host, tmp_path):
    with pytest.raises(BackboneError, match=r"no weight file at .*gone\.pth"):
        load_weights(make_host(), tmp_path / "gone.pth")
    with pytest.raises(BackboneError, match="no weight file"):
        load_weights(make_host(), tmp_path)


@pytest.mark.parametrize("suffix", [".npz", ".pth", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("writer", ["pickle", "torch", "numpy", "among tensors"])
def test_code_in_a_weight_file_is_never_executed(make_host, tmp_path, suffix, writer):
    mark, path = tmp_path / "executed", tmp_path / f"vit{suffix}"
    if writer == "pickle":
        path.write_bytes(pickle.dumps(Bomb(mark)))
    elif writer == "numpy":
        arrays = google_arrays(make_host()) | {"embedding/kernel": np.array([Bomb(mark)], dtype=object)}
        with path.open("wb") as file:
            np.savez(file, **arrays)
    else:
        torch.save(Bomb(mark) if writer == "torch" else make_host().state_dict() | {"bomb": Bomb(mark)}, path)
    try:
        with pytest.raises(BackboneError):
            load_weights(make_host(), path)
    finally:
        assert not mark.exists()


def test_unknown_names_are_told_near_ones():
    with pytest.raises(BackboneError) as error:
        create_backbone("vit_base_patch16_225", pretrained=False)
    assert "vit_base_patch16_224" in str(error.value).partition("Did you mean")[2].partition("?")[0]
    with pytest.raises(BackboneError, match=r"no weights 'augreg_in21' of vit_tiny.*\. Did you mean '.*in21k'"):
        create_backbone("vit_tiny_patch16_224.augreg_in21", pretrained=False)
    with pytest.raises(BackboneError, match=r"timm has no model 'nothing_like_it\.tag'"):
        create_backbone("nothing_like_it.tag", pretrained=False)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("vit_base", "vit_base_patch16_224"),
        ("vit_small_patch16", "vit_small_patch16_224"),
        ("deit3", "deit3_base_patch16_224"),
        ("swin_tiny", "swin_tiny_patch4_window7_224"),
        ("dinov2", "vit_base_patch14_dinov2"),
        ("vit_bas_patch16_224", "vit_base_patch16_224"),
        ("vit_mini", "vit_mini_patch4_32"),
    ],
)
def test_of_incomplete_names_those_that_begin_so_come_first(given, meant):
    near = nearest(given)
    assert near[0] == meant
    assert all(given in name for name in near) or given == "vit_bas_patch16_224"


def test_every_model_that_is_taken_may_be_suggested():
    rows = (Path(__file__).parents[2] / "docs" / "timm_models.csv").read_text().splitlines()
    taken = {row.removesuffix(",yes") for row in rows if row.endswith(",yes")}
    assert len(taken) > 300 and taken & set(timm.list_models()) <= set(timm.list_models(module=FILES))


def test_options_that_timm_does_not_know_are_refused():
    with pytest.raises(BackboneError, match="vit_tiny_patch16_224"):
        create_backbone("vit_tiny_patch16_224", pretrained=False, img_sise=32)


def test_source_gives_the_backbone_back(tmp_path):
    host = create_backbone(
        "vit_tiny_patch16_224.augreg_in21k", pretrained=False, img_size=[32, 48], num_classes=3, global_pool="avg"
    )
    source = wrap(host).origin()
    assert source.name == "vit_tiny_patch16_224.augreg_in21k"
    again = rebuild(BackboneSource(**source.to_dict()), pretrained=False)
    assert {name: t.shape for name, t in again.state_dict().items()} == {
        name: t.shape for name, t in host.state_dict().items()
    }
    assert again.global_pool == "avg"
    assert again.patch_embed.img_size == (32, 48)
    file = write(tmp_path / "vit.safetensors", host.state_dict())
    assert_same_backbone(rebuild(source.with_weights(file)), host)
    assert wrap(VisionTransformer(depth=1, embed_dim=16, num_heads=2)).origin().name is None


def test_fingerprint_tells_weights_apart(make_host):
    first, same, other = (fingerprint(make_host(seed=seed).named_parameters()) for seed in (1, 1, 2))
    assert first == same != other
    values = torch.arange(6.0)
    assert (
        len({fingerprint(pairs) for pairs in ([("a", values)], [("b", values)], [("a", values.view(2, 3))], [])}) == 4
    )
    assert fingerprint([("a", values), ("b", values + 1)]) == fingerprint([("b", values + 1), ("a", values)])


def tiny(**options):
    return VisionTransformer(
        **({"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2} | options)
    )


def with_gated_attention(host):
    host.blocks[1].attn = Attention(16, num_heads=2, qkv_bias=True, gated=True)
    return host


class FlexiblePatches(VisionTransformer):
    """A ViT with a forward pass of its own."""

    def forward_features(self, x):
        return super().forward_features(x)


UNSUPPORTED = {
    "Cait": lambda: Cait(img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2),
    "ResNet": lambda: ResNet(BasicBlock, (1, 1, 1, 1), base_width=64),
    "ParallelScalingBlock": lambda: tiny(block_fn=ParallelScalingBlock),
    "DiffParallelScalingBlock": lambda: tiny(block_fn=DiffParallelScalingBlock),
    "gated": lambda: with_gated_attention(tiny()),
    "patch_drop_rate": lambda: tiny(patch_drop_rate=0.5),
    "FlexiblePatches": lambda: FlexiblePatches(embed_dim=16, depth=1, num_heads=2),
    "Linear": lambda: torch.nn.Linear(3, 3),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_hosts_are_refused_by_name(name):
    if name == "gated" and "gated" not in inspect.signature(Attention).parameters:
        pytest.skip("this timm has no gated attention")
    host = UNSUPPORTED[name]()
    before = {key: p.requires_grad for key, p in host.named_parameters()}
    with pytest.raises(BackboneError) as error:
        dyntune.tune(host, "dyt")
    assert name in str(error.value)
    assert type(host).__name__ in str(error.value)
    assert re.search("Supported: .*timm's VisionTransformer", str(error.value))
    assert {key: p.requires_grad for key, p in host.named_parameters()} == before


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_what_is_no_vit_is_refused_before_its_weights_are_fetched(monkeypatch, name):
    build, fetched = timm.create_model, []

    def create_model(name, pretrained=False, **arguments):
        fetched.extend([name] * pretrained)
        return build(name, pretrained=False, **arguments)

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(BackboneError, match=f"{name}: .* is not supported"):
        create_backbone(name)
    with pytest.raises(BackboneError, match=r"docs/hosts\.md lists all") as error:
        create_backbone(name)
    assert len(str(error.value)) < 320
    assert not fetched
    create_backbone("vit_two_blocks", num_classes=3)
    assert fetched == ["vit_two_blocks"]


def test_weights_are_not_read_into_unsupported_models(tmp_path):
    (tmp_path / "vit.pth").write_bytes(b"")
    with pytest.raises(BackboneError, match="given ResNet"):
        load_weights(UNSUPPORTED["ResNet"](), tmp_path / "vit.pth")


@pytest.mark.parametrize("shape", [(1, 3, 32, 48), (1, 3, 16, 16), (1, 4, 32, 32), (3, 32, 32), (1, 32, 32, 3)])
def test_images_of_another_shape_are_told_what_was_expected(make_host, shape):
    model = dyntune.tune(make_host(), "linear")
    with pytest.raises(BackboneError, match=r"32 x 32|\(B, 3, 32, 32\)") as error:
        model(torch.zeros(shape))
    assert all(str(size) in str(error.value) for size in shape[-2:])


@torch.no_grad()
@pytest.mark.parametrize("place", ["local-dir", "hf-hub"])
def test_models_of_a_hub_are_built_again_by_name(tmp_path, monkeypatch, place):
    """The hub is a folder here: what is asked of it is read from there."""
    folder = tmp_path / "somebody" / "little-vit"
    folder.mkdir(parents=True)
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}
    host = timm.create_model("vit_tiny_patch16_224", **arguments)
    safetensors.torch.save_file(host.state_dict(), folder / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": arguments}
    pretrained = {"input_size": [3, 32, 32], "num_classes": 5, "classifier": "head", "first_conv": "patch_embed.proj"}
    (folder / "config.json").write_text(json.dumps(config | {"pretrained_cfg": pretrained}))

    def fetched(repo_id, filename, **about):
        return str(tmp_path / repo_id / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", fetched)
    name = f"local-dir:{folder}" if place == "local-dir" else "hf-hub:somebody/little-vit"
    model = dyntune.tune(create_backbone(name), "dyt").eval()
    assert model.origin.name == name
    assert torch.equal(model.backbone.host.cls_token, host.cls_token)
    images = torch.randn(2, 3, 32, 32)
    loaded = dyntune.load(model.save(tmp_path / "run"))
    assert torch.equal(loaded(images), model(images))
    card = (tmp_path / "run" / "README.md").read_text()
    assert ("base_model: somebody/little-vit" in card) == (place == "hf-hub")
    (folder / "config.json").unlink()
    assert wrap(model.backbone.host).origin().name is None


def _under(start, state):
    return {start + name: tensor for name, tensor in state.items()}


def _zeros(state):
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def _headless(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("head")}


DECODER = {"mask_token": torch.zeros(1, 1, 32), "decoder_blocks.0.norm1.weight": torch.zeros(8)}
WHOLE = {
    "DINO, all of it": lambda s: {
        "student": _under("module.backbone.", _zeros(s)),
        "teacher": _under("backbone.", _headless(s)) | {"head.mlp.0.weight": torch.zeros(3, 3)},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
        "args": argparse.Namespace(lr=0.1),
    },
    "DINO, flat": lambda s: (
        _under("teacher.backbone.", _headless(s)) | _under("student.backbone.", _zeros(_headless(s)))
    ),
    "MAE with its decoder": lambda s: {"model": _headless(s) | DECODER, "epoch": 800},
    "Lightning": lambda s: {
        "state_dict": _under("model.encoder.", s) | {"criterion.weight": torch.zeros(3)},
        "hyper_parameters": {"lr": 0.1},
    },
    "MoCo v3": lambda s: {
        "state_dict": _under("module.base_encoder.", s) | _under("module.momentum_encoder.", _zeros(s)),
    },
    "averaged weights": lambda s: {"model": _zeros(s), "model_ema": s},
    "compiled": lambda s: {"model": _under("_orig_mod.", s)},
    "I-JEPA": lambda s: {"encoder": _under("module.", _zeros(s)), "target_encoder": _under("module.", s)},
    "FSDP, block by block": lambda s: {
        "model": {
            re.sub(r"^(blocks\.\d+\.)", r"\1_fsdp_wrapped_module._checkpoint_wrapped_module.", name): tensor
            for name, tensor in s.items()
        },
        "best": np.float64(0.8),
        "step": np.int64(9),
    },
}


@pytest.mark.parametrize("name", WHOLE)
def test_checkpoints_are_read_as_they_come(make_host, tmp_path, caplog, name):
    source, host = make_host(seed=1), make_host(seed=2)
    torch.save(WHOLE[name](source.state_dict()), tmp_path / "vit.pth")
    load_weights(host, tmp_path / "vit.pth")
    assert_same_backbone(host, source)
    assert "tensors of the backbone" in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize(
    "extra",
    [
        {"blocks.3.norm1.weight": torch.ones(32)},
        {"blocks.0.ls1.gamma": torch.ones(32)},
        {"reg_token": torch.ones(1, 4, 32)},
        {"dist_token": torch.ones(1, 1, 32)},
        {"fc_norm.weight": torch.ones(32)},
    ],
)
@pytest.mark.parametrize("start", ["", "backbone."])
def test_tensors_of_another_kind_of_vit_are_no_leftovers(make_host, tmp_path, start, extra):
    write(tmp_path / "vit.pth", _under(start, make_host(seed=1).state_dict() | extra))
    with pytest.raises(BackboneError, match=f"not used: {re.escape(next(iter(extra)))}"):
        load_weights(make_host(), tmp_path / "vit.pth")


def test_whole_modules_are_refused_with_the_line_that_converts_them(make_host, tmp_path, monkeypatch):
    source = make_host(seed=1)
    torch.save(source, tmp_path / "vit.pth")
    with pytest.raises(BackboneError, match="a whole model") as error:
        load_weights(make_host(), tmp_path / "vit.pth")
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"torch\.save\(.*?'weights\.pth'\)", str(error.value))[0])  # what the message says to run
    host = make_host()
    load_weights(host, tmp_path / "weights.pth")
    assert_same_backbone(host, source)


def test_what_timm_resizes_is_said(make_host, tmp_path, caplog):
    write(tmp_path / "same.pth", make_host(seed=1).state_dict())
    load_weights(make_host(seed=2), tmp_path / "same.pth")
    assert caplog.text == ""
    write(tmp_path / "finer.pth", make_host(seed=1, patch_size=4).state_dict())
    load_weights(make_host(seed=2), tmp_path / "finer.pth")
    assert re.search(r"resized to fit .*: patch_embed\.proj\.weight, pos_embed\.", caplog.text)


@pytest.mark.parametrize("kind", [lambda tensor: tensor.to_sparse(), lambda tensor: tensor.to("meta")])
def test_tensors_without_plain_content_are_missing(make_host, tmp_path, kind):
    state = make_host().state_dict()
    state["blocks.0.mlp.fc1.weight"] = kind(state["blocks.0.mlp.fc1.weight"])
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(BackboneError, match=r"Missing or of another shape: blocks\.0\.mlp\.fc1\.weight"):
        load_weights(make_host(), tmp_path / "vit.pth")


def test_weights_that_are_not_finite_are_refused(make_host, tmp_path):
    state = make_host().state_dict()
    state["norm.weight"][2] = torch.inf
    with pytest.raises(BackboneError, match=r"not finite in norm\.weight"):
        load_weights(make_host(), write(tmp_path / "vit.safetensors", state))


@pytest.mark.parametrize("safe", [True, False])
def test_the_built_in_backbone_saved_by_timm_is_read(tmp_path, safe):
    source = timm.create_model("vit_mini_patch4_32.dyntune", pretrained=True, num_classes=4)
    timm.models.save_for_hf(source, tmp_path, safe_serialization=safe)
    for host in (
        create_backbone("vit_mini_patch4_32.dyntune", weights=tmp_path, num_classes=4),
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True),
    ):
        assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in host.state_dict().items())
