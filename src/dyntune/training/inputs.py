"""What images go through before a model gets them, and whether model and data set belong together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dyntune.core.errors import TrainingError
from dyntune.data.base import LabelledImages
from dyntune.data.transforms import Preprocessing, build_transform, preprocessed
from dyntune.model.tuned import TunedModel
from dyntune.training.settings import TrainSettings

Normalisation = Literal["backbone", "inception", "imagenet", "none"]
Interpolation = Literal["backbone", "bilinear", "bicubic"]
STATISTICS = {
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
"""Mean and standard deviation of each normalisation, on a scale of 0 to 1."""


def with_pixels_as(
    preprocessing: Preprocessing, normalisation: Normalisation, interpolation: Interpolation
) -> Preprocessing:
    """A backbone's preprocessing with other statistics or another resize; ``backbone`` leaves either as it is."""
    if normalisation != "backbone":
        mean, std = STATISTICS[normalisation]
        preprocessing = replace(preprocessing, mean=mean, std=std)
    return preprocessing if interpolation == "backbone" else replace(preprocessing, interpolation=interpolation)


def require_matching_head(model: TunedModel, dataset: Dataset[Any]) -> None:
    """Raises TrainingError when the classifier cannot be that of the data set."""
    head = model.backbone.classes
    names = getattr(dataset, "classes", None)
    if not any(True for module in model.backbone.heads for _ in module.parameters()):
        raise TrainingError(
            "nothing to train: the model has no head. Create it with num_classes=<number of classes>, or put one on a "
            "tower of transformers: dyntune.add_classifier(tower, <number of classes>)."
        )
    if names and head and len(names) != head:
        raise TrainingError(
            f"the model's head has {head} classes, the data set {len(names)}. Create the model with "
            f"num_classes={len(names)}."
        )


def training_images(dataset: Dataset[Any], model: TunedModel, settings: TrainSettings) -> Dataset[Any]:
    """The training images as tensors; a data set with a transform of its own is left as it is.

    Raises:
        TrainingError: augmentation is asked of a data set with a transform of its own.
    """
    if isinstance(dataset, LabelledImages) and dataset.transform is None:
        return dataset.with_transform(build_transform(model.preprocessing, train=True, augment=settings.augment))
    if settings.augment != "none":
        raise TrainingError("augment needs a data set of PIL images; this one has a transform of its own.")
    return dataset


def first_batch(dataset: LabelledImages, model: TunedModel, batch_size: int) -> Tensor:
    """The first images of a data set, preprocessed: ``(at most batch_size, 3, height, width)``."""
    return next(iter(DataLoader(preprocessed(dataset, model.preprocessing), batch_size)))[0]
