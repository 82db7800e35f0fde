"""The built-in backbone: found by timm, every tensor loaded, and clearly better than an untrained network."""

import logging
import warnings

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.models.vision_transformer import Block, VisionTransformer
from torch.nn import functional as F

from dyntune.backbones.builtin import BUILTIN_BACKBONE, WEIGHT_FILE
from dyntune.core.errors import BackboneError
from dyntune.data.drawn.procedural import render_shape


def stored():
    return safetensors.torch.load_file(WEIGHT_FILE)


def test_the_weight_file_is_small_half_precision_and_has_no_head():
    assert WEIGHT_FILE.stat().st_size < 6_000_000
    tensors = stored()
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    assert not [name for name in tensors if name.startswith("head")]
    assert all(value.isfinite().all() for value in tensors.values())


@pytest.mark.parametrize("classes", [0, 10, 1000])
def test_every_tensor_is_loaded_whatever_the_head(classes, caplog):
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        model = timm.create_model(BUILTIN_BACKBONE, pretrained=True, num_classes=classes)
    assert not caplog.records
    tensors, state = stored(), model.state_dict()
    assert {name for name in state if not name.startswith("head.")} == set(tensors)
    for name, value in tensors.items():
        assert torch.equal(state[name], value.float()), name
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, classes or 96)


def test_it_is_a_plain_vit_of_the_promised_shape():
    model = timm.create_model(BUILTIN_BACKBONE, pretrained=True, num_classes=10)
    assert type(model) is VisionTransformer
    assert [type(block) for block in model.blocks] == [Block] * 12
    assert model.patch_embed.grid_size == (8, 8)
    assert (model.embed_dim, model.num_prefix_tokens, model.global_pool) == (96, 1, "token")
    assert (model.blocks[0].attn.num_heads, model.blocks[0].mlp.fc1.out_features) == (3, 384)
    assert model.blocks[0].attn.qkv.bias is not None
    assert model.norm.eps == 1e-6
    expected = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    assert (expected | {"crop_pct": 1.0}).items() <= timm.data.resolve_model_data_config(model).items()


def test_timm_lists_it_as_pretrained():
    assert timm.is_model_pretrained(BUILTIN_BACKBONE)


def test_a_file_with_a_tensor_missing_or_too_many_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    overlay = {"file": str(path)}
    tensors = stored()
    safetensors.torch.save_file({name: v for name, v in tensors.items() if name != "blocks.11.mlp.fc2.bias"}, path)
    with pytest.raises(BackboneError, match=r"missing \['blocks.11.mlp.fc2.bias'\]"):
        timm.create_model(BUILTIN_BACKBONE, pretrained=True, num_classes=10, pretrained_cfg_overlay=overlay)
    safetensors.torch.save_file(tensors | {"extra": torch.zeros(1)}, path)
    with pytest.raises(BackboneError, match=r"unexpected \['extra'\]"):
        timm.create_model(BUILTIN_BACKBONE, pretrained=True, num_classes=10, pretrained_cfg_overlay=overlay)


def test_weights_do_not_fit_a_variant_without_class_token():
    with pytest.raises(BackboneError, match="class token"):
        timm.create_model(BUILTIN_BACKBONE, pretrained=True, class_token=False, global_pool="avg")


def tokens(pretrained, images):
    """Tokens after the last norm, (n, 65, 96), of the built-in backbone or of one that timm has just initialised."""
    torch.manual_seed(0)
    model = timm.create_model(BUILTIN_BACKBONE, pretrained=pretrained, num_classes=0).eval()
    with torch.inference_mode():
        return model.forward_features(images).numpy()


def accuracy(features, labels, train):
    """Of a logistic regression on standardised features, fitted to the first ``train`` rows, on the others."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(features[:train], labels[:train])
    return model.score(features[train:], labels[train:])


def test_the_class_token_tells_digits_better_than_an_untrained_one():
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))[:700]
    images = torch.tensor(digits.images[order] / 16, dtype=torch.float32).unsqueeze(1)
    images = F.interpolate(images, 32, mode="bicubic").clamp(0, 1).mul(2).sub(1).expand(-1, 3, -1, -1)
    before, after = (accuracy(tokens(p, images)[:, 0], digits.target[order], 400) for p in (False, True))
    assert after > 0.88
    assert after > before + 0.15


@pytest.fixture(scope="module")
def shapes():
    """900 labelled shapes: class tokens of the untrained and of the pretrained backbone, places and directions."""
    drawn = [render_shape(2, index) for index in range(900)]
    images = torch.tensor(np.stack([row[0] for row in drawn])).permute(0, 3, 1, 2) / 127.5 - 1
    untrained, pretrained = (tokens(p, images)[:, 0] for p in (False, True))
    return untrained, pretrained, np.array([row[1:] for row in drawn])


@pytest.mark.parametrize(("column", "least"), [(0, 0.17), (1, 0.3)], ids=["place", "direction"])
def test_the_class_token_tells_shapes_better_than_an_untrained_one(shapes, column, least):
    before, after = (accuracy(features, shapes[2][:, column], 600) for features in shapes[:2])
    assert after > least  # chance is 1/16
    assert after > 2.5 * before
