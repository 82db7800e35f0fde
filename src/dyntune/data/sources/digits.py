"""Real handwritten digits that come with scikit-learn: a data set that needs no download."""

import numpy as np

from dyntune.data.base import DataSplits, ImageSubset
from dyntune.data.datasets import ArrayImages
from dyntune.data.sources.base import Request, Source
from dyntune.data.splits import stratified_take

VAL, TEST = 200, 597


class Digits(Source):
    """The 1,797 digits of 8x8 pixels in a fixed stratified split: 1,000 to train on, 200 to choose by, 597 to test on.

    The split is the same for every seed, so that runs with different seeds are comparable. Grey levels 0..16 become
    0..255. Enlarging the images is left to the transform.

    Source: the test set of the UCI "Optical Recognition of Handwritten Digits", as ``sklearn.datasets.load_digits``.
    """

    names = ("digits",)

    def load(self, request: Request) -> DataSplits:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
        data = ArrayImages(pixels, bunch.target.tolist(), request.name)
        test, rest = stratified_take(data.targets, TEST, key="digits/test")
        val_of_rest, train_of_rest = stratified_take([data.targets[i] for i in rest], VAL, key="digits/val")
        return request.splits(
            ImageSubset(data, [rest[i] for i in train_of_rest]),
            ImageSubset(data, [rest[i] for i in val_of_rest]),
            ImageSubset(data, test),
            [str(digit) for digit in range(10)],
        )
