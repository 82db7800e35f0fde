"""The training images of a task, kept in memory: a thousand images are read a hundred times."""

from __future__ import annotations

from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from dyntune.data.base import LabelledImages
from dyntune.data.transforms import Preprocessing


class ResizedImages(LabelledImages):
    """The images of another data set, resized once to what a backbone takes and then kept.

    The resize is that of ``build_transform``, which then finds nothing left to do, so tensors are the same bits as
    without. An image takes 3 bytes per pixel: 1,000 images of 224 x 224 take 150 MB.

    Args:
        images: without a transform.
        preprocessing: of the backbone; size and interpolation count.
    """

    def __init__(self, images: LabelledImages, preprocessing: Preprocessing) -> None:
        super().__init__(images.targets, skipped=images.skipped)
        self.images, self.preprocessing = images, preprocessing
        self.classes = images.classes
        self.reads_files = images.reads_files
        self._kept: dict[int, Image.Image] = {}

    def read(self, index: int) -> Image.Image:
        if index not in self._kept:
            how = InterpolationMode(self.preprocessing.interpolation)
            self._kept[index] = resize(self.images.read(index), list(self.preprocessing.size), how)
        return self._kept[index]

    def source(self, index: int) -> str:
        return self.images.source(index)
