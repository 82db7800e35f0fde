"""Real handwritten digits that come with scikit-learn: a data set that needs no download."""

import numpy as np
from PIL import Image

from dyntune.data.base import DataSplits, ImageSubset, LabelledImages
from dyntune.data.splits import stratified_take

TRAIN, VAL, TEST = 1000, 200, 597


class ArrayImages(LabelledImages):
    """Grey images held in memory.

    Args:
        pixels: (N, H, W) uint8.
        targets: N zero-based labels.
        name: what to call the data set in messages.
    """

    def __init__(self, pixels: np.ndarray, targets: list[int], name: str) -> None:
        super().__init__(targets)
        self.pixels = pixels
        self.name = name

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index]).convert("RGB")

    def source(self, index: int) -> str:
        return f"{self.name} image {index}"


def load_digits() -> DataSplits:
    """The 1,797 digits of 8x8 pixels in a fixed stratified split: 1,000 to train on, 200 to choose by, 597 to test on.

    The split is the same for every seed, so that runs with different seeds are comparable. Grey levels 0..16 become
    0..255. Enlarging the images is left to the transform.

    Source: the test set of the UCI "Optical Recognition of Handwritten Digits", as ``sklearn.datasets.load_digits``.
    """
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    data = ArrayImages(pixels, bunch.target.tolist(), "digits")
    test, rest = stratified_take(data.targets, TEST, key="digits/test")
    val_of_rest, train_of_rest = stratified_take([data.targets[i] for i in rest], VAL, key="digits/val")
    return DataSplits(
        name="digits",
        train=ImageSubset(data, [rest[i] for i in train_of_rest]),
        val=ImageSubset(data, [rest[i] for i in val_of_rest]),
        test=ImageSubset(data, test),
        classes=tuple(str(digit) for digit in range(10)),
    )
