"""Data sets that others made, of PyTorch, torchvision and Hugging Face, as those that are trained and evaluated on."""

from __future__ import annotations

import copy
import hashlib
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from dyntune.core.errors import DataError
from dyntune.core.words import counted
from dyntune.data.base import DataSplits, ImageSubset, LabelledImages, whole_indices
from dyntune.data.datasets import FileImages, JoinedImages, content_digest
from dyntune.data.images import read_image, to_rgb
from dyntune.data.video_files import require_reader
from dyntune.data.videos import Video

EXPECTED = (
    "Expected a data set that is read by index and gives (image, label) pairs: PIL images, or float32 tensors (3, "
    "height, width) that are preprocessed, and whole-number labels from 0. For models of clips: dyntune.data.Video, or "
    "tensors (frames, 3, height, width)."
)
_IMAGE_KEYS = ("pixel_values", "image", "img", "images", "picture", "video")
_LABEL_KEYS = ("label", "labels", "target", "targets", "fine_label")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_MOST_READ = 10_000
"""Samples whose labels are looked at before the first step where that takes reading their images."""


class HubImages(LabelledImages):
    """A data set of Hugging Face's ``datasets``, with a column of images or videos and one of labels.

    Videos are opened here, not by that library, which would need torchcodec.

    Args:
        data: without a format of its own.
        name: what to call it in messages.
        advice: what errors about a video say at their end.
    """

    reads_files = True

    def __init__(self, data: Any, name: str, advice: str = "") -> None:
        image, label = hub_columns(data.features)
        super().__init__(list(data.select_columns([label])[label]))
        feature = type(data.features[image])
        self.videos = feature.__name__ == "Video"
        if self.videos:
            require_reader()
        self.files = data.select_columns([image]).cast_column(image, feature(decode=False))
        self.image, self.name, self.advice = image, name, advice
        names = getattr(data.features[label], "names", None)
        self.classes = None if names is None else tuple(names)

    def read(self, index: int) -> Image.Image | Video:  # type: ignore[override]
        """The image, or the video, at ``index``."""
        file = self._file(index)
        return Video(file, self.source(index), self.advice) if self.videos else read_image(file, self.source(index))

    def source(self, index: int) -> str:
        return f"{self.name} {self.noun} {index}"

    def place(self, index: int) -> str:
        return self.identity(index)

    def identity(self, index: int) -> str:
        try:
            file = self._file(index)
            return hashlib.blake2b(file, digest_size=8).hexdigest() if isinstance(file, bytes) else content_digest(file)
        except (OSError, DataError):  # said where it is read
            return super().identity(index)

    def _file(self, index: int) -> bytes | str:
        found = self.files[index][self.image] or {}
        file = found.get("bytes") or found.get("path")
        if file is None:
            raise DataError(f"{self.source(index)}: there is no {self.noun}. Leave out rows without one.")
        return bytes(file) if isinstance(file, bytes | bytearray) else str(file)


def _called_as_image(names: Collection[str]) -> str | None:
    """Of the names of pictures, the one that images are called by, else the first: others may be masks and the like."""
    return next((key for key in (*_IMAGE_KEYS, *names) if key in names), None)


def hub_columns(features: Mapping[str, Any]) -> tuple[str, str]:
    """The columns of images, or without any of videos, and of labels: by names where they are known, or types."""
    kinds = {column: type(feature).__name__ for column, feature in features.items()}
    images = [column for column, kind in kinds.items() if kind == "Image"]
    images = images or [column for column, kind in kinds.items() if kind == "Video"]
    labels = [column for column, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    image = _called_as_image(images)
    # Of fine and coarse labels (as in CIFAR-100) the one with more classes is the task.
    by_type = max(labels, key=lambda column: features[column].num_classes, default=None)
    label = "label" if "label" in features else by_type
    if image is None or label is None:
        raise ValueError(
            f"its columns are {', '.join(features)}, of which none holds images or videos, or none holds labels"
        )
    return image, label


class Samples(Dataset[tuple[Any, Any]]):
    """The pairs of a data set of any kind, each checked when it is read.

    Args:
        data: read by index; its samples are pairs, or dictionaries with an image and a label.
        name: what to call it in messages.

    Attributes:
        transform: put on PIL images and videos; tensors stay as they are.
        pictures: whether there are such, and no tensors.
        videos: whether they are videos.
        are_labels: whether targets are labels, whole numbers.
        labels: number of classes that labels must be below, if that is known.
    """

    def __init__(self, data: Any, name: str) -> None:
        self.data, self.name = data, name
        self.transform: Callable[[Any], Any] | None = None
        self.are_labels = False
        self.labels: int | None = None
        self.classes = getattr(data, "classes", None)
        first = self.pair(0)[0] if len(data) else None
        self.videos = isinstance(first, Video)
        self.pictures = isinstance(first, Image.Image | Video)
        self.shape = None if first is None or self.pictures else self._checked(first, 0).shape

    @property
    def noun(self) -> str:
        """What one of them is called in messages."""
        return "video" if self.videos else "image"

    def with_transform(self, transform: Callable[[Any], Any]) -> Self:
        """The same data set, giving ``transform(image)`` for PIL images and videos."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def expect_labels(self, classes: int | None) -> None:
        """Has each target be a label, a whole number, below ``classes`` where that is known."""
        self.are_labels, self.labels = True, classes

    def pair(self, index: int) -> tuple[Any, Any]:
        """Image and target at ``index`` as the data set gives them."""
        sample = self.data[index]
        if isinstance(sample, Mapping):
            pictures = [key for key, value in sample.items() if isinstance(value, Image.Image | Video)]
            image = _called_as_image(pictures or [key for key in _IMAGE_KEYS if key in sample])
            label = next((key for key in _LABEL_KEYS if key in sample), None)
            if image is None or label is None:
                raise DataError(
                    f"sample {index} of {self.name} has the entries {', '.join(map(str, sample))}, of which none is "
                    f"called as an image or none as a label. {EXPECTED}"
                )
            return sample[image], sample[label]
        if not isinstance(sample, tuple | list) or len(sample) != 2:
            what = f"{len(sample)} parts" if isinstance(sample, tuple | list) else f"a {_kind(sample)} alone"
            raise DataError(f"sample {index} of {self.name} is {what}. {EXPECTED}")
        return sample[0], sample[1]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, target = self.pair(index)
        if self.transform is not None and isinstance(image, Video if self.videos else Image.Image):
            image = self.transform(image if isinstance(image, Video) else to_rgb(image))
        elif self.transform is not None or not self.pictures:
            image = self._checked(image, index)
        return image, target if not self.are_labels else whole_label(target, index, self.labels, self.name)

    def _checked(self, image: Any, index: int) -> Tensor:
        """The image, which must be a tensor like the first one's."""
        shape = getattr(self, "shape", None)
        if not isinstance(image, Tensor) or image.dtype not in _FLOATS:
            raise DataError(f"image {index} of {self.name} is a {_kind(image)}. {EXPECTED}")
        if shape is not None and image.shape != shape:
            raise DataError(
                f"image {index} of {self.name} has the shape {tuple(image.shape)}, the first has {tuple(shape)}. "
                "Expected the same for all; resize them to one size."
            )
        return image


def accepted(data: Any, name: str = "the data set") -> LabelledImages | Samples:
    """A data set of any kind that is known, as one that preprocessing can be put on.

    Of our own data sets, of their parts (``Subset``, ``random_split``, ``ConcatDataset``), of torchvision's
    ``ImageFolder`` and of Hugging Face's data sets of image files, labels and files stay known without reading images.

    Args:
        data: the data set.
        name: what to call it in messages, such as ``the training set``.

    Raises:
        DataError: it is of another kind, or its first sample is not as expected.
    """
    if isinstance(data, Samples):
        return data
    require_images(data, name)
    if isinstance(data, DataLoader):
        raise DataError(
            f"{name} is a DataLoader, which gives batches. {EXPECTED} Give its data set, loader.dataset; batch_size "
            "and workers are options."
        )
    if isinstance(data, Mapping):
        raise DataError(
            f"{name} is a {type(data).__name__} of {', '.join(map(str, data))}. {EXPECTED} Give one of these."
        )
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise DataError(f"{name} is a {type(data).__name__}, which is not read by index. {EXPECTED}")
    found = _labelled(data, name)
    return Samples(data, name) if found is None else found


def require_images(data: Any, name: str) -> None:
    """Raises DataError for a whole data set with its splits, and for the name of one, where one split is asked for."""
    if isinstance(data, DataSplits):
        has = [f"data.{split}" for split in ("train", "val", "test") if getattr(data, split) is not None]
        raise DataError(
            f"{name} is all of {data.name}, with its splits: {', '.join(has)}. Give one of them, as in "
            "fit(model, data.train, data.val) and evaluate(model, data.test)."
        )
    if isinstance(data, str | Path):
        raise DataError(
            f"{name} is a name. Load the images first: data = dyntune.data.load_data({str(data)!r:.80}); then "
            "data.train, data.val and data.test are data sets."
        )


def is_dataset(data: Any) -> bool:
    """Whether something is a data set, and not an iterable of batches."""
    return isinstance(data, Dataset) or _is_hub(data)


def check_labels(data: LabelledImages | Samples, classes: int | None) -> frozenset[int]:
    """The labels that occur, each a whole number from 0 to below ``classes``; reads images only where it must.

    Args:
        classes: how many there are; None if that is not known.

    Raises:
        DataError: one is not; the message has its index.
    """
    if isinstance(data, LabelledImages):
        for index, label in enumerate(data.targets):
            if label < 0 or (classes is not None and label >= classes):
                raise _bad_label(f"{label}", f"image {index} ({data.source(index)})", classes)
        return frozenset(data.targets)
    data.expect_labels(classes)
    known: Sequence[Any] | None = None
    if isinstance(data.data, TensorDataset) and len(data.data.tensors) == 2:
        known = data.data.tensors[1]  # type: ignore[assignment]
    indices = range(len(data) if known is not None else min(len(data), _MOST_READ))
    labels = (data.pair(index)[1] if known is None else known[index] for index in indices)
    return frozenset(whole_label(label, index, classes, data.name) for index, label in enumerate(labels))


def whole_label(target: Any, index: int, classes: int | None, name: str) -> int:
    """The label as an integer.

    Raises:
        DataError: it is no whole number, or not one of the classes.
    """
    where = f"sample {index} of {name}"
    if getattr(target, "ndim", 0) or isinstance(target, list | tuple):
        raise _bad_label(f"a {_kind(target)}", where, classes)
    try:
        label = operator.index(target)
    except TypeError:
        raise _bad_label(f"{target!r}"[:80], where, classes) from None
    if label < 0 or (classes is not None and label >= classes):
        raise _bad_label(f"{label}", where, classes)
    return label


def _bad_label(what: str, where: str, classes: int | None) -> DataError:
    end = "" if classes is None else f" to {classes - 1}, one for each of the head's {counted(classes, 'class')}"
    return DataError(
        f"the label of {where} is {what}. Expected a single whole number from 0{end}; mend the labels, or create the "
        "model with num_classes=<number of classes>."
    )


def _labelled(data: Any, name: str) -> LabelledImages | None:
    """The data set as labelled images, or None if it is of another kind."""
    if isinstance(data, LabelledImages):
        return data
    if isinstance(data, Subset):
        whole = _labelled(data.dataset, name)
        if whole is None:
            return None
        return ImageSubset(whole, whole_indices(data.indices, len(whole), f"{name} is a Subset"))
    if isinstance(data, ConcatDataset):
        parts = [_labelled(part, name) for part in data.datasets]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts) or any(part.transform is not found[0].transform for part in found):
            return None
        if len({part.videos for part in found}) > 1:
            raise DataError(f"{name} is made of parts with images and parts with videos. Expected one kind.")
        if len({part.classes for part in found}) > 1:
            named = " and ".join(str(part.classes) for part in found)
            raise DataError(f"{name} is made of parts with the classes {named}. Expected the same classes in all.")
        return JoinedImages(found).with_transform(found[0].transform)
    if _is_hub(data):
        if data.format["type"] is not None:
            return None  # it gives what the format makes of the images
        try:
            return HubImages(data, f"{name}, ")
        except ValueError as error:
            raise DataError(f"{name}: {str(error).removesuffix('.')}. {EXPECTED}") from error
    return _image_folder(data)


def _image_folder(data: Any) -> LabelledImages | None:
    """torchvision's ImageFolder without transforms, whose files can then be known again and named in errors."""
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import default_loader

    if type(data) is not ImageFolder or data.loader is not default_loader or data.transforms is not None:
        return None
    images = FileImages([path for path, _ in data.samples], [label for _, label in data.samples])
    images.classes = tuple(data.classes)
    return images


def _is_hub(data: Any) -> bool:
    return type(data).__module__.startswith("datasets.") and hasattr(data, "features") and hasattr(data, "__len__")


def _kind(value: Any) -> str:
    """What a value is, in words."""
    if isinstance(value, Tensor | np.ndarray):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{type(value).__name__} of {dtype} with the shape {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__
