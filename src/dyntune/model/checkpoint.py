"""Saved adapters: a folder with JSON, safetensors and a model card, written atomically and read strictly.

``adapter_model.safetensors`` holds the trained tensors (adapters, dispatchers, head), ``adapter_config.json`` all that
is needed to put them on the same backbone again. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import dyntune
from dyntune.backbones.source import BackboneSource, check_arguments
from dyntune.core.errors import BackboneError, CheckpointError, DyntuneError, SpecError
from dyntune.core.files import write_atomically, write_json, write_text
from dyntune.data.transforms import Preprocessing
from dyntune.model.card import model_card
from dyntune.model.rates import Calibration, dispatchers
from dyntune.model.tasks import Task, saved_task
from dyntune.model.tuned import TunedModel
from dyntune.parts.registry import expand, part_from_dict, resolve
from dyntune.parts.spec import Part

FORMAT = 1
CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
PREVIOUS = ".adapter_model.previous.safetensors"


def save(model: TunedModel, folder: Path, results: dict[str, Any] | None = None) -> Path:
    """Writes the trained tensors, their configuration and a model card.

    The configuration names the weights by their digest, so a folder in which the two do not belong together is noticed.

    Args:
        model: any tuned model.
        folder: made if it is not there; an adapter in it is replaced.
        results: measured figures to keep with the adapter, for instance ``{"val_accuracy": 0.93}``.

    Returns:
        ``folder``.
    """
    if model.unmerged is not None:
        raise CheckpointError(
            "the model is merged: its adapter is part of the backbone's weights now. Save it before merging, or save "
            "the whole model with safetensors.torch.save_model(model.backbone.host, FILE)."
        )
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give a folder to save the adapter in.")
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.saved_state().items()}
    payload = safetensors.torch.save(tensors, metadata={"format": "pt"})
    config = {
        "library": "dyntune",
        "format": FORMAT,
        "dyntune_version": dyntune.__version__,
        "torch_version": torch.__version__,
        "spec": model.spec,
        "parts": [part.to_dict() for part in expand(model.parts)],
        "backbone": {
            **model.origin.to_dict(),
            "fingerprint": model.fingerprint,
            "dtype": str(next(model.backbone.parameters()).dtype).removeprefix("torch."),
            "complete": tensors.keys() == dict(model.backbone.named_parameters()).keys(),
        },
        "peft": model.backbone.recipe(),
        "preprocessing": model.preprocessing.to_dict(),
        "task": model.task.name,
        "classes": model.classes,
        "results": results or {},
        "calibration": model.calibration and model.calibration.to_dict(),
        "weights_sha256": hashlib.sha256(payload).hexdigest(),
    }
    _replace(folder, payload, config)
    write_text(folder / CARD, model_card(config, tensors))
    return folder


def load(
    folder: str | Path,
    *,
    backbone: nn.Module | None = None,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    check_backbone: bool = True,
    tokens: str | None = None,
    task: Task | None = None,
) -> TunedModel:
    """Builds the backbone of a saved adapter and puts the adapter on; the model comes in eval mode.

    Args:
        folder: what ``save`` wrote.
        backbone: the pretrained model, if it shall not be built from its timm name; it is adapted in place.
        weights: local weight file of the backbone, instead of the source that was recorded.
        device: where the model goes.
        check_backbone: refuse a backbone whose weights differ from those that the adapter was trained on.
        tokens: a token policy without parameters to put on top, for instance ``"tome:r=8"``. The gates then see other
            tokens than they were calibrated on, so a saved calibration is left out.
        task: what the outputs mean, for an adapter that was trained for another task than classification.

    Raises:
        CheckpointError: the folder is incomplete, damaged or of a newer format, or does not fit the backbone.
        BackboneError: the backbone cannot be built, or ``tokens`` is not defined on the model.
        SpecError: ``tokens`` has parameters, which nobody has trained.
    """
    folder = Path(folder)
    if isinstance(backbone, TunedModel):
        raise CheckpointError("backbone is a tuned model already; give the plain timm model, one for each adapter.")
    config = read_config(folder)
    tensors = _read_weights(folder, config)
    try:
        parts = _parts(config)
        recorded = config["backbone"]
        origin = BackboneSource(recorded["name"], check_arguments(recorded["arguments"]), recorded["weights"])
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
    host = (backbone or origin.build(pretrained=not complete)).to(dtype)
    if config.get("peft") is not None:
        host = _with_peft(host, config["peft"], folder)
    extra = resolve([tokens]) if tokens else ()
    model = TunedModel(host, (*parts, *extra))
    untrained = model.tuned_state().keys() - tensors.keys() if extra else set()
    if any(name.partition(".")[0] in ("blocks", "shared") for name in untrained):
        raise SpecError(
            f"{tokens} has parameters, which the adapter in {folder} was not trained with. Train it with this policy, "
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


def write_calibration(folder: Path, calibration: Calibration) -> None:
    """Puts a calibration into a saved adapter, in place of one that is there; the rest of it stays as it is."""
    write_json(folder / CONFIG, read_config(folder) | {"calibration": calibration.to_dict()})


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
        from dyntune.backbones.peft import rebuild
    except ImportError as error:
        raise CheckpointError(
            f"the adapter in {folder} was trained with layers of PEFT, which is not installed or not complete "
            f"({error}). Install it: pip install 'dyntune[peft]'."
        ) from error
    try:
        return rebuild(host, recipe)
    except BackboneError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error


def _replace(folder: Path, payload: bytes, config: dict[str, Any]) -> None:
    """Puts weights and configuration in place of those in ``folder``; at every moment a whole adapter can be loaded.

    Until the configuration is replaced, it is the old weights that belong to it, so they stay until then.
    """
    weights, previous = folder / WEIGHTS, folder / PREVIOUS
    if weights.exists() and _belongs(weights.read_bytes(), folder):
        write_atomically(previous, lambda path: shutil.copyfile(weights, path))
    try:
        write_atomically(weights, lambda path: path.write_bytes(payload))
        write_json(folder / CONFIG, config)
    except BaseException:
        if previous.exists():
            previous.replace(weights)
        raise
    previous.unlink(missing_ok=True)


def _belongs(payload: bytes, folder: Path) -> bool:
    """Whether the configuration in ``folder`` names these weights."""
    try:
        return hashlib.sha256(payload).hexdigest() == read_config(folder).get("weights_sha256")
    except CheckpointError:
        return False


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a saved adapter.

    Raises:
        CheckpointError: there is none, or it is not one of Dyntune's in a format that this version knows.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"no saved adapter in {folder}: {CONFIG} is missing. Give the folder that save() or train wrote."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(config, dict) or config.get("library") != "dyntune":
        raise CheckpointError(f"{path} was not written by Dyntune (a PEFT adapter has the same file names).")
    if not isinstance(config.get("format"), int) or config["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {config.get('format')!r}; this Dyntune reads up to {FORMAT}. Upgrade Dyntune."
        )
    return config


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
    except (DyntuneError, KeyError):
        return parts
    return named if expand(named) == parts else parts


def _read_weights(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{folder} is incomplete: {WEIGHTS} is missing.")
    payloads = [file.read_bytes() for file in (path, folder / PREVIOUS) if file.is_file()]
    payload = next((p for p in payloads if hashlib.sha256(p).hexdigest() == config.get("weights_sha256")), None)
    if payload is None:
        raise CheckpointError(
            f"{path} is damaged or does not belong to {CONFIG} (digests differ). Copy the folder again."
        )
    try:
        return safetensors.torch.load(payload)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}.") from error


def _require_fit(model: TunedModel, tensors: dict[str, Tensor], folder: Path) -> None:
    """Raises CheckpointError unless the saved tensors are exactly those of the model, by name and shape."""
    own = model.saved_state()
    shapes = {name: (tuple(p.shape), tuple(tensors[name].shape)) for name, p in own.items() if name in tensors}
    problems = [f"missing {name}" for name in sorted(own.keys() - tensors.keys())]
    problems += [f"unexpected {name}" for name in sorted(tensors.keys() - own.keys())]
    problems += [f"{name} is {theirs}, expected {ours}" for name, (ours, theirs) in shapes.items() if ours != theirs]
    if any("host.head" in problem for problem in problems):
        biases = (t for name, t in tensors.items() if name.startswith("host.head.") and name.endswith("bias"))
        classes = next((len(bias) for bias in biases), 0)
        problems.insert(0, f"its head has {classes} classes, that of the backbone given {model.backbone.classes}")
    if problems:
        raise CheckpointError(
            f"the adapter in {folder} does not fit the backbone: {'; '.join(problems[:5])}"
            f"{f' and {len(problems) - 5} more' if len(problems) > 5 else ''}."
        )
