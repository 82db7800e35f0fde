"""What every data set here is: labelled images that can be read by index, given a transform, cut and pickled."""

import copy
import hashlib
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from dyntune.core.errors import DataError
from dyntune.core.texts import listed, printable


class LabelledImages(Dataset[tuple[Any, int]], ABC):
    """A map-style data set of (RGB image, label) pairs.

    Without a transform an item is ``(PIL.Image.Image in mode "RGB", int)``; after :meth:`with_transform` its first
    half is whatever the transform gives, for the ones of :func:`dyntune.data.build_transform` a float tensor
    (3, H, W). Every such data set can be pickled, so loaders with forked or spawned workers can use it.

    Attributes:
        targets: the zero-based label of every image, in order.
        skipped: the sources of the images that were left out because they could not be read.
        classes: names of the classes in label order, where they are known.
        reads_files: whether reading an image can fail because of a bad file.
    """

    reads_files: bool = False
    videos: bool = False
    """Whether ``read`` gives videos instead of images."""

    def __init__(self, targets: Sequence[int], *, skipped: Sequence[str] = ()) -> None:
        found: list[int] = []
        for target in targets:
            try:
                found.append(operator.index(target))  # not int(), which would cut 2.7 to 2
            except TypeError as error:
                raise DataError(
                    f"the label of image {len(found)} is {target!r:.80}. Expected a single whole number from 0."
                ) from error
        self.targets: tuple[int, ...] = tuple(found)
        self.skipped: tuple[str, ...] = tuple(skipped)
        self.transform: Callable[[Image.Image], Any] | None = None
        self.classes: tuple[str, ...] | None = None

    @property
    def noun(self) -> str:
        """What one of them is called in messages."""
        return "video" if self.videos else "image"

    @abstractmethod
    def read(self, index: int) -> Image.Image:
        """The image at ``index`` as a PIL RGB image, before any transform.

        Raises:
            DataError: the image is missing or cannot be decoded; the message names it.
        """

    @abstractmethod
    def source(self, index: int) -> str:
        """Where the image at ``index`` comes from: a file, with its list-file line where there is one."""

    def place(self, index: int) -> str | None:
        """What keeps the image in its split: its path below the root of its data set, or else a digest of its content.

        None where there is neither.
        """
        return None

    def identity(self, index: int) -> str:
        """Knows the image again, wherever it lies later: of files a digest of their content, else of the source."""
        return hashlib.blake2b(self.source(index).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()

    def with_transform(self, transform: Callable[[Image.Image], Any] | None) -> Self:
        """The same data set, giving ``(transform(image), label)``; this one is left as it is."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def __len__(self) -> int:
        return len(self.targets)

    def __repr__(self) -> str:
        classes = f" of {len(self.classes)} classes: {listed(self.classes)}" if self.classes else ""
        skipped = f"; {len(self.skipped):,} left out that cannot be read" if self.skipped else ""
        return f"{type(self).__name__}({len(self):,} {self.noun}s{classes}{skipped})"

    def __getitem__(self, index: int) -> tuple[Any, int]:
        # The label is looked up first: beyond the end it raises the IndexError that ends a plain for loop.
        target = self.targets[index]
        image = self.read(index)
        return (image if self.transform is None else self.transform(image)), target


class ImageSubset(LabelledImages):
    """Some images of another data set, in a given order, without copying them.

    Raises:
        DataError: an index is none of the other data set, such as a mask's True.
    """

    def __init__(self, parent: LabelledImages, indices: Sequence[int], *, skipped: Sequence[str] = ()) -> None:
        self.indices = whole_indices(indices, len(parent), "this is an ImageSubset")
        super().__init__([parent.targets[i] for i in self.indices], skipped=(*parent.skipped, *skipped))
        self.parent = parent
        self.reads_files = parent.reads_files
        self.videos = parent.videos
        self.transform = parent.transform
        self.classes = parent.classes

    def read(self, index: int) -> Image.Image:
        return self.parent.read(self.indices[index])

    def source(self, index: int) -> str:
        return self.parent.source(self.indices[index])

    def place(self, index: int) -> str | None:
        return self.parent.place(self.indices[index])

    def identity(self, index: int) -> str:
        return self.parent.identity(self.indices[index])


def whole_indices(indices: Iterable[Any], count: int, what: str) -> tuple[int, ...]:
    """The indices of a part of a data set of ``count`` as integers.

    Args:
        indices: as they were given.
        count: items of the data set.
        what: the part, as an error begins.

    Raises:
        DataError: one is none of the data set, such as a mask's True.
    """
    found = []
    for index in indices:
        is_mask = isinstance(index, bool | np.bool_) or getattr(index, "dtype", None) == torch.bool
        if is_mask or not -count <= index < count:
            raise DataError(
                f"{what} with the index {index!r} of a data set of {count}. Expected whole numbers below that; "
                "of a mask: torch.nonzero(mask).flatten().tolist()."
            )
        found.append(operator.index(index))
    return tuple(found)


@dataclass(frozen=True)
class DataSplits:
    """What a training or an evaluation needs to know of a data set.

    Attributes:
        name: the DATA argument it was loaded from.
        train: the images to train on.
        val: the images to choose by, or ``None`` where there are none apart from the others.
        test: the images to report on, never used to choose by, or ``None`` where there is no labelled test split.
        classes: class names in label order.
    """

    name: str
    train: LabelledImages
    val: LabelledImages | None
    test: LabelledImages | None
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        for split in (self.train, self.val, self.test):
            if split is not None:
                split.classes = self.classes

    def __repr__(self) -> str:
        splits = {"training": self.train, "validation": self.val, "test": self.test}
        counts = ", ".join(f"{len(found):,} {kind}" for kind, found in splits.items() if found is not None)
        skipped = f"; {len(self.skipped):,} left out that cannot be read" if self.skipped else ""
        return (
            f"DataSplits({printable(self.name)}: {counts} {self.train.noun}s of {len(self.classes)} classes: "
            f"{listed(self.classes)}{skipped})"
        )

    @property
    def num_classes(self) -> int:
        """Number of classes, the width of a classification head."""
        return len(self.classes)

    @property
    def skipped(self) -> tuple[str, ...]:
        """Sources of all images left out as unreadable, over the three splits."""
        return tuple(source for split in (self.train, self.val, self.test) if split for source in split.skipped)

    def map(self, change: Callable[[LabelledImages], LabelledImages]) -> "DataSplits":
        """The splits with ``change`` applied to each one there is."""
        return replace(
            self,
            train=change(self.train),
            val=None if self.val is None else change(self.val),
            test=None if self.test is None else change(self.test),
        )

    def with_transform(
        self, transform: Callable[[Image.Image], Any], *, train: Callable[[Image.Image], Any] | None = None
    ) -> "DataSplits":
        """The splits with ``transform`` on every image, or with ``train`` on the training images where it is given."""
        changed = self.map(lambda split: split.with_transform(transform))
        return changed if train is None else replace(changed, train=self.train.with_transform(train))
