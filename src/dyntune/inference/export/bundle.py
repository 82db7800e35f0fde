"""Writing the folder of an exported model: the model, what it needs to know, and a runner without Dyntune.

A folder is complete or not there, and is never overwritten.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from torch import Tensor

from dyntune.core.errors import ExportError
from dyntune.core.files import room_beside, sealed, write_json, write_text
from dyntune.core.limits import limits_named
from dyntune.core.version import VERSION
from dyntune.data.images import NOT_READ, TURNS
from dyntune.data.video_files import FORMATS
from dyntune.data.videos import VIDEO_SUFFIXES
from dyntune.inference.export.card import export_card
from dyntune.inference.export.folder import CONFIG, FORMAT, digests, read_config
from dyntune.inference.export.linears import BackboneLinears
from dyntune.inference.export.program import export_program
from dyntune.inference.export.registry import configured, require_possible
from dyntune.inference.export.runtimes.base import FP32, Quantised, Runtime
from dyntune.inference.optimized import folded_copy
from dyntune.model.cost import cost
from dyntune.model.tasks import Classification
from dyntune.model.tuned import TunedModel, require_tuned

RUNNER, CARD = "run.py", "README.md"
CALIBRATION_IMAGES = 128
"""Images that the scales of activations settle with."""


class Export:
    """A tuned model traced once, on the CPU and in fp32, for any number of folders.

    Args:
        model: left as it is, wherever and in whatever precision it is.
        rate: share of the patches that gated units shall compute, for a calibrated model; see ``set_rate``.
        masks: whether the exported model also gives which patches each gated unit computed.

    Raises:
        DyntuneError: the model cannot be exported, or not at this rate.
    """

    def __init__(self, model: TunedModel, *, rate: float | None = None, masks: bool = False) -> None:
        model = copy.deepcopy(model).cpu().float()
        if rate is not None:
            model.set_rate(rate)
        self.model = model
        self.masks = masks
        self.folded = folded_copy(model, masks=masks)
        self.program = export_program(self.folded, masks)

    def write(
        self, folder: Path, runtime: Runtime, precision: str = FP32, calibration_images: Tensor | None = None
    ) -> None:
        """Fills ``folder``, which is made; see ``export``."""
        require_possible(runtime, precision, calibration_images)
        folder.mkdir(parents=True)
        quantised = self._write_model(folder / runtime.file, runtime, precision, calibration_images)
        write_text(folder / RUNNER, _runner(self.model, runtime))
        costs = cost(self.model)
        config = runtime.to_dict() | {
            "library": "dyntune",
            "format": FORMAT,
            "dyntune_version": VERSION,
            "spec": self.model.spec,
            "backbone": self.model.origin.without_paths().title,
            "runtime": runtime.name(),
            "precision": precision,
            "integer_products": quantised.integer_products if quantised else 0,
            "weight_bits": quantised.weight_bits if quantised else None,
            "gates": self.gates if self.masks else [],
            "activation": self.model.target_rate,
            "macs": costs.macs,
            "dense_macs": costs.dense_macs,
            "preprocessing": self.model.preprocessing.to_dict(),
            "task": self.model.task.name,
            "classes": self.model.classes,
            "versions": _versions(("torch", "timm", *runtime.runs_with)),
            "files": digests(folder),
        }
        write_json(folder / CONFIG, sealed(config))
        write_text(folder / CARD, export_card(config))

    def _write_model(
        self, target: Path, runtime: Runtime, precision: str, calibration_images: Tensor | None
    ) -> Quantised | None:
        """Writes the model and returns what has become of its linear layers; None in fp32."""
        if precision == FP32:
            runtime.write(self.program, target, self.model.spec)
            return None
        linears = BackboneLinears(self.folded)
        with room_beside(target.parent.with_name("fp32")) as room:
            exact = room / target.name
            runtime.write(self.program, exact, self.model.spec)
            return runtime.quantize(precision, exact, target, linears, calibration_images)

    @property
    def gates(self) -> list[str]:
        """The gated units, by path, in the order of the masks."""
        units, policies = self.model.backbone.all_units(), self.model.policies
        return [unit.path for unit in units if any(policy.gates(unit) for policy in policies)]


def export(
    model: TunedModel,
    folder: str | Path,
    *,
    runtime: str = "onnx",
    precision: str = FP32,
    masks: bool = False,
    rate: float | None = None,
    calibration_images: Tensor | None = None,
    **options: Any,
) -> Path:
    """Writes a folder with the model for a runtime, its preprocessing, classes and a runner.

    Args:
        model: left as it is.
        folder: must not be there yet.
        runtime: ``onnx`` (ONNX Runtime), ``openvino``, ``torch`` (torch.export), or one that another distribution adds.
        precision: of the linear layers in the backbone's blocks, fp32 or int8; all else is in fp32. In ONNX, int8
            scales activations by their range over the whole batch, so that an image's logits depend on the images
            beside it.
        masks: whether the exported model also gives which patches each gated unit computed, which costs some time.
        rate: share of the patches that gated units shall compute, for a calibrated model; see ``set_rate``.
        calibration_images: preprocessed, ``(N, 3, height, width)``; int8 in OpenVINO needs them.
        options: of the runtime. ``onnx`` has ``opset``, the version of ONNX's operators: 18 or newer, where something
            does not read 23, which is written if none is given.

    Returns:
        ``folder``.

    Raises:
        ExportError: the folder is there already, a library is missing, or the model cannot be had this way.
    """
    require_tuned(model, "export")
    folder = Path(folder)
    taken = configured(runtime, options)
    require_possible(taken, precision, calibration_images)
    with place_for(folder) as room:
        Export(model, rate=rate, masks=masks).write(room / "model", taken, precision, calibration_images)
        (room / "model").rename(folder)
    return folder


def _runner(model: TunedModel, runtime: Runtime) -> str:
    """The text of ``run.py``, which reads images, or videos where the model takes clips.

    Of another task than classification it prints the outputs.
    """
    clips = model.preprocessing.clip is not None
    words = {
        "item": "video" if clips else "image",
        "items": "videos" if clips else "images",
        "find": "films" if clips else "inside",
        "sample": "film.mp4 films/" if clips else "photo.jpg photos/",
        "classification": Classification.name,
        "unread": NOT_READ,
        "turns": {orientation: int(turn) for orientation, turn in TURNS.items()},
        "help": f"{'video files, folders of frames' if clips else 'image files'}, or folders of them",
    }
    suffixes = ", ".join(f'"{suffix}"' for suffix in sorted(VIDEO_SUFFIXES))
    reading = _template("clip_input" if clips else "image_input").substitute(suffixes=suffixes, formats=FORMATS)
    return _template("runner").substitute(words, input=reading, **vars(runtime.runner))


def _template(name: str) -> Template:
    return Template(files("dyntune.inference.export").joinpath(f"{name}.template").read_text(encoding="utf-8"))


@contextmanager
def place_for(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder``, from which what is finished can be renamed to it.

    Raises:
        ExportError: ``folder`` is there already.
    """
    if folder.exists():
        raise ExportError(f"{folder} is there already, and is not overwritten. Give another folder, or remove it.")
    with limits_named(), room_beside(folder) as room:
        yield room


def record(folder: Path, **figures: Any) -> None:
    """Adds figures to ``deploy.json``, such as those of a check, and to the folder's README."""
    config = read_config(folder) | figures
    write_json(folder / CONFIG, sealed(config))
    write_text(folder / CARD, export_card(config))


def _versions(packages: Iterable[str]) -> dict[str, str]:
    """The installed version of each package; what belongs to no distribution has none."""
    found = {}
    for name in dict.fromkeys(packages):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
