"""From a PIL image to the tensor that a backbone expects."""

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from PIL import Image
from torch.utils.data import Dataset

from dyntune.core.errors import DataError, unknown_name
from dyntune.data.base import LabelledImages
from dyntune.data.clips import ClipTransform, Sampling
from dyntune.data.others import Samples, accepted

LARGEST_SIZE = 4096
"""Pixels on a side of the images that a file may ask for; one of that size takes 200 MB."""
_LARGEST_NUMBER = 1e6
"""Of a mean or deviation, which lie between 0 and 1, or 255 for those who have another scale."""
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for a backbone.

    Attributes:
        size: (height, width) in pixels.
        mean: subtracted from each of the three colour channels, on a scale of 0 to 1.
        std: each channel is divided by it after that.
        interpolation: one of :data:`INTERPOLATIONS`, as timm names them.
        clip: how clips are taken from videos, of a backbone that takes clips; None for images.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    clip: Sampling | None = None

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise DataError(f"image size {self.size}: expected (height, width), both at least 1 pixel.")
        finite = all(abs(number) <= _LARGEST_NUMBER for number in (*self.mean, *self.std))
        if len(self.mean) != 3 or len(self.std) != 3 or not finite or min(self.std) < 1 / _LARGEST_NUMBER:
            raise DataError(
                f"mean {self.mean} and std {self.std}: expected three finite numbers each, the std above 0, "
                "because images are read as RGB; use a backbone with three input channels."
            )
        if self.interpolation not in INTERPOLATIONS:
            raise DataError(unknown_name("interpolation", self.interpolation, INTERPOLATIONS))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is prepared: ``(3, height, width)``, of clips ``(frames, 3, height, width)``."""
        return (3, *self.size) if self.clip is None else (self.clip.frames, 3, *self.size)

    @classmethod
    def from_timm(cls, vit: torch.nn.Module) -> Self:
        """The preprocessing a timm model was pretrained with, at the image size it was built for.

        Source: ``timm.data.resolve_model_data_config``. That reports the pretraining size even of a model built with
        another ``img_size``, so the size of the patch embedding is taken where it is fixed.

        Raises:
            DataError: the backbone does not take three colour channels.
        """
        from timm.data import resolve_model_data_config

        config = resolve_model_data_config(vit)
        size = getattr(getattr(vit, "patch_embed", None), "img_size", None) or config["input_size"][-2:]
        interpolation = config["interpolation"]
        return cls(
            size=(int(size[0]), int(size[1])),
            mean=tuple(float(value) for value in config["mean"]),
            std=tuple(float(value) for value in config["std"]),
            # "random" is a training-time choice between bilinear and bicubic, not a way to resize one image.
            interpolation="bicubic" if interpolation == "random" else interpolation,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for a JSON file."""
        return {
            "size": list(self.size),
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            **({} if self.clip is None else {"clip": self.clip.to_dict()}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`.

        Raises:
            DataError: a value is missing, unknown or of the wrong kind.
        """
        clip = None
        if isinstance(values, Mapping) and "clip" in values:
            clip = Sampling.from_dict(values["clip"])
            values = {name: value for name, value in values.items() if name != "clip"}
        fields = {"size", "mean", "std", "interpolation"}
        if not isinstance(values, Mapping) or set(values) != fields:
            raise DataError(f"preprocessing is {reprlib.repr(values)}: expected the entries {sorted(fields)}.")
        try:
            height, width = (_whole(length) for length in values["size"])
            mean = tuple(float(value) for value in values["mean"])
            std = tuple(float(value) for value in values["std"])
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"preprocessing {reprlib.repr(dict(values))} cannot be read ({error}): expected size as two whole "
                "numbers, mean and std as three numbers each."
            ) from error
        if max(height, width) > LARGEST_SIZE:
            raise DataError(f"image size {height} x {width}: expected at most {LARGEST_SIZE} pixels on a side.")
        return cls((height, width), mean, std, str(values["interpolation"]), clip)


def _whole(number: Any) -> int:
    if type(number) is not int:
        raise ValueError(f"{reprlib.repr(number)} is no whole number")
    return number


def build_transform(
    preprocessing: Preprocessing,
    *,
    train: bool = False,
    augment: Literal["none", "timm"] = "none",
    every_view: bool = False,
) -> Callable[[Any], torch.Tensor]:
    """The transform from a PIL RGB image to a float32 tensor (3, H, W), normalised; of videos, see ``ClipTransform``.

    Args:
        preprocessing: size, mean, std and interpolation.
        train: whether the transform is for training images.
        augment: ``"none"`` resizes straight to (H, W), ignoring the aspect ratio, as is usual on VTAB-1K.
            ``"timm"`` gives training images timm's random crop, flip and colour jitter
            (``timm.data.create_transform(is_training=True)``). Only training images are augmented: with
            ``train=False`` the direct resize is given either way, so that validation, test and prediction
            always see an image the same way.
        every_view: of videos, whether a test gives all of its views instead of the middle one alone.

    Raises:
        DataError: ``augment`` is neither.
    """
    if augment not in ("none", "timm"):
        raise DataError(unknown_name("augmentation", str(augment), ("none", "timm")))
    pixels = (preprocessing.size, preprocessing.mean, preprocessing.std, preprocessing.interpolation)
    if preprocessing.clip is not None:
        return ClipTransform(preprocessing.clip, *pixels, train=train, augment=augment, every_view=every_view)
    if augment == "timm" and train:
        from timm.data import create_transform

        transform: Callable[[Image.Image], torch.Tensor] = create_transform(
            input_size=(3, *preprocessing.size),
            is_training=True,
            interpolation=preprocessing.interpolation,
            mean=preprocessing.mean,
            std=preprocessing.std,
        )
        return transform

    from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize, ToTensor

    plain: Callable[[Image.Image], torch.Tensor] = Compose(
        [
            Resize(preprocessing.size, InterpolationMode(preprocessing.interpolation)),
            ToTensor(),
            Normalize(preprocessing.mean, preprocessing.std),
        ]
    )
    return plain


def preprocessed(
    dataset: Dataset[Any],
    preprocessing: Preprocessing,
    *,
    train: bool = False,
    augment: Literal["none", "timm"] = "none",
    every_view: bool = False,
) -> LabelledImages | Samples:
    """PIL images or videos with ``build_transform`` put on; tensors as they are.

    Raises:
        DataError: the data set is of no kind that is known, see ``dyntune.data.others.accepted``; or it is of videos,
            and the backbone takes images, or the other way round.
    """
    found = accepted(dataset)
    if found.transform is not None or (isinstance(found, Samples) and not found.pictures):
        return found
    if found.videos and preprocessing.clip is None:
        raise DataError(
            "the data are videos, but the backbone takes images. Give --frames 8, in Python ClipClassifier."
        )
    if not found.videos and preprocessing.clip is not None:
        raise DataError(
            "the data are images, but the backbone takes clips of videos. Leave --frames out, or give videos."
        )
    return found.with_transform(build_transform(preprocessing, train=train, augment=augment, every_view=every_view))
