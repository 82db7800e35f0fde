"""Preprocessing: the numbers of a backbone, the direct resize and timm's augmentation."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from dyntune.core.errors import DataError
from dyntune.data import Preprocessing, build_transform

PLAIN = Preprocessing((12, 20), (0.5, 0.4, 0.3), (0.2, 0.25, 0.5), "bicubic")


def noise(width, height):
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "lanczos"])
def test_the_plain_transform_resizes_straight_to_the_size_and_normalises(interpolation):
    image = noise(31, 17)
    transform = build_transform(Preprocessing(PLAIN.size, PLAIN.mean, PLAIN.std, interpolation))
    resized = np.asarray(image.resize((20, 12), getattr(Image.Resampling, interpolation.upper())), np.float64) / 255
    expected = ((resized - PLAIN.mean) / PLAIN.std).transpose(2, 0, 1)
    tensor = transform(image)
    assert tensor.shape == (3, 12, 20) and tensor.dtype == torch.float32
    assert np.abs(tensor.numpy() - expected).max() < 1e-5


def test_timm_augmentation_is_random_for_training_images_only():
    image = noise(40, 40)
    torch.manual_seed(0)
    train = build_transform(PLAIN, train=True, augment="timm")
    views = [train(image) for _ in range(3)]
    assert all(view.shape == (3, 12, 20) for view in views)
    assert not torch.equal(views[0], views[1]) and not torch.equal(views[1], views[2])
    for plain in (build_transform(PLAIN, augment="timm"), build_transform(PLAIN, train=True)):
        assert torch.equal(plain(image), build_transform(PLAIN)(image))
    with pytest.raises(DataError, match="unknown augmentation 'tim'"):
        build_transform(PLAIN, augment="tim")


def test_augmented_images_are_normalised_like_plain_ones():
    white = Image.new("RGB", (30, 30), "white")
    bright = build_transform(PLAIN, train=True, augment="timm")(white).amax((1, 2))
    # Colour jitter can only darken white; the flat colour survives crop and flip.
    assert (bright <= build_transform(PLAIN)(white).amax((1, 2)) + 1e-5).all()


def test_a_backbones_numbers_are_its_own_at_the_size_it_was_built_for():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=(32, 64), depth=1)
    found = Preprocessing.from_timm(vit)
    assert found == Preprocessing((32, 64), (0.5,) * 3, (0.5,) * 3, "bicubic")
    clip = timm.create_model("vit_base_patch32_clip_224.openai", depth=1)
    expected = clip.pretrained_cfg
    found = Preprocessing.from_timm(clip)
    assert found.size == (224, 224) and found.mean == tuple(expected["mean"]) != (0.5,) * 3
    assert found.std == tuple(expected["std"]) and found.interpolation == expected["interpolation"]


def test_preprocessing_goes_through_json_unchanged():
    assert Preprocessing.from_dict(json.loads(json.dumps(PLAIN.to_dict()))) == PLAIN


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": [224]}, "cannot be read"),
        ({"size": [0, 224]}, "at least 1 pixel"),
        ({"mean": [0.5]}, "three finite numbers"),
        ({"std": [0.5, 0.5, 0.0]}, "above 0"),
        ({"std": [0.5, 0.5, 1e-320]}, "above 0"),  # dividing by it is not finite
        ({"interpolation": "bicubc"}, "Did you mean 'bicubic'"),
        ({"crop": 1}, "expected the entries .'interpolation', 'mean', 'size', 'std'"),
    ],
)
def test_bad_preprocessing_is_explained(change, words):
    with pytest.raises(DataError, match=words):
        Preprocessing.from_dict(PLAIN.to_dict() | change)
