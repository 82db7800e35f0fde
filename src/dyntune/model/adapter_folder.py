"""Writing and reading the folder of an adapter: JSON, safetensors and a model card, atomically and strictly.

``dyntune.safetensors`` holds the trained tensors (adapters, dispatchers, head), ``dyntune.json`` all that is needed to
put them on the same backbone again. Nothing is unpickled. Other libraries read files called ``adapter_config.json`` and
fail on one that is not theirs; folders of earlier versions, which have that name, are read as before.

``transformers.Trainer`` writes a file of what ``state_dict`` gives, ``model.safetensors``; a tensor in it is the JSON.
"""

from __future__ import annotations

import hashlib
import reprlib
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from dyntune.backbones.origin import BackboneSource
from dyntune.core.digests import values_digest
from dyntune.core.errors import CheckpointError, in_one_line
from dyntune.core.files import (
    LARGEST_JSON,
    SEAL,
    file_digest,
    parse_json,
    read_json,
    seal_holds,
    sealed,
    write_atomically,
    write_json,
    write_text,
)
from dyntune.core.version import VERSION
from dyntune.model.card import model_card
from dyntune.model.rates import Calibration

FORMAT = 1
CONFIG, WEIGHTS, CARD = "dyntune.json", "dyntune.safetensors", "README.md"
ASKED, STATE = "train.json", "training_state.pt"
"""What a run keeps in its folder beside its adapter: how it began, and where it is."""
PREVIOUS = ".dyntune.previous.safetensors"
TRAINER_WEIGHTS = "model.safetensors"
DESCRIPTION = "dyntune.json"
"""The name of the tensor with the bytes of the JSON among those that a Trainer has saved."""
EXPORTED = "deploy.json"
"""The configuration in a folder of an exported model, which is no adapter."""
FORMER_CONFIG = "adapter_config.json"
FORMER_WEIGHTS = ("adapter_model.safetensors", ".adapter_model.previous.safetensors")


def write_adapter(folder: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Writes the trained tensors, their configuration and a model card.

    The configuration names the weights by their digest, so a folder in which the two do not belong together is noticed.

    Args:
        folder: made if it is not there; an adapter in it is replaced.
        tensors: by name.
        about: the model that they are of, as JSON values.

    Raises:
        CheckpointError: ``folder`` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give a folder to save the adapter in.")
    payload = safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"}
    )
    config = sealed(versioned(about) | {"weights_sha256": hashlib.sha256(payload).hexdigest()})
    card = model_card(config, tensors)  # before anything is replaced
    _replace(folder, payload, config)
    if _is_ours(folder / FORMER_CONFIG):
        for name in (FORMER_CONFIG, *FORMER_WEIGHTS):
            (folder / name).unlink(missing_ok=True)
    if _is_of_trainer(folder / TRAINER_WEIGHTS):
        (folder / TRAINER_WEIGHTS).unlink()
    write_text(folder / CARD, card)


def require_no_run(folder: Path) -> None:
    """Raises CheckpointError where the adapter in a folder is that of a run, which goes on from it."""
    if any((folder / name).exists() for name in (ASKED, STATE)):
        raise CheckpointError(
            f"{folder} holds a run of train or fit, and saving there would replace its adapter. Give another folder; "
            "or overwrite=True, after which the run cannot be resumed."
        )


def versioned(about: dict[str, Any]) -> dict[str, Any]:
    """The configuration of an adapter, but for the digest of its weights: by whom it is written, and what it says."""
    versions = {"dyntune_version": VERSION, "torch_version": torch.__version__}
    return {"library": "dyntune", "format": FORMAT, **versions, **about}


def described(about: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The configuration of an adapter whose tensors stand beside it in one file."""
    return sealed(versioned(about) | {"tensors_sha256": _tensors_digest(tensors)})


def write_calibration(folder: Path, calibration: Calibration) -> None:
    """Puts a calibration into a saved adapter, in place of one that is there; the rest of it stays as it is."""
    write_json(folder / CONFIG, sealed(read_config(folder) | {"calibration": calibration.to_dict()}))


def without_paths(folder: Path) -> bool:
    """Takes out of a saved adapter where on this machine its backbone lies; gives whether it said so."""
    config = read_config(folder)
    recorded = config["backbone"]
    source = BackboneSource(*(recorded[name] for name in ("name", "arguments", "weights", "published")))
    public = source.without_paths()
    if public == source:
        return False
    config = sealed({**config, "backbone": recorded | public.to_dict()})
    write_json(folder / CONFIG, config)
    write_text(folder / CARD, model_card(config, read_weights(folder, config)))
    return True


def _replace(folder: Path, payload: bytes, config: dict[str, Any]) -> None:
    """Puts weights and configuration in place of those in ``folder``; at every moment a whole adapter can be loaded.

    Until the configuration is replaced, it is the old weights that belong to it, so they stay until then.
    """
    weights, previous = folder / WEIGHTS, folder / PREVIOUS
    if weights.is_file() and _belongs(weights.read_bytes(), folder):
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


def _is_ours(path: Path) -> bool:
    """Whether a file is the configuration of an adapter of Dyntune."""
    try:
        return bool(read_json(path, CheckpointError)["library"] == "dyntune")
    except (CheckpointError, KeyError, TypeError):
        return False


def _is_of_trainer(path: Path) -> bool:
    """Whether a file of tensors is one that a Trainer has saved of a tuned model."""
    try:
        return path.is_file() and _description(path) != {}
    except CheckpointError:
        return False


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a saved adapter.

    Raises:
        CheckpointError: there is none, or it is not one of Dyntune's in a format that this version knows.
    """
    names = (CONFIG, FORMER_CONFIG, TRAINER_WEIGHTS)
    path = next((path for name in names if (path := Path(folder) / name).is_file()), None)
    if path is None and (Path(folder) / EXPORTED).is_file():
        raise CheckpointError(
            f"{folder} is an exported model: it has no adapter, and its weights, rate and token policy are fixed. "
            "dyntune predict, dyntune.open_export and its own run.py run it; give the run that it was made from."
        )
    if path is None:
        raise CheckpointError(
            f"no saved adapter in {folder}: {CONFIG} is missing. Give the folder that save() or train wrote."
        )
    config = _description(path) if path.name == TRAINER_WEIGHTS else read_json(path, CheckpointError)
    if not isinstance(config, dict) or config.get("library") != "dyntune":
        other = " (it may be an adapter of PEFT, which peft.PeftModel.from_pretrained reads)"
        raise CheckpointError(f"{path} was not written by Dyntune{other if path.name == FORMER_CONFIG else ''}.")
    if type(config.get("format")) is not int or not 1 <= config["format"] <= FORMAT:
        raise CheckpointError(
            f"{path} has format {reprlib.repr(config.get('format'))}; this Dyntune reads up to {FORMAT}. "
            "Upgrade Dyntune."
        )
    return config


def require_unchanged(folder: Path, config: dict[str, Any]) -> None:
    """Raises CheckpointError where a configuration is not the one that was written."""
    if not seal_holds(config):
        raise CheckpointError(
            f"{folder / CONFIG} is not as it was written (digests differ). Copy the folder again; or, if you have "
            f'changed it on purpose, remove its entry "{SEAL}".'
        )


def _description(path: Path) -> Any:
    """The JSON in a file of tensors that a Trainer has written; an empty object without any."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            if DESCRIPTION not in file.keys():  # noqa: SIM118  it is no mapping
                return {}
            part = file.get_slice(DESCRIPTION)
            if part.get_dtype() != "U8" or len(part.get_shape()) != 1 or part.get_shape()[0] > LARGEST_JSON:
                raise ValueError(f"{DESCRIPTION} is no text")
            return parse_json(file.get_tensor(DESCRIPTION).numpy().tobytes())
    except (ValueError, OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {in_one_line(error)}.") from error


def read_weights(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a saved adapter that belong to its configuration.

    Raises:
        CheckpointError: there are none.
    """
    if "weights_sha256" not in config and (folder / TRAINER_WEIGHTS).is_file():
        tensors = _tensors((folder / TRAINER_WEIGHTS).read_bytes(), folder / TRAINER_WEIGHTS)
        del tensors[DESCRIPTION]
        if config.get("tensors_sha256", _ANY) not in (_ANY, _tensors_digest(tensors)):
            raise CheckpointError(f"{folder / TRAINER_WEIGHTS} is damaged (digests differ). Copy the folder again.")
        return tensors
    if "weights_sha256" in config and _is_of_trainer(folder / TRAINER_WEIGHTS):
        raise CheckpointError(
            f"{folder} holds two adapters: that of save(), {CONFIG} and {WEIGHTS}, and one that a Trainer has saved "
            f"since, {TRAINER_WEIGHTS}. Move the one that you do not mean to another folder."
        )
    files = [folder / name for name in (WEIGHTS, PREVIOUS, *FORMER_WEIGHTS)]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder} is incomplete: {WEIGHTS} is missing.")
    # The digest is computed piece by piece: a file of any size that is not meant takes no memory.
    named = (file for file in files if file.is_file() and file_digest(file) == config.get("weights_sha256"))
    whole = next(named, None)
    if whole is None:
        raise CheckpointError(
            f"{path} is damaged or does not belong to {CONFIG} (digests differ). Copy the folder again."
        )
    return _tensors(whole.read_bytes(), whole)


_ANY = object()


def _tensors(payload: bytes, path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(payload)
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {in_one_line(error)}.") from error


def _tensors_digest(tensors: dict[str, Tensor]) -> str:
    return values_digest(dict(sorted(tensors.items())))
