"""Labelled images from image files, from memory, and from several data sets; and the folder where data sets lie."""

import hashlib
import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from PIL import Image

from dyntune.core.errors import DataError
from dyntune.data.base import LabelledImages
from dyntune.data.images import read_image

SKIP = "Or load the data set with on_corrupt='skip' (--on-corrupt skip), which leaves such images out."
_PIECE = 256 * 1024


def data_root(root: Path | None = None) -> Path:
    """The folder for data sets that are downloaded: ``root``, else ``$DYNTUNE_DATA``, else a cache folder."""
    return Path(root or os.environ.get("DYNTUNE_DATA") or "~/.cache/dyntune/data").expanduser()


class FileImages(LabelledImages):
    """Image files, decoded when they are read.

    Args:
        paths: one image file for each label.
        targets: zero-based labels.
        origins: for each image the list-file line that names it, for errors; ``None`` where there is no list.
        root: the folder below which images are known by their paths; ``None`` where they are known by their order.
    """

    reads_files = True

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        targets: Sequence[int],
        origins: Sequence[str] | None = None,
        root: Path | None = None,
    ) -> None:
        super().__init__(targets)
        if len(paths) != len(self.targets) or (origins is not None and len(origins) != len(paths)):
            raise DataError(
                f"{len(paths)} {self.noun} paths do not go with {len(self.targets)} labels: expected one for one."
            )
        self.paths = tuple(os.fspath(path) for path in paths)
        self.origins = None if origins is None else tuple(origins)
        self.root = root

    def read(self, index: int) -> Image.Image:
        try:
            return read_image(self.paths[index], self.source(index))
        except DataError as error:
            raise DataError(f"{error} {SKIP}") from error

    def source(self, index: int) -> str:
        return self.paths[index] if self.origins is None else f"{self.paths[index]} ({self.origins[index]})"

    def place(self, index: int) -> str | None:
        if self.root is None:
            return None
        path, start = self.paths[index], os.path.join(self.root, "")
        # A list may name files that do not lie below it.
        below = path[len(start) :] if path.startswith(start) else os.path.relpath(path, self.root)
        return Path(below).as_posix()

    def identity(self, index: int) -> str:
        try:
            return content_digest(self.paths[index])
        except OSError:  # such a file is an error, or left out, where it is read
            return super().identity(index)


def content_digest(path: str | os.PathLike[str], offset: int = 0, size: int | None = None) -> str:
    """Digest of a file's size and content; of a large one, of its beginning, middle and end.

    Args:
        path: of the file.
        offset: where in bytes it begins, if it lies inside a larger one.
        size: its bytes; by default all of the file.
    """
    size = os.path.getsize(path) if size is None else size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with open(path, "rb") as file:
        for start in (0,) if size <= 3 * _PIECE else (0, (size - _PIECE) // 2, size - _PIECE):
            file.seek(offset + start)
            digest.update(file.read(size if size <= 3 * _PIECE else _PIECE))
    return digest.hexdigest()


class ArrayImages(LabelledImages):
    """Images held in memory as arrays.

    Args:
        pixels: (N, H, W) for grey or (N, H, W, 3) for RGB images, uint8.
        targets: N zero-based labels.
        name: what to call the data set in messages.
    """

    def __init__(self, pixels: np.ndarray, targets: Sequence[int], name: str) -> None:
        super().__init__(targets)
        self.pixels, self.name = pixels, name

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index]).convert("RGB")

    def source(self, index: int) -> str:
        return f"{self.name} image {index}"


class EncodedImages(LabelledImages):
    """Images held in memory as the bytes of image files.

    Args:
        files: one image file for each label.
        targets: zero-based labels.
        name: what to call the data set in messages.
        skipped: where the images came from that were left out.
    """

    def __init__(self, files: Sequence[bytes], targets: Sequence[int], name: str, skipped: Sequence[str]) -> None:
        super().__init__(targets, skipped=skipped)
        self.files, self.name = tuple(files), name

    def read(self, index: int) -> Image.Image:
        return read_image(self.files[index], self.source(index))

    def place(self, index: int) -> str:
        return self.identity(index)  # a stream tells no path, and its positions change with what is added

    def identity(self, index: int) -> str:
        return hashlib.blake2b(self.files[index], digest_size=8).hexdigest()

    def source(self, index: int) -> str:
        return f"{self.name} image {index}"


class JoinedImages(LabelledImages):
    """The images of several data sets with the same classes, in order; without the transforms that those may have."""

    def __init__(self, parts: Sequence[LabelledImages]) -> None:
        super().__init__(
            [target for part in parts for target in part.targets],
            skipped=[source for part in parts for source in part.skipped],
        )
        self.parts = tuple(parts)
        self.starts = (0, *accumulate(len(part) for part in parts))
        self.reads_files = any(part.reads_files for part in parts)
        self.videos = any(part.videos for part in parts)
        self.classes = parts[0].classes

    def read(self, index: int) -> Image.Image:
        part, position = self._part(index)
        return part.read(position)

    def source(self, index: int) -> str:
        part, position = self._part(index)
        return part.source(position)

    def place(self, index: int) -> str | None:
        part, position = self._part(index)
        return part.place(position)

    def identity(self, index: int) -> str:
        part, position = self._part(index)
        return part.identity(position)

    def _part(self, index: int) -> tuple[LabelledImages, int]:
        number = max(number for number, start in enumerate(self.starts[:-1]) if start <= index % len(self))
        return self.parts[number], index % len(self) - self.starts[number]
