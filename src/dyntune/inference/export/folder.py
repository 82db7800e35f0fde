"""The folder of an exported model, as it is read: strictly, and without running any code that lies in it."""

from __future__ import annotations

import logging
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dyntune.core.errors import DataError, ExportError, in_one_line
from dyntune.core.files import SEAL, file_digest, read_json, seal_holds
from dyntune.core.words import counted
from dyntune.data.transforms import Preprocessing
from dyntune.inference.export.registry import lookup, registered
from dyntune.inference.export.runtimes.base import Session
from dyntune.model.adapter_folder import CONFIG as RUN
from dyntune.model.adapter_folder import EXPORTED

CONFIG = EXPORTED
FORMAT = 1

log = logging.getLogger("dyntune")


@dataclass(frozen=True)
class OpenedModel:
    """An exported model, opened in its runtime.

    Args:
        config: what ``deploy.json`` holds.
        session: of the runtime, with the model in it.
        preprocessing: what images must go through.
        classes: names of the classes in label order, or None if not known.
    """

    config: dict[str, Any]
    session: Session
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None

    @property
    def spec(self) -> str:
        """The spec of the tuned model that it was made from."""
        return str(self.config["spec"])

    @property
    def gates(self) -> tuple[str, ...]:
        """The gated units, by path, in the order of the masks; empty if the model gives none."""
        return tuple(self.config["gates"])

    def __call__(self, images: Tensor) -> Tensor:
        """Images ``(B, 3, height, width)``, preprocessed, to logits ``(B, classes)``."""
        return self.run(images)[0]

    def run(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and which patches each gated unit computed, ``(B, gates, patches)``; None if not exported.

        Raises:
            ExportError: the images are not such as the model takes, or it has other outputs than it has classes.
        """
        logits, masks = self.session.run(images)
        if self.classes is not None and logits.shape[-1] != len(self.classes):
            raise ExportError(
                f"the exported model has {counted(logits.shape[-1], 'output')}, but {CONFIG} names "
                f"{counted(len(self.classes), 'class')}. Get the folder again from who made it."
            )
        return logits, masks


def is_exported(folder: Path) -> bool:
    """Whether ``folder`` is one that ``export`` made."""
    return (folder / CONFIG).is_file()


def open_export(folder: str | Path, threads: int | None = None, *, trust: bool = False) -> OpenedModel:
    """Opens an exported model.

    Args:
        folder: what ``dyntune.export`` or the command ``dyntune export`` made.
        threads: that the runtime may use; None for as many as it takes by itself.
        trust: whether you trust who made the folder: PyTorch's ``.pt2`` files may run code when they are opened, those
            of ONNX Runtime and OpenVINO hold a graph and numbers alone.

    Raises:
        ExportError: the folder is incomplete, damaged or of a newer format, its runtime is not installed, or it needs
            ``trust``.
    """
    folder = Path(folder)
    config = read_config(folder)
    try:
        runtime = lookup(config["runtime"]).from_config(config)
        preprocessing = Preprocessing.from_dict(config["preprocessing"])
        classes = None if config["classes"] is None else tuple(config["classes"])
        digests = {str(name): str(digest) for name, digest in config["files"].items()}
        warning = runtime.warning(config)
        texts = [config["spec"], *config["gates"], *(classes or ())]
        if not isinstance(config["gates"], list) or not all(isinstance(text, str) for text in texts):
            raise TypeError("spec must be a text, and gates a list of texts, as classes")
        if not isinstance(config["classes"], list | None):
            raise TypeError("classes must be a list of texts")
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise ExportError(f"{folder / CONFIG}: {error}") from error
        raise ExportError(
            f"{folder / CONFIG} is not a valid configuration: {type(error).__name__}: {in_one_line(error)}."
        ) from error
    except ExportError as error:
        raise ExportError(
            f"{folder / CONFIG} is not a valid configuration here: {error} Install what brings the runtime."
        ) from error
    if runtime.needs_trust and not trust:
        free = " and ".join(name for name, other in registered().items() if not other.needs_trust)
        raise ExportError(
            f"{folder} holds a {Path(runtime.file).suffix} file, which may run code when it is opened. If you trust "
            "who made it, say so: open_export(folder, trust=True), dyntune predict FOLDER IMAGES --trust. "
            f"Folders for {free} need none."
        )
    _check_files(folder, digests, runtime.file)
    if not seal_holds(config):
        raise ExportError(
            f"{folder / CONFIG} is not as it was written (digests differ). Copy the folder again; or, if you have "
            f'changed it on purpose, remove its entry "{SEAL}".'
        )
    if warning:
        log.warning("%s %s", folder, warning)
    return OpenedModel(config, runtime.open(folder / runtime.file, threads), preprocessing, classes)


def read_config(folder: Path) -> dict[str, Any]:
    """What ``deploy.json`` holds.

    Raises:
        ExportError: there is none, or it is not one of Dyntune's in a format that this version knows.
    """
    path = folder / CONFIG
    if not path.is_file() and (folder / RUN).is_file():
        raise ExportError(
            f"{folder} is a run, which dyntune.load reads. Export it first: dyntune export {folder} --out FOLDER."
        )
    if not path.is_file():
        raise ExportError(
            f"no exported model in {folder}: {CONFIG} is missing. Give a folder that dyntune export wrote."
        )
    config = read_json(path, ExportError)
    if not isinstance(config, dict) or config.get("library") != "dyntune":
        raise ExportError(f"{path} was not written by Dyntune.")
    if type(config.get("format")) is not int or not 1 <= config["format"] <= FORMAT:
        raise ExportError(
            f"{path} has format {reprlib.repr(config.get('format'))}; this Dyntune reads 1 to {FORMAT}. "
            "If it is higher, upgrade Dyntune."
        )
    return config


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in ``folder``, by name."""
    return {path.name: file_digest(path) for path in sorted(folder.iterdir())}


def _check_files(folder: Path, recorded: dict[str, str], model: str) -> None:
    wrong = [
        name
        for name, digest in recorded.items()
        if Path(name).name != name or not (folder / name).is_file() or file_digest(folder / name) != digest
    ]
    if model not in recorded:
        wrong.append(model)
    if wrong:
        raise ExportError(
            f"{folder} is damaged: {', '.join(wrong)} is missing or differs from what {CONFIG} says. Copy it again."
        )
