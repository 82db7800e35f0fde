"""A data set of image files with labels."""

import os
from collections.abc import Sequence

from PIL import Image

from dyntune.core.errors import DataError
from dyntune.data.base import LabelledImages
from dyntune.data.images import read_image


class FileImages(LabelledImages):
    """Image files, decoded when they are read.

    Args:
        paths: one image file for each label.
        targets: zero-based labels.
        origins: for each image the list-file line that names it, for errors; ``None`` where there is no list.
    """

    reads_files = True

    def __init__(
        self, paths: Sequence[str | os.PathLike[str]], targets: Sequence[int], origins: Sequence[str] | None = None
    ) -> None:
        super().__init__(targets)
        if len(paths) != len(self.targets) or (origins is not None and len(origins) != len(paths)):
            raise DataError(
                f"{len(paths)} image paths do not go with {len(self.targets)} labels: expected one for one."
            )
        self.paths = tuple(os.fspath(path) for path in paths)
        self.origins = None if origins is None else tuple(origins)

    def read(self, index: int) -> Image.Image:
        return read_image(self.paths[index], self.source(index))

    def source(self, index: int) -> str:
        return self.paths[index] if self.origins is None else f"{self.paths[index]} ({self.origins[index]})"
