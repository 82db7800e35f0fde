"""Clips: which frames of a video are read, and how they become the tensor that a backbone expects."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal, Protocol, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dyntune.core.errors import DataError, unknown_name
from dyntune.core.fields import Range, require_ranges

_LARGEST = 4096
"""Of the numbers of a sampling that a file may ask for."""


class Footage(Protocol):
    """What a clip is taken from, such as a ``dyntune.data.videos.Video``."""

    def __len__(self) -> int:
        """How many frames there are."""
        ...

    def read(self, indices: Sequence[int], change: Callable[[Image.Image], Any]) -> list[Any]:
        """What ``change`` makes of the frames with these numbers, in their order; each is changed as it is read."""
        ...


@dataclass(frozen=True)
class Sampling:
    """Which frames and crops of a video a model sees.

    Args:
        frames: T of a clip.
        stride: distance between two of them, with ``sampling=spans``.
        sampling: ``spans`` reads frames at a fixed distance, from a random start in training; ``segments`` cuts the
            whole video into as many parts as there are frames and reads one of each, a random one in training.
        spans: clips of a video in a test, spread over it; several need ``sampling=spans``.
        crops: squares of each in a test, 1 (the middle) or 3 along the longer side.
        average: what is averaged over the views of a video, ``probabilities``, or ``logits`` as DyT's public code does.
        flip: probability with which a training clip is mirrored; 0 where left and right are classes.
        scale: the largest size that the short side of a training clip is brought to, in sizes of the crop.
    """

    frames: Annotated[int, Range(1)] = 8
    stride: Annotated[int, Range(1)] = 16
    sampling: Literal["spans", "segments"] = "spans"
    spans: Annotated[int, Range(1)] = 1
    crops: Annotated[int, Range(1, 3)] = 1
    average: Literal["probabilities", "logits"] = "probabilities"
    flip: Annotated[float, Range(0, 1)] = 0.5
    scale: Annotated[float, Range(1)] = 1.15

    def __post_init__(self) -> None:
        if self.sampling not in ("spans", "segments"):
            raise DataError(unknown_name("sampling", self.sampling, ("spans", "segments")))
        if self.average not in ("probabilities", "logits"):
            raise DataError(unknown_name("average", self.average, ("probabilities", "logits")))
        require_ranges(self, DataError)
        if self.crops == 2:
            raise DataError("crops=2: expected 1, the middle, or 3, both ends and the middle.")
        if self.sampling == "segments" and self.spans != 1:
            raise DataError(f"spans={self.spans}: segments cover the whole video once; give sampling=spans, or 1.")

    @property
    def views(self) -> int:
        """Views of a video in a test."""
        return self.spans * self.crops

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """The inverse of ``to_dict``.

        Raises:
            DataError: a value is missing, unknown or of the wrong kind.
        """
        known = cls().to_dict()
        if not isinstance(values, Mapping) or set(values) != set(known):
            raise DataError(f"the sampling of clips is {reprlib.repr(values)}: expected the entries {sorted(known)}.")
        for key, value in values.items():
            right = (int, float) if type(known[key]) is float else (type(known[key]),)
            if type(value) not in right:
                raise DataError(
                    f"{key}={reprlib.repr(value)} of the sampling of clips: expected a {type(known[key]).__name__}."
                )
            if not isinstance(value, str) and not value <= _LARGEST:
                raise DataError(f"{key}={reprlib.repr(value)} of the sampling of clips: expected at most {_LARGEST}.")
        return cls(**values)

    def training_indices(self, count: int) -> list[int]:
        """Frames of a training clip of a video with ``count`` frames, drawn with torch's generator."""
        if self.sampling == "segments":
            edges = _edges(count, self.frames)
            return [_draw(low, high) for low, high in pairwise(edges)]
        return self._span(_draw(0, max(count - self._length, 0)), count)

    def test_indices(self, count: int, spans: int | None = None) -> list[list[int]]:
        """Frames of each of a test's clips of a video with ``count`` frames.

        Args:
            count: frames of the video.
            spans: how many clips; by default as many as the test has.
        """
        spans = spans or self.spans
        if self.sampling == "segments":
            edges = _edges(count, self.frames)
            return [[(low + high) // 2 for low, high in pairwise(edges)]]
        room = max(count - self._length, 0)
        starts = [room // 2] if spans == 1 else [round(view * room / (spans - 1)) for view in range(spans)]
        return [self._span(start, count) for start in starts]

    @property
    def _length(self) -> int:
        return (self.frames - 1) * self.stride + 1

    def _span(self, start: int, count: int) -> list[int]:
        """Frames from ``start``; behind the end, the last one."""
        return [min(start + number * self.stride, count - 1) for number in range(self.frames)]


def _edges(count: int, parts: int) -> list[int]:
    return [round(part * (count - 1) / parts) for part in range(parts + 1)]


def _draw(low: int, high: int) -> int:
    """A whole number from ``low`` to ``high``, both included."""
    return int(torch.randint(low, high + 1, ()))


@dataclass(frozen=True)
class ClipTransform:
    """From a video to clips, float32, normalised.

    In training one clip ``(T, 3, H, W)``, all frames of which are cut, mirrored and coloured alike. In a test of
    several views ``(V, T, 3, H, W)``; of one, or without ``every_view``, the middle one alone, ``(T, 3, H, W)``. In a
    test the short side becomes that of the crop, so that nothing is stretched.

    Args:
        sampling: which frames and crops.
        size: height and width in pixels.
        mean: subtracted from each colour channel, on a scale of 0 to 1.
        std: each channel is divided by it after that.
        interpolation: name of Pillow's.
        train: whether clips and crops are drawn at random.
        augment: in training, ``timm`` also draws how the crop is stretched and how colours are changed, as for images.
        every_view: whether a test gives all of its views.
    """

    sampling: Sampling
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    train: bool = False
    augment: Literal["none", "timm"] = "none"
    every_view: bool = False

    def __call__(self, video: Footage) -> Tensor:
        count, sampling = len(video), self.sampling
        if self.train:
            change = self._stretched() if self.augment == "timm" else self._cropped()
            clip = self._normalised(video.read(sampling.training_indices(count), change))
            return clip.flip(-1) if _uniform() < sampling.flip else clip
        spans = sampling.test_indices(count, None if self.every_view else 1)
        places = (0.0, 0.5, 1.0) if self.every_view and sampling.crops == 3 else (0.5,)

        def crops(frame: Image.Image) -> list[np.ndarray]:
            scaled = self._scaled(frame, 1.0)
            return [self._crop(scaled, place, place) for place in places]

        read = video.read([index for span in spans for index in span], crops)
        views = [
            self._normalised([cut[place] for cut in read[start : start + sampling.frames]])
            for start in range(0, len(read), sampling.frames)
            for place in range(len(places))
        ]
        return torch.stack(views) if len(views) > 1 else views[0]

    def _cropped(self) -> Callable[[Image.Image], np.ndarray]:
        """One draw of a size and a place of the crop, for every frame."""
        scale, down, right = 1 + (self.sampling.scale - 1) * _uniform(), _uniform(), _uniform()
        return lambda frame: self._crop(self._scaled(frame, scale), down, right)

    def _stretched(self) -> Callable[[Image.Image], np.ndarray]:
        """One draw of a stretched crop and of colours, for every frame; ranges as timm's for images."""
        from torchvision.transforms import functional as colours

        area, ratio = 0.08 + 0.92 * _uniform(), (4 / 3) ** (2 * _uniform() - 1)
        down, right = _uniform(), _uniform()
        changes = (colours.adjust_brightness, colours.adjust_contrast, colours.adjust_saturation)
        drawn = [(changes[number], 0.6 + 0.8 * _uniform()) for number in torch.randperm(3).tolist()]

        def change(frame: Image.Image) -> np.ndarray:
            width, height = frame.size
            wide, high = (width * height * area * ratio) ** 0.5, (width * height * area / ratio) ** 0.5
            shrink = min(1.0, width / wide, height / high)
            wide, high = wide * shrink, high * shrink
            left, top = right * (width - wide), down * (height - high)
            box = (left, top, min(width, left + wide), min(height, top + high))
            frame = frame.resize(self.size[::-1], self._filter, box=box)
            for adjust, factor in drawn:
                frame = adjust(frame, factor)
            return np.asarray(frame)

        return change

    @property
    def _filter(self) -> Image.Resampling:
        return Image.Resampling[self.interpolation.upper()]

    def _scaled(self, frame: Image.Image, scale: float) -> Image.Image:
        """The frame in the size in which its short side is that of ``scale`` crops."""
        width, height = frame.size
        factor = scale * max(self.size[0] / height, self.size[1] / width)
        size = max(self.size[1], round(width * factor)), max(self.size[0], round(height * factor))
        return frame if frame.size == size else frame.resize(size, self._filter)

    def _crop(self, frame: Image.Image, down: float, right: float) -> np.ndarray:
        """A crop ``(H, W, 3)`` at a place between 0 and 1 in each direction."""
        height, width = self.size
        top, left = round(down * (frame.height - height)), round(right * (frame.width - width))
        return np.asarray(frame.crop((left, top, left + width, top + height)))

    def _normalised(self, crops: list[np.ndarray]) -> Tensor:
        """A clip ``(T, 3, H, W)`` of crops ``(H, W, 3)``, uint8."""
        clip = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float().div_(255)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return clip.sub_(mean).div_(std)


def _uniform() -> float:
    return float(torch.rand(()))
