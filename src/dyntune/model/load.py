"""Loading a model from the folder of its adapter: the backbone is built, and the adapter put on it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyntune.backbones.hosts import check_arguments, rebuild, wrap_plain
from dyntune.backbones.origin import BackboneSource
from dyntune.core.errors import (
    BackboneError,
    CheckpointError,
    DyntuneError,
    SpecError,
    how_to_install,
    in_one_line,
)
from dyntune.data.transforms import Preprocessing
from dyntune.model.adapter_folder import (
    CARD,
    CONFIG,
    FORMER_CONFIG,
    FORMER_WEIGHTS,
    TRAINER_WEIGHTS,
    WEIGHTS,
    read_config,
    read_weights,
)
from dyntune.model.rates import Calibration, dispatchers
from dyntune.model.tasks import Task, saved_task
from dyntune.model.tuned import TunedModel
from dyntune.parts.registry import as_in_files, expand, part_from_dict, resolve
from dyntune.parts.spec import Part


def load(
    folder: str | Path,
    *,
    backbone: nn.Module | None = None,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    check_backbone: bool = True,
    policy: str | None = None,
    task: Task | None = None,
    tokens: str | None = None,
) -> TunedModel:
    """Builds the backbone of a saved adapter and puts the adapter on; the model comes in eval mode.

    Args:
        folder: what ``save`` wrote.
        backbone: the pretrained model, if it shall not be built from its name; it is adapted in place.
        weights: local weight file of the backbone, for models of transformers or its folder, instead of the source that
            was recorded.
        device: where the model goes.
        check_backbone: refuse a backbone whose weights differ from those that the adapter was trained on.
        policy: a token policy without parameters to put on top, for instance ``"tome:r=8"``. The gates then see other
            tokens than they were calibrated on, so a saved calibration is left out.
        task: what the outputs mean, for an adapter that was trained for another task than classification.
        tokens: the former name of ``policy``.

    Raises:
        CheckpointError: the folder is incomplete, damaged or of a newer format, or does not fit the backbone.
        BackboneError: the backbone cannot be built, or ``policy`` is not defined on the model.
        SpecError: ``policy`` has parameters, which nobody has trained.
    """
    if tokens is not None:
        warnings.warn("load(tokens=...) is now called load(policy=...).", DeprecationWarning, stacklevel=2)
        policy = policy or tokens
    folder = Path(folder)
    if isinstance(backbone, TunedModel):
        raise CheckpointError("backbone is a tuned model already; give the plain model, one for each adapter.")
    config = read_config(folder)
    tensors = read_weights(folder, config)
    try:
        parts = _parts(config)
        recorded = config["backbone"]
        name, arguments = recorded["name"], recorded["arguments"]
        origin = BackboneSource(name, check_arguments(name, arguments), recorded["weights"])
        origin = origin if weights is None else origin.with_weights(weights)
        dtype = {
            str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        }[recorded["dtype"]]
        preprocessing = Preprocessing.from_dict(config["preprocessing"])
        task = saved_task(config.get("task"), task)
        classes = _classes(config)
        calibration = None if config.get("calibration") is None else Calibration.from_dict(config["calibration"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / CONFIG} is not a valid configuration: {error!r}.") from error
    except DyntuneError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    # Full tuning saves every weight, so the pretrained ones need not be had.
    complete = bool(recorded.get("complete"))
    host = (backbone or rebuild(origin, pretrained=not complete)).to(dtype)
    if config.get("peft") is not None:
        host = _with_peft(host, config["peft"], folder)
    extra = resolve([policy]) if policy else ()
    model = TunedModel(host, (*parts, *extra))
    tuned = model.tuned_state() if extra else {}
    untrained = {name for name in tuned if model.backbone.saved_name(name) not in tensors}
    if any(name.partition(".")[0] in ("blocks", "shared") for name in untrained):
        raise SpecError(
            f"{policy} has parameters, which the adapter in {folder} was not trained with. Train it with this policy, "
            "or put on one without parameters (tome, evit)."
        )
    _require_fit(model, tensors, folder)
    if check_backbone and not complete and recorded.get("fingerprint") != model.fingerprint:
        raise CheckpointError(
            f"the adapter in {folder} was trained on other weights of {origin.name or 'its backbone'} than those given "
            f"(fingerprint {recorded.get('fingerprint')}, given {model.fingerprint}), so it would predict wrongly. "
            "Give the weights it was trained on (weights=FILE, --weights FILE or backbone=model), or "
            "check_backbone=False to load it anyway."
        )
    with torch.no_grad():
        for name, tensor in model.saved_state().items():
            tensor.copy_(tensors[name])
    model.origin = origin
    model.preprocessing = preprocessing
    model.task = task
    model.classes = classes
    model.calibration = _fitting(calibration, model, folder) if not extra else None
    return model.to(device).eval()


def from_pretrained(
    place: str | Path, *, revision: str | None = None, token: str | bool | None = None, **options: Any
) -> TunedModel:
    """``load`` from a folder, or from a repository of Hugging Face's hub that ``push_to_hub`` has filled.

    Args:
        place: the folder, or ``owner/name``.
        revision: of the repository.
        token: see ``huggingface_hub``.
        options: as for ``load``.

    Raises:
        CheckpointError: there is no such folder, and the repository cannot be had.
    """
    if Path(place).is_dir():
        return load(place, **options)
    from huggingface_hub import snapshot_download

    files = [CONFIG, WEIGHTS, CARD, FORMER_CONFIG, FORMER_WEIGHTS[0], TRAINER_WEIGHTS]
    try:
        folder = snapshot_download(str(place), revision=revision, token=token, allow_patterns=files)
    except Exception as error:
        # huggingface_hub and the network stack each have their own error types for this.
        raise CheckpointError(
            f"no folder {place}, and no repository of that name can be had: {in_one_line(error)}. Without a network, "
            f"fetch {CONFIG} and {WEIGHTS} of it into a folder elsewhere, and give that."
        ) from error
    return load(folder, **options)


TunedModel.from_pretrained = staticmethod(from_pretrained)


def _fitting(calibration: Calibration | None, model: TunedModel, folder: Path) -> Calibration | None:
    """The calibration, checked to be one of the gates that the model has."""
    gates = dispatchers(model.backbone).keys()
    if calibration is not None and calibration.shifts.keys() != gates:
        wrong = ", ".join(sorted(calibration.shifts.keys() ^ gates)[:5])
        raise CheckpointError(
            f"{folder / CONFIG}: the calibration is not one of this model's gates ({wrong}). Calibrate again (dyntune "
            "calibrate RUN DATA), or remove the entry."
        )
    return calibration


def _with_peft(host: nn.Module, recipe: Any, folder: Path) -> nn.Module:
    """The host with the layers of Hugging Face's PEFT that the adapter was trained with."""
    try:
        from dyntune.backbones.peft import rebuild as with_layers
    except ImportError as error:
        raise CheckpointError(
            f"the adapter in {folder} was trained with layers of PEFT, which is not installed or not complete "
            f"({error}). Install it: {how_to_install('peft')}."
        ) from error
    try:
        return with_layers(host, recipe, wrap_plain)
    except BackboneError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error


def _classes(config: dict[str, Any]) -> tuple[str, ...] | None:
    """The saved class names, or None if there are none."""
    names = config.get("classes")
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"classes must be a list of names; given {names!r}.")
    return tuple(names)


def _parts(config: dict[str, Any]) -> tuple[Part, ...]:
    """The saved parts; under the preset that the user named, as long as it still stands for the same parts."""
    parts = tuple(part_from_dict(part) for part in config["parts"])
    try:
        named = resolve([config["spec"]])
        former = as_in_files(named)
    except (DyntuneError, KeyError):
        return parts
    return next((found for found in (named, former) if expand(found) == parts), parts)


def _require_fit(model: TunedModel, tensors: dict[str, Tensor], folder: Path) -> None:
    """Raises CheckpointError unless the saved tensors are exactly those of the model, by name and shape."""
    own = model.saved_state()
    shapes = {name: (tuple(p.shape), tuple(tensors[name].shape)) for name, p in own.items() if name in tensors}
    problems = [f"missing {name}" for name in sorted(own.keys() - tensors.keys())]
    problems += [f"unexpected {name}" for name in sorted(tensors.keys() - own.keys())]
    problems += [f"{name} is {theirs}, expected {ours}" for name, (ours, theirs) in shapes.items() if ours != theirs]
    head = {model.backbone.saved_name(name) for name in model.backbone.head_parameters()}
    if any(name in problem for problem in problems for name in head):
        biases = (tensors[name] for name in sorted(head) if name in tensors and name.endswith("bias"))
        classes = next((len(bias) for bias in biases), 0)
        problems.insert(0, f"its head has {classes} classes, that of the backbone given {model.backbone.classes}")
    if problems:
        raise CheckpointError(
            f"the adapter in {folder} does not fit the backbone: {'; '.join(problems[:5])}"
            f"{f' and {len(problems) - 5} more' if len(problems) > 5 else ''}."
        )
