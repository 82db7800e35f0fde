"""Striped images, as a data source of another distribution."""

import numpy as np

from dyntune.data.base import DataSplits
from dyntune.data.datasets import ArrayImages
from dyntune.data.sources.base import Request, Source


class Stripes(Source):
    """Noisy 32x32 images with red or blue stripes: 24 to train on and to choose by, 8 to test on."""

    names = ("stripes",)

    def load(self, request: Request) -> DataSplits:
        train, test = draw(24, 2 * request.seed), draw(8, 2 * request.seed + 1)
        return request.splits(train, test=test, classes=("red", "blue"))


def draw(count: int, seed: int) -> ArrayImages:
    labels = [index % 2 for index in range(count)]
    pixels = np.random.default_rng(seed).integers(0, 100, (count, 32, 32, 3), np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[:, np.arange(32) // 4 % 2 == 0, 2 * label] += 150
    return ArrayImages(pixels, labels, "stripes")
