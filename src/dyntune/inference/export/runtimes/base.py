"""The interface of a runtime: what it is, what it writes, and the session in which it opens what it has written."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.export import ExportedProgram

from dyntune.core.discovery import named
from dyntune.core.errors import ExportError, in_one_line
from dyntune.inference.export.linears import BackboneLinears

FP32 = "fp32"
"""The precision that every runtime offers, and in which it gives the model's logits but for rounding."""


class Session(abc.ABC):
    """An exported model, opened in its runtime."""

    def __call__(self, images: Tensor) -> Tensor:
        """Images ``(B, 3, height, width)``, preprocessed, to logits ``(B, classes)``."""
        return self.run(images)[0]

    def run(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and which patches each gated unit computed, bool, ``(B, gates, patches)``; None if not exported.

        Raises:
            ExportError: the images are not such as the model takes: on the CPU, in fp32 and of its size.
        """
        given = f"images {tuple(images.shape)} in {images.dtype} on {images.device}"
        if images.device.type != "cpu" or images.dtype is not torch.float32:
            raise ExportError(f"given {given}; an exported model takes torch.float32 on the CPU: images.cpu().float().")
        try:
            return self.compute(images.detach())
        except Exception as error:  # the runtimes' own errors have no common base
            raise ExportError(
                f"the exported model cannot compute {given}: {in_one_line(error)}. It takes (B, 3, height, width), "
                "preprocessed."
            ) from error

    @abc.abstractmethod
    def compute(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """What ``run`` gives, for images on the CPU and in fp32."""


@dataclass(frozen=True)
class Offer:
    """What a precision takes, beside what the runtime takes for fp32.

    Args:
        packages: that write it.
        images: whether it takes the scales of activations from calibration images.
    """

    packages: tuple[str, ...] = ()
    images: bool = False


@dataclass(frozen=True)
class Quantised:
    """What has become of the backbone's linear layers.

    Args:
        integer_products: how many of them compute in integers.
        weight_bits: of their weights.
    """

    integer_products: int
    weight_bits: int


@dataclass(frozen=True)
class Runner:
    """What differs between the runners (``run.py``) of the runtimes.

    Args:
        package: that it imports.
        load: the expression that opens the model, which lies in the folder ``FOLDER``.
        call: the expression that gives the logits ``(1, classes)`` of ``images``, a NumPy array, with ``model``.
    """

    package: str
    load: str
    call: str


@dataclass(frozen=True)
class Runtime(abc.ABC):
    """Everything that exporting, choosing, timing and the command line know of a runtime.

    A runtime is named after the module that it lives in. Its fields, which have defaults, are its options: they are
    keywords of ``dyntune.export``, options of the command line (a field's ``metadata["help"]`` is the help), and stand
    in ``deploy.json``.

    Attributes:
        title: the name that people know it by.
        file: name of the model's file in the folder; other files may lie beside it.
        writes_with: packages that write the file, by the name that both pip and import use.
        runs_with: packages that run it.
        install: what pip installs for all of that.
        runner: its part of ``run.py``.
        precisions: of the backbone's linear layers; fp32 is always among them.
        needs_trust: whether a file may run code when it is opened, so that it is opened only if its maker is trusted.
        measured_as: what ``dyntune bench`` calls it, where that is not its name.
    """

    title: ClassVar[str]
    file: ClassVar[str]
    writes_with: ClassVar[tuple[str, ...]]
    runs_with: ClassVar[tuple[str, ...]]
    install: ClassVar[str]
    runner: ClassVar[Runner]
    precisions: ClassVar[Mapping[str, Offer]] = {FP32: Offer()}
    needs_trust: ClassVar[bool] = False
    measured_as: ClassVar[str | None] = None

    @classmethod
    def name(cls) -> str:
        """The name that users write."""
        return named(cls)

    @classmethod
    def options(cls) -> dict[str, dataclasses.Field[Any]]:
        """Its options, by name."""
        return {field.name: field for field in dataclasses.fields(cls)}

    def to_dict(self) -> dict[str, Any]:
        """Its options and their values, as they stand in ``deploy.json``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The runtime with the options that ``deploy.json`` holds."""
        return cls(**{name: config[name] for name in cls.options() if name in config})

    @classmethod
    @contextlib.contextmanager
    def importing(cls, purpose: str, packages: Sequence[str]) -> Iterator[None]:
        """Imports go into ``with``; one that fails is an ExportError that says what ``packages`` are needed for."""
        try:
            yield
        except ImportError as error:
            needed = " and ".join(packages)
            raise ExportError(f"{purpose} needs {needed} ({error}): pip install {cls.install}.") from error

    def check(self) -> None:  # noqa: B027 (most runtimes have no options)
        """Raises ExportError if what is installed here cannot write with these options; nothing if it is missing."""

    @abc.abstractmethod
    def write(self, program: ExportedProgram, path: Path, spec: str) -> None:
        """Writes a program in fp32.

        Args:
            program: from ``export_program``, which says how inputs and outputs are named; left as it is.
            path: of the file, which ends in ``file``.
            spec: of the tuned model, for formats that hold a description.

        Raises:
            ExportError: a package is missing, or the runtime has no translation of the program.
        """

    def quantize(
        self, precision: str, exact: Path, path: Path, linears: BackboneLinears, images: Tensor | None
    ) -> Quantised:
        """Writes a model in another precision, for runtimes that have one beside fp32 among their ``precisions``.

        Args:
            precision: one of those.
            exact: the file in fp32, as ``write`` has left it.
            path: of the file to write.
            linears: the layers that are quantised; a large product beside them is an error, not a slow model.
            images: preprocessed, ``(N, 3, height, width)``, for a precision that takes images.

        Raises:
            ExportError: a package is missing, or a layer would stay in fp32.
        """
        raise NotImplementedError(f"{self.name()} offers {precision} and does not say how")

    @abc.abstractmethod
    def open(self, path: Path, threads: int | None) -> Session:
        """Opens a file.

        Args:
            path: of the file that ``write`` or ``quantize`` has written.
            threads: that one forward pass may use; None for as many as the runtime takes by itself.

        Raises:
            ExportError: a package is missing, or the file cannot be read.
        """

    def requirement(self) -> str:
        """What the runner needs, as pip takes it."""
        return self.runner.package

    def note(self, config: Mapping[str, Any]) -> str:
        """What the README of a folder has to say of this runtime; ``config`` is what ``deploy.json`` holds."""
        return ""

    def warning(self, config: Mapping[str, Any]) -> str:
        """What must be known of a folder on this machine, as the rest of a sentence about it; empty if nothing."""
        return ""
