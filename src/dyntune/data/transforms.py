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
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise DataError(f"image size {self.size}: expected (height, width), both at least 1 pixel.")
        finite = all(abs(number) <= _LARGEST_NUMBER for number in (*self.mean, *self.std))
        if len(self.mean) != 3 or len(self.std) != 3 or not finite or min(self.std) <= 0:
            raise DataError(
                f"mean {self.mean} and std {self.std}: expected three finite numbers each, the std above 0, "
                "because images are read as RGB; use a backbone with three input channels."
            )
        if self.interpolation not in INTERPOLATIONS:
            raise DataError(unknown_name("interpolation", self.interpolation, INTERPOLATIONS))

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
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`.

        Raises:
            DataError: a value is missing, unknown or of the wrong kind.
        """
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
        return cls((height, width), mean, std, str(values["interpolation"]))


def _whole(number: Any) -> int:
    if type(number) is not int:
        raise ValueError(f"{reprlib.repr(number)} is no whole number")
    return number


def build_transform(
    preprocessing: Preprocessing, *, train: bool = False, augment: Literal["none", "timm"] = "none"
) -> Callable[[Image.Image], torch.Tensor]:
    """The transform from a PIL RGB image to a float32 tensor (3, H, W), normalised.

    Args:
        preprocessing: size, mean, std and interpolation.
        train: whether the transform is for training images.
        augment: ``"none"`` resizes straight to (H, W), ignoring the aspect ratio, as is usual on VTAB-1K.
            ``"timm"`` gives training images timm's random crop, flip and colour jitter
            (``timm.data.create_transform(is_training=True)``). Only training images are augmented: with
            ``train=False`` the direct resize is given either way, so that validation, test and prediction
            always see an image the same way.

    Raises:
        DataError: ``augment`` is neither.
    """
    if augment not in ("none", "timm"):
        raise DataError(unknown_name("augmentation", str(augment), ("none", "timm")))
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


def preprocessed(dataset: Dataset[Any], preprocessing: Preprocessing) -> LabelledImages | Samples:
    """PIL images with the preprocessing put on; tensors as they are.

    Raises:
        DataError: the data set is of no kind that is known; see ``dyntune.data.others.accepted``.
    """
    found = accepted(dataset)
    if found.transform is None and (isinstance(found, LabelledImages) or found.pictures):
        return found.with_transform(build_transform(preprocessing))
    return found
