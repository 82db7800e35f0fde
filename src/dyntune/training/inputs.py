"""What images go through before a model gets them, and whether model and data set belong together."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from dyntune.core.errors import DataError, TrainingError
from dyntune.core.modes import evaluating
from dyntune.core.texts import listed, printable
from dyntune.core.words import counted
from dyntune.data.base import LabelledImages
from dyntune.data.others import Samples, accepted, check_labels
from dyntune.data.transforms import Preprocessing, preprocessed
from dyntune.model.tasks import Classification
from dyntune.model.tasks.classification import require_head
from dyntune.model.tuned import TunedModel
from dyntune.training.randomness import caller_randomness_kept
from dyntune.training.settings import TrainSettings

log = logging.getLogger("dyntune")

Normalisation = Literal["backbone", "inception", "imagenet", "none"]
Interpolation = Literal["backbone", "bilinear", "bicubic"]
STATISTICS = {
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
"""Mean and standard deviation of each normalisation, on a scale of 0 to 1."""
_LARGEST_VALUE = 50
"""Of preprocessed images, whose values are below 5 or so in every preprocessing that is common."""
_SHOWN = 8


def with_pixels_as(
    preprocessing: Preprocessing, normalisation: Normalisation, interpolation: Interpolation
) -> Preprocessing:
    """A backbone's preprocessing with other statistics or another resize; ``backbone`` leaves either as it is."""
    if normalisation != "backbone":
        mean, std = STATISTICS[normalisation]
        preprocessing = replace(preprocessing, mean=mean, std=std)
    return preprocessing if interpolation == "backbone" else replace(preprocessing, interpolation=interpolation)


def require_same_classes(model: TunedModel, dataset: Any, name: str) -> None:
    """Compares class names, where both have some, because labels count them; other names are warned of.

    Args:
        name: what to call the data set in messages.

    Raises:
        DataError: they are the same in another order.
    """
    names = _names(dataset)
    if names is None or model.classes is None or len(names) != len(model.classes):
        return
    own, other = model.classes, tuple(map(str, names))
    if own == other:
        return
    if sorted(own) == sorted(other):
        raise DataError(
            f"the classes of {name} are those of the model in another order ({listed(other, _SHOWN)}; the model: "
            f"{listed(own, _SHOWN)}), and labels count them. Give data whose labels follow the model's order."
        )
    log.warning(
        "the classes of %s are called %s, those of the model %s, whose names stay. If they are others, set "
        "model.classes = None before fit, which then takes the data's names.",
        name,
        listed(other, _SHOWN),
        listed(own, _SHOWN),
    )


def require_matching_head(model: TunedModel, dataset: Dataset[Any]) -> None:
    """Gives the model the data set's class names if it has none.

    Raises:
        TrainingError: the classifier cannot be that of the data set, or class names are not one for each class.
        DataError: the model's classes are those of the data set in another order.
    """
    head = model.backbone.classes
    names = _names(dataset)
    require_head(model.backbone, "nothing to train")
    if names is not None and head and len(names) != head:
        raise TrainingError(
            f"the model's head has {counted(head, 'class')}, the data set {len(names)}. Create the model with "
            f"num_classes={len(names)}."
        )
    if model.classes is None and names is not None:
        model.classes = tuple(map(str, names))
    if model.classes is not None and len(model.classes) != head:
        shown = ", ".join(f"{name!r}" for name in model.classes[:5])
        raise TrainingError(
            f"model.classes has {len(model.classes)} names ({shown}): expected a text for each of the head's {head} "
            "classes, such as model.classes = ['cat', 'dog'], or None."
        )
    require_same_classes(model, dataset, "the training set")


def data_for(model: TunedModel, dataset: Any, name: str) -> LabelledImages | Samples:
    """A data set of any kind that is known, whose samples the model can be trained or evaluated on.

    Args:
        name: what to call it in messages, such as ``the training set``.

    Raises:
        DataError: it is of another kind, or its first image does not fit the model.
    """
    found = accepted(dataset, name)
    if not len(found) or (isinstance(found, LabelledImages) and found.transform is None):
        return found
    if isinstance(found, Samples) and found.pictures:
        return found
    with caller_randomness_kept():
        image = found[0][0]
    fits = isinstance(image, Tensor) and image.is_floating_point() and image.dtype != torch.float64
    if not fits or not _runs(model, image):
        what = (
            f"{image.dtype} of shape {tuple(image.shape)}" if isinstance(image, Tensor) else f"{type(image).__name__}"
        )
        kind = "PIL images" if model.preprocessing.clip is None else "videos"
        raise DataError(
            f"the first image of {name} is {what}: the model takes float32 tensors of shape "
            f"{model.preprocessing.shape}, or {kind}, which are preprocessed for it."
        )
    largest = float(image.abs().max())
    if not math.isfinite(largest):
        raise DataError(f"the first image of {name} has values that are not finite. Expected preprocessed images.")
    if largest > _LARGEST_VALUE:
        log.warning(
            "the first image of %s has values up to %g, as if it were not preprocessed: the model expects (x - mean) / "
            "std of pixels from 0 to 1, with mean %s and std %s.",
            name,
            largest,
            model.preprocessing.mean,
            model.preprocessing.std,
        )
    return found


def _runs(model: TunedModel, image: Tensor) -> bool:
    """Whether the model takes an image; one of the size that it was pretrained with is not tried."""
    if image.shape == model.preprocessing.shape:
        return True
    parameter = next(model.parameters())
    try:
        with torch.no_grad(), caller_randomness_kept(), evaluating(model):
            model.run(image[None].to(parameter.device, parameter.dtype))
    except (RuntimeError, ValueError, AssertionError, IndexError):
        return False
    return True


def require_labels(
    model: TunedModel,
    train_set: LabelledImages | Samples,
    val_set: LabelledImages | Samples | None = None,
    *,
    beforehand: bool = True,
) -> None:
    """Looks at the labels before the first step, and says which of them only the validation images have.

    Args:
        beforehand: also where it takes reading images; without it labels are then looked at as they are read.

    Raises:
        DataError: a label is not one of the classes; the message has its index. Or a data set has other classes.
    """
    if not isinstance(model.task, Classification):
        return
    named = [tuple(map(str, names)) for data in (train_set, val_set) if (names := _names(data)) is not None]
    if len(named) == 2 and named[0] != named[1]:
        raise DataError(
            f"the training set has the classes {listed(named[0], _SHOWN)}, the validation set "
            f"{listed(named[1], _SHOWN)}. Expected the same in the same order, because labels count them."
        )
    if not beforehand and isinstance(train_set, Samples):
        train_set.expect_labels(model.backbone.classes or None)
        return
    with caller_randomness_kept():
        found = [
            check_labels(data, model.backbone.classes or None) for data in (train_set, val_set) if data is not None
        ]
    unseen = sorted(found[-1] - found[0])
    if unseen:
        names = model.classes
        shown = ", ".join(f"{label} ({printable(names[label])})" if names else f"{label}" for label in unseen[:10])
        log.warning(
            "the validation set has %s that no training image has, which cannot be learned: %s.",
            counted(len(unseen), "label"),
            shown,
        )


def _names(dataset: Any) -> Sequence[Any] | None:
    """The data set's class names; None without any."""
    names: Any = getattr(dataset, "classes", None)
    return names if hasattr(names, "__len__") and len(names) else None


def training_images(dataset: LabelledImages | Samples, model: TunedModel, settings: TrainSettings) -> Dataset[Any]:
    """The training images as tensors; a data set with a transform of its own is left as it is.

    Raises:
        TrainingError: augmentation is asked of a data set with a transform of its own.
    """
    if dataset.transform is None and (isinstance(dataset, LabelledImages) or dataset.pictures):
        return preprocessed(dataset, model.preprocessing, train=True, augment=settings.augment)
    if settings.augment != "none":
        raise TrainingError("augment needs a data set of PIL images; this one has a transform of its own.")
    return dataset


def spread_batch(dataset: LabelledImages, model: TunedModel, batch_size: int) -> Tensor:
    """Images spread over a data set, whose first ones are often of one class, preprocessed.

    Returns:
        ``(at most batch_size, 3, height, width)``.
    """
    count = min(batch_size, len(dataset))
    prepared = preprocessed(dataset, model.preprocessing)
    picked = Subset(prepared, [len(dataset) * number // count for number in range(count)])
    return next(iter(DataLoader(picked, batch_size)))[0]
