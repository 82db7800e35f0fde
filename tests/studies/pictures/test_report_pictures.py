"""The pictures of a comparison: those that show what each method's policy does."""

import pytest
import torch

from dyntune.backbones.builtin import BUILTIN_BACKBONE
from dyntune.data import load_data
from dyntune.model.tune import build_tuned
from dyntune.studies.report import token_pictures


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.fixture(scope="module")
def test_images(photos):
    return load_data(str(photos)).test


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("linear", []),
        ("linear+tome:r=0", []),
        ("dyt", ["tokens-dyt.png"]),
        ("linear+tome:r=4", ["reductions-linear-tome-r-4.png"]),
        ("dispatch+tome:r=4", ["tokens-dispatch-tome-r-4.png", "reductions-dispatch-tome-r-4.png"]),
    ],
)
def test_pictures_follow_from_the_policies(test_images, spec, expected):
    torch.manual_seed(0)
    model = build_tuned(BUILTIN_BACKBONE, spec, classes=("a", "b", "c"))
    found = token_pictures(spec, model, test_images)
    assert list(found) == expected
    for name, (figure, caption) in found.items():
        assert spec in caption
        if name.startswith("reductions"):
            assert texts(figure).count("60 tokens") == texts(figure).count("16 tokens") == 2
