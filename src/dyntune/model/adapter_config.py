"""What the configuration of a saved adapter says, read strictly, and checked against its tensors and its backbone."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyntune.backbones.base import Backbone
from dyntune.backbones.hosts import check_arguments
from dyntune.backbones.origin import BackboneSource
from dyntune.core.errors import CheckpointError, DyntuneError, in_one_line
from dyntune.core.texts import listed
from dyntune.core.words import counted
from dyntune.data.transforms import Preprocessing
from dyntune.model.adapter_folder import CONFIG
from dyntune.model.rates import Calibration, dispatchers
from dyntune.model.state import fitted_tensors, kept_buffers
from dyntune.model.tasks import Task, saved_task
from dyntune.parts.policies.base import Searching
from dyntune.parts.registry import as_in_files, expand, part_from_dict, resolve
from dyntune.parts.spec import Part

_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


@dataclass(frozen=True)
class AdapterConfig:
    """What the configuration of a saved adapter says.

    Args:
        parts: tuning methods, token policies and presets.
        origin: what builds the backbone.
        complete: whether every weight of the backbone is among the tensors.
        fingerprint: of the backbone.
        dtype: of its weights.
        extra: tensors that are saved beside those of the methods, and whether a gradient trains them.
        peft: what builds the layers of PEFT, as JSON values.
        preprocessing: what images go through.
        task: what the outputs mean.
        classes: names of the classes.
        calibration: thresholds for other rates.
    """

    parts: tuple[Part, ...]
    origin: BackboneSource
    complete: bool
    fingerprint: str | None
    dtype: torch.dtype
    extra: dict[str, bool]
    peft: Any
    preprocessing: Preprocessing
    task: Task
    classes: tuple[str, ...] | None
    calibration: Calibration | None

    @classmethod
    def of(cls, folder: Path, config: dict[str, Any], task: Task | None) -> AdapterConfig:
        """Reads a configuration.

        Raises:
            CheckpointError: an entry is missing, or is none that ``save`` writes.
        """
        try:
            recorded = config["backbone"]
            name, weights = recorded["name"], recorded["weights"]
            if not all(text is None or isinstance(text, str) for text in (name, weights, recorded["fingerprint"])):
                raise TypeError("the name, weights and fingerprint of the backbone must be texts")
            extra = config.get("extra", {})
            if not isinstance(extra, dict) or not all(type(trained) is bool for trained in extra.values()):
                raise TypeError("extra must say for each tensor whether it is trained")
            return cls(
                parts=_parts(config),
                origin=BackboneSource(
                    name,
                    check_arguments(name, recorded["arguments"]),
                    weights,
                    # Before it was looked into, weights without a file were taken for the published ones.
                    recorded.get("published", weights is None) is True,
                ),
                complete=recorded.get("complete") is True,
                fingerprint=recorded["fingerprint"],
                dtype=_DTYPES[recorded["dtype"]],
                extra=extra,
                peft=config.get("peft"),
                preprocessing=Preprocessing.from_dict(config["preprocessing"]),
                task=saved_task(config.get("task"), task),
                classes=_classes(config),
                calibration=None if config.get("calibration") is None else Calibration.from_dict(config["calibration"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            if isinstance(error, DyntuneError):
                raise CheckpointError(f"{folder / CONFIG}: {error}") from error
            raise CheckpointError(
                f"{folder / CONFIG} is not a valid configuration: {type(error).__name__}: {in_one_line(error)}."
            ) from error

    def check(self, backbone: Backbone, tensors: dict[str, Tensor], folder: Path) -> None:
        """Checks configuration and tensors against each other and against the backbone with the parts on it.

        Args:
            backbone: with or without content.
            tensors: by name.
            folder: where they were read.

        Raises:
            CheckpointError: they are not of one model, or a number is not finite.
        """
        file = folder / CONFIG
        held = {backbone.saved_name(name): p for name, p in chain(backbone.named_parameters(), kept_buffers(backbone))}
        unknown = self.extra.keys() - held.keys()
        if unknown:
            raise CheckpointError(f"{file}: extra names tensors that the model lacks: {listed(sorted(unknown))}.")
        trained = {backbone.saved_name(name): p for name, p in backbone.named_parameters() if p.requires_grad}
        companions = {backbone.saved_name(name): tensor for name, tensor in backbone.companions().items()}
        fitted = {backbone.saved_name(name): tensor for name, tensor in fitted_tensors(backbone).items()}
        own = trained | fitted | companions | {name: held[name] for name in self.extra}
        _require_fit(backbone, own, tensors, folder)
        parameters = backbone.names_of_all() if self.complete else set()
        if not parameters <= tensors.keys():
            gone = listed(sorted(parameters - tensors.keys()))
            raise CheckpointError(
                f"{file} says that every weight of the backbone is saved, but {gone} are not. Get the folder again "
                "from who made it."
            )
        if self.classes is not None and backbone.classes not in (0, len(self.classes)):
            raise CheckpointError(
                f"{file} names {counted(len(self.classes), 'class')}, but the head has "
                f"{counted(backbone.classes, 'output')}. Give as many "
                "names, or none (null)."
            )
        gates = dispatchers(backbone).keys()
        if self.calibration is not None and self.calibration.shifts.keys() != gates:
            wrong = listed(sorted(self.calibration.shifts.keys() ^ gates))
            raise CheckpointError(
                f"{file}: the calibration is not one of this model's gates ({wrong}). Calibrate again (dyntune "
                "calibrate RUN DATA), or remove the entry."
            )
        for name, tensor in tensors.items():
            if tensor.is_floating_point() != own[name].is_floating_point():
                raise CheckpointError(f"{folder}: {name} is of {tensor.dtype}, expected {own[name].dtype}.")
            if not bool(tensor.to(own[name].dtype).isfinite().all()):
                raise CheckpointError(
                    f"{folder}: {name} has values that are not finite in {own[name].dtype}, so the model would predict "
                    "nothing. Take a checkpoint from before the step that spoilt it."
                )


def _classes(config: dict[str, Any]) -> tuple[str, ...] | None:
    """The saved class names, or None if there are none."""
    names = config.get("classes")
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"classes must be a list of names; given {reprlib.repr(names)}.")
    return tuple(names)


def _parts(config: dict[str, Any]) -> tuple[Part, ...]:
    """The saved parts; under the preset that the user named, as long as it still stands for the same parts."""
    parts = tuple(part_from_dict(part) for part in config["parts"])
    for part in parts:
        if isinstance(part, Searching):
            raise CheckpointError(f"{part.name()} is no part of a saved model, which says what it has found.")
    try:
        named = resolve([config["spec"]])
        former = as_in_files(named)
    except (DyntuneError, KeyError):
        return parts
    return next((found for found in (named, former) if expand(found) == parts), parts)


def _require_fit(backbone: Backbone, own: dict[str, Tensor], tensors: dict[str, Tensor], folder: Path) -> None:
    """Raises CheckpointError unless the saved tensors are exactly those of the model, by name and shape."""
    shapes = {name: (tuple(p.shape), tuple(tensors[name].shape)) for name, p in own.items() if name in tensors}
    problems = [f"missing {name}" for name in sorted(own.keys() - tensors.keys())]
    problems += [f"unexpected {name}" for name in sorted(tensors.keys() - own.keys())]
    problems += [f"{name} is {theirs}, expected {ours}" for name, (ours, theirs) in shapes.items() if ours != theirs]
    head = {backbone.saved_name(name) for name in backbone.head_parameters()}
    if any(name in problem for problem in problems for name in head):
        biases = (tensors[name] for name in sorted(head) if name in tensors and name.endswith("bias"))
        classes = next((len(bias) for bias in biases if bias.ndim), 0)
        problems.insert(0, f"its head has {counted(classes, 'class')}, that of the backbone given {backbone.classes}")
    if problems:
        raise CheckpointError(
            f"the adapter in {folder} does not fit the backbone: {'; '.join(problems[:5])}"
            f"{f' and {len(problems) - 5} more' if len(problems) > 5 else ''}."
        )
