"""The errors that a user can cause and mend; each message says what was given, what was expected and what to do."""

import difflib
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

_LONGEST = 300
"""Characters of a library's message that are quoted."""


EXTRAS = {
    "hfds": ("datasets",),
    "wds": ("webdataset",),
    "search": ("optuna",),
    "peft": ("peft",),
    "hf": ("transformers",),
    "video": ("av",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "openvino": ("openvino", "nncf"),
}
"""What is not needed for training and running, by the extra of pyproject.toml, and the packages that it brings."""


class DyntuneError(Exception):
    """Base of every error that Dyntune raises on purpose; the command line prints it as one message, exit status 1."""


class SpecError(DyntuneError, ValueError):
    """A method or token policy was named or configured wrongly."""


class BackboneError(DyntuneError, ValueError):
    """A backbone is not supported, cannot be built, or its weights do not fit."""


class CheckpointError(DyntuneError, ValueError):
    """A saved adapter or run cannot be read or does not fit what it is put on."""


class DataError(DyntuneError, ValueError):
    """A data set, an image or a file list is missing or malformed."""


class TrainingError(DyntuneError, RuntimeError):
    """Training cannot begin or go on."""


class DivergenceError(TrainingError):
    """Training has diverged: the loss, or a tensor that is trained, is not finite."""


class ExportError(DyntuneError, RuntimeError):
    """A model cannot be exported, quantised, checked, or run in a runtime."""


class MachineError(DyntuneError, RuntimeError):
    """The machine is at a limit: no room on a disk, in memory or in shared memory, or too few files may be open."""


def in_one_line(error: BaseException) -> str:
    """What a library has to say, fit for the middle of a sentence: its reason alone, without reports and advice.

    The reason is the first paragraph of the error that caused all others.
    """
    while error.__cause__ is not None and str(error.__cause__).strip():
        error = error.__cause__
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()  # some libraries colour their messages
    words = " ".join(plain.split("\n\n")[0].split()).rstrip(" .") or type(error).__name__
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST].rstrip()} ..."


def how_to_install(extra: str) -> str:
    """The command that brings an extra. Dyntune is on no package index, so nobody is told to look for it on one."""
    return f"pip install {' '.join(EXTRAS[extra])}, or in a checkout of Dyntune pip install -e '.[{extra}]'"


def unknown_name(kind: str, given: str, known: Iterable[str], elsewhere: Mapping[str, str] | None = None) -> str:
    """Words for "there is no such name": what was given, the nearest valid name, and all valid names.

    Args:
        kind: what the name stands for, for instance ``"tuning method"``.
        given: the name as the user wrote it.
        known: the valid names.
        elsewhere: what is called otherwise in other libraries: their name, and ours, or several of ours separated by
            commas, of which the first valid one is meant; behind a colon, what else there is to know.
    """
    names = sorted(known)
    ours, _, note = (elsewhere or {}).get(given, "").partition(":")
    meant = [name for name in ours.split(",") if name in names]
    near = meant or difflib.get_close_matches(given, names, n=1)
    aside = f" ({note.strip()})" if meant and note else ""
    hint = f" Did you mean {near[0]!r}{aside}?" if near else ""
    return f"unknown {kind} {given!r}.{hint} Known: {', '.join(names)}."


def __getattr__(name: str) -> Any:
    """``ExportError`` had another name before."""
    if name == "DeploymentError":
        warnings.warn("DeploymentError is now called ExportError.", DeprecationWarning, stacklevel=2)
        return ExportError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
