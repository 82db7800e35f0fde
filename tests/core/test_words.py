"""Numbers as people read them."""

import pytest

from dyntune.core.words import counted, duration


@pytest.mark.parametrize(
    ("count", "noun", "said"),
    [
        (1, "image", "1 image"),
        (0, "image", "0 images"),
        (1200, "test image", "1,200 test images"),
        (1, "class", "1 class"),
        (2, "class", "2 classes"),
        (2, "process", "2 processes"),
        (3, "batch size", "3 batch sizes"),
        (2, "patch", "2 patches"),
        (2, "epoch", "2 epochs"),
    ],
)
def test_one_is_not_called_several(count, noun, said):
    assert counted(count, noun) == said


@pytest.mark.parametrize(("seconds", "said"), [(0.1, "1 s"), (99, "99 s"), (600, "10 min"), (7200, "2.0 h")])
def test_times_have_the_unit_that_people_use(seconds, said):
    assert duration(seconds) == said
