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
from dyntune.parts.registry import as_in_files, expand, part_from_dict, resolve
from dyntune.parts.spec import Part, format_spec
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
        "parts": [part.to_dict() for part in expand(model.parts)],
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
    parts = _parts(before)
    if parts != _parts(now):
        changed.append(f"spec was {before['spec']}, is {now['spec']}")
        if before["spec"] == now["spec"]:
            meant = "+".join(map(format_spec, parts))
            changed[-1] += f", which stands for something else in this version: the run needs {meant}"
    for key, value in now.items():
        old = before.get(key, value)
        if key in ("settings", "spec", "parts") or old == value or (key == "data" and old is None):
            continue
        changed.append(f"{key} was {old}, is {value}")
        if key == "data":
            changed[-1] += (
                " (images were added, removed or renamed, or an earlier version has split their folder in another way)"
            )
    return changed


def _parts(identity: dict[str, Any]) -> list[Part]:
    """The parts of a run; of one that recorded its spec alone, what that stood for."""
    if "parts" in identity:
        return [part_from_dict(part) for part in identity["parts"]]
    return list(expand(as_in_files(resolve([identity["spec"]]))))


def _data_digest(dataset: Dataset[Any]) -> str | None:
    """Tells two data sets apart by the labels and file names of their images; None for data sets of another kind."""
    if not isinstance(dataset, LabelledImages):
        return None
    digest = hashlib.sha256()
    for index, target in enumerate(dataset.targets):
        digest.update(f"{target} {Path(dataset.source(index)).name}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]
