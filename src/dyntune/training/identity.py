"""What decides the outcome of a run, so that resuming another one is noticed."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from dyntune.core.digests import sample, values_digest
from dyntune.core.files import load_json
from dyntune.core.words import counted
from dyntune.data.base import LabelledImages
from dyntune.data.others import Samples
from dyntune.model.adapter_folder import ASKED
from dyntune.model.tuned import TunedModel
from dyntune.parts.policies.base import learners
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
    val_set: Dataset[Any] | None = None,
) -> dict[str, Any]:
    """Settings, parts, backbone, data and teacher of a run as plain values.

    Args:
        model: that is trained.
        settings: of the training.
        train_set: what it is trained on.
        processes: that train it together.
        teacher: it learns from; None without one.
        val_set: what picks the epoch; None where it is the last.
    """
    return {
        "settings": dataclasses.asdict(settings),
        "spec": model.spec,
        "parts": [part.settled().to_dict() for part in expand(model.parts)],
        "backbone": model.backbone_name,
        "architecture": hashlib.sha256(str(model.backbone.host).encode()).hexdigest()[:16],
        "weights": model.fingerprint,
        "changed_weights": _digest_of_changed(model),
        "task": model.task.name,
        "classes": model.classes,
        "preprocessing": model.preprocessing.to_dict(),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "train_images": len(train_set),  # type: ignore[arg-type]
        "data": _data_digest(train_set),
        "val_images": 0 if val_set is None else len(val_set),  # type: ignore[arg-type]
        "val_data": None if val_set is None else _data_digest(val_set),
        "teacher": teacher_identity(teacher if learners(model.policies) else None),
    }


def identity_changes(
    before: dict[str, Any], now: dict[str, Any], done: int | None = None, steps: int = 1, follows_length: bool = False
) -> list[str]:
    """What differs between two identities, in words; settings that do not touch the weights may differ.

    So may how the images of a step are shared out among processes; and the length of the training, where the steps that
    are done would have had the same learning rates. What an older run did not record cannot be compared.

    Args:
        before: of the run.
        now: of that which shall go on with it.
        done: steps that the run has done; None where nothing tells.
        steps: of an epoch.
        follows_length: whether something in the model follows how far the training is, so that its length must not
            change.
    """
    settings, former = TrainSettings(**now["settings"]), before["settings"]
    free: set[str] = set()
    images = [run["settings"].get("batch_size", 0) * run.get("processes", 1) for run in (before, now)]
    if images[0] == images[1]:
        free.add("batch_size")
    if done is not None and not follows_length and _same_rates(former, settings, done, steps):
        free |= {"epochs", "warmup_epochs", "cooldown_epochs"}
    changed = settings.differences(former, free)
    if done and any(change.startswith("epochs ") for change in changed):
        changed.append(_longer(former, settings, follows_length))
    parts = _parts(before)
    if parts != _parts(now):
        changed.append(f"spec was {before['spec']}, is {now['spec']}")
        if before["spec"] == now["spec"]:
            meant = "+".join(map(format_spec, parts))
            changed[-1] += f", which stands for something else in this version: the run needs {meant}"
    left_out = {"settings", "spec", "parts", "threads"} | ({"processes"} if "batch_size" in free else set())
    for key, value in now.items():
        old = before.get(key, value)
        if key in left_out or old == value or (key in ("data", "val_data") and old is None):
            continue
        if key == "val_data" and before.get("val_images") != now["val_images"]:
            continue  # which says it
        if key == "changed_weights":
            changed.append("frozen weights of the backbone have been changed after tune(), or no longer are")
            continue
        changed.append(f"{key} was {old}, is {value}")
        if key in ("data", "val_data"):
            changed[-1] += (
                " (images were added, removed or renamed, or an earlier version has split their folder in another way)"
            )
    if "processes" in before and before["processes"] != now["processes"] and "processes" not in left_out:
        share, rest = divmod(images[0], now["processes"])
        if not rest:
            changed.append(f"a step of the run has {counted(images[0], 'image')}: with batch_size={share} it goes on")
    return changed


def _same_rates(former: dict[str, Any], now: TrainSettings, done: int, steps: int) -> bool:
    """Whether the steps that are done would have had the learning rates that they had, and there are not too many."""
    before = _settings_of(former)
    if done > now.epochs * steps:
        return False
    looked_at = range(0, done, max(1, done // 10_000))
    return all(
        math.isclose(before.learning_rate(step / steps, steps), now.learning_rate(step / steps, steps), rel_tol=1e-9)
        for step in looked_at
    )


def _settings_of(former: dict[str, Any]) -> TrainSettings:
    """The settings that a run recorded, without those that are no more."""
    known = {field.name for field in dataclasses.fields(TrainSettings)}
    return TrainSettings(**{name: value for name, value in former.items() if name in known})


def _longer(former: dict[str, Any], now: TrainSettings, follows_length: bool) -> str:
    """What is said to those who want another length."""
    if follows_length:
        return "what the model learns follows the length of the training, so that another one needs a run of its own"
    before = _settings_of(former)
    more = now.epochs - before.epochs
    if more <= 0:
        return "the epochs that are done would have had other learning rates"
    return (
        "the epochs that are done would have had other learning rates; more of them go on at the last one with "
        f"cooldown_epochs={before.cooldown_epochs + more}, warmup_epochs={before.warmup:g}"
    )


def began_with(folder: Path) -> int | None:
    """The number of threads that the run in a folder began with; None where there is none, or it says nothing."""
    try:
        threads = load_json(folder / ASKED)["threads"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return threads if type(threads) is int and threads > 0 else None


_STEADY = {
    "quiet": 0.85,
    "lead": None,
    "spread": None,
    "rate_weight": 10.0,
    "complete_during": (0.0, 1.0),
    "feature_weight": 0.0,
    "surrogate": None,
}
"""What the recipe steady chose otherwise when runs recorded its name and not its values, or did not know an option."""


def _parts(identity: dict[str, Any]) -> list[Part]:
    """The parts of a run; of one that recorded its spec alone, what that stood for."""
    if "parts" not in identity:
        return [part.settled() for part in expand(as_in_files(resolve([identity["spec"]])))]
    parts = []
    for part in identity["parts"]:
        left = part.get("recipe") == "steady"
        former = {name: value for name, value in _STEADY.items() if left and part.get(name, "recipe") == "recipe"}
        parts.append(part_from_dict(part | former).settled())
    return parts


def _digest_of_changed(model: TunedModel) -> str | None:
    """Tells what somebody has made of frozen weights since ``tune``, which the fingerprint is older than."""
    extra = sorted(model.extra_state().items())
    frozen = {name: p.detach() for name, p in extra if isinstance(p, nn.Parameter) and not p.requires_grad}
    return values_digest(frozen)[:16] if frozen else None


def _data_digest(dataset: Dataset[Any]) -> str | None:
    """Tells two data sets apart by the labels and file names of their images; None for data sets of another kind.

    Those of tensors by all labels, and some values of the images.
    """
    held = dataset.data if isinstance(dataset, Samples) else dataset
    if isinstance(held, TensorDataset):
        first, *others = held.tensors
        return values_digest([list(first.shape), sample(first), *others])[:16]
    if not isinstance(dataset, LabelledImages):
        return None
    digest = hashlib.sha256()
    for index, target in enumerate(dataset.targets):
        digest.update(f"{target} {Path(dataset.source(index)).name}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]
