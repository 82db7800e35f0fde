"""What decides the outcome of a run, so that resuming another one is noticed."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from dyntune.data.base import LabelledImages
from dyntune.model.tuned import TunedModel
from dyntune.training.settings import TrainSettings
from dyntune.training.teacher import teacher_identity


def run_identity(
    model: TunedModel,
    settings: TrainSettings,
    train_set: Dataset[Any],
    processes: int,
    teacher: nn.Module | None = None,
) -> dict[str, Any]:
    """Settings, parts, backbone, data and teacher of a run as plain values."""
    return {
        "settings": dataclasses.asdict(settings),
        "spec": model.spec,
        "backbone": model.origin.name,
        "architecture": hashlib.sha256(str(model.backbone.host).encode()).hexdigest()[:16],
        "weights": model.fingerprint,
        "task": model.task.name,
        "classes": model.classes,
        "preprocessing": model.preprocessing.to_dict(),
        "processes": processes,
        "train_images": len(train_set),  # type: ignore[arg-type]
        "data": _data_digest(train_set),
        "teacher": teacher_identity(teacher),
    }


def identity_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two identities, in words; settings that do not touch the weights may differ.

    What an older run did not record cannot be compared.
    """
    changed = TrainSettings(**now["settings"]).differences(before["settings"])
    return changed + [
        f"{key} was {before[key]}, is {value}"
        for key, value in now.items()
        if key != "settings" and key in before and value != before[key]
    ]


def _data_digest(dataset: Dataset[Any]) -> str | None:
    """Tells two data sets apart by the labels and file names of their images; None for data sets of another kind."""
    if not isinstance(dataset, LabelledImages):
        return None
    digest = hashlib.sha256()
    for index, target in enumerate(dataset.targets):
        digest.update(f"{target} {Path(dataset.source(index)).name}\n".encode())
    return digest.hexdigest()[:16]
