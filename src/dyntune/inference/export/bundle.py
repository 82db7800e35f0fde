"""Writing the folder that a deployed model lives in: the model, what it needs to know, and a runner without Dyntune.

A folder is complete or not there, and is never overwritten.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from torch import Tensor

from dyntune.core.errors import DeploymentError
from dyntune.core.files import write_json, write_text
from dyntune.core.version import VERSION
from dyntune.inference.export.card import deployment_card
from dyntune.inference.export.folder import CONFIG, FORMAT, MODEL_FILES, Precision, RuntimeName, digests, read_config
from dyntune.inference.export.linears import BackboneLinears
from dyntune.inference.export.program import export_program
from dyntune.inference.export.runtimes.onnx import OPSET, write_onnx
from dyntune.inference.export.runtimes.onnx_int8 import quantize_onnx, sums_saturate
from dyntune.inference.export.runtimes.openvino import write_openvino
from dyntune.inference.export.runtimes.openvino_int8 import save_quantized
from dyntune.inference.export.runtimes.torch import write_torch
from dyntune.inference.optimized import prepare
from dyntune.model.cost import cost
from dyntune.model.tuned import TunedModel

RUNNER, CARD = "run.py", "README.md"
CALIBRATION_IMAGES = 128
"""Images that the scales of activations settle with."""


@dataclass(frozen=True)
class _Runner:
    """What differs between the runners of the runtimes.

    Args:
        package: that it imports.
        load: the expression that opens the model.
        call: the expression that gives the logits of one prepared image.
    """

    package: str
    load: str
    call: str


_RUNNERS = {
    "onnx": _Runner(
        "onnxruntime",
        'onnxruntime.InferenceSession(FOLDER / "model.onnx")',
        'model.run(["logits"], {"images": prepare(path, **CONFIG["preprocessing"])})[0]',
    ),
    "openvino": _Runner(
        "openvino",
        'openvino.compile_model(FOLDER / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})',
        'model(prepare(path, **CONFIG["preprocessing"]))["logits"]',
    ),
    "torch": _Runner(
        "torch",
        'torch.export.load(FOLDER / "model.pt2").module()',
        'model(torch.from_numpy(prepare(path, **CONFIG["preprocessing"])))[0].numpy()',
    ),
}


class Export:
    """A tuned model traced once, on the CPU and in fp32, for any number of folders.

    Args:
        model: left as it is, wherever and in whatever precision it is.
        rate: share of the patches that gated units shall compute, for a calibrated model; see ``set_rate``.
        masks: whether the exported model also gives which patches each gated unit computed.
        opset: version of ONNX's operators that ONNX files are written in.

    Raises:
        DyntuneError: the model cannot be exported, or not at this rate.
    """

    def __init__(
        self, model: TunedModel, *, rate: float | None = None, masks: bool = False, opset: int = OPSET
    ) -> None:
        model = copy.deepcopy(model).cpu().float()
        if rate is not None:
            model.set_rate(rate)
        self.model = model
        self.masks = masks
        self.opset = opset
        self.prepared = prepare(model, masks=masks)
        self.program = export_program(self.prepared, masks)

    def write(
        self,
        folder: Path,
        runtime: RuntimeName,
        precision: Precision = "fp32",
        calibration_images: Tensor | None = None,
    ) -> None:
        """Fills ``folder``, which is made; see ``write``."""
        require_possible(runtime, precision, calibration_images)
        folder.mkdir(parents=True)
        target = folder / MODEL_FILES[runtime]
        integer_products = self._write_model(target, runtime, precision, calibration_images)
        runner = Template(files("dyntune.inference.export").joinpath("runner.template").read_text(encoding="utf-8"))
        write_text(folder / RUNNER, runner.substitute(vars(_RUNNERS[runtime])))
        costs = cost(self.model)
        config = {
            "library": "dyntune",
            "format": FORMAT,
            "dyntune_version": VERSION,
            "spec": self.model.spec,
            "backbone": costs.model,
            "runtime": runtime,
            "opset": self.opset if runtime == "onnx" else None,
            "precision": precision,
            "integer_products": integer_products,
            "weight_bits": None if precision == "fp32" else 7 if runtime == "onnx" and sums_saturate() else 8,
            "gates": self.gates if self.masks else [],
            "activation": self.model.target_rate,
            "macs": costs.macs,
            "dense_macs": costs.dense_macs,
            "preprocessing": self.model.preprocessing.to_dict(),
            "classes": self.model.classes,
            "versions": {name: version(name) for name in dict.fromkeys(("torch", "timm", _RUNNERS[runtime].package))},
            "files": digests(folder),
        }
        write_json(folder / CONFIG, config)
        write_text(folder / CARD, deployment_card(config))

    def _write_model(
        self, target: Path, runtime: RuntimeName, precision: Precision, calibration_images: Tensor | None
    ) -> int:
        """Writes the model and returns how many of its products are in integers."""
        if precision == "fp32":
            self._write_exact(target, runtime)
            return 0
        linears = BackboneLinears(self.prepared)
        with tempfile.TemporaryDirectory(prefix=".fp32-", dir=target.parent.parent) as room:
            exact = Path(room) / target.name
            self._write_exact(exact, runtime)
            if runtime == "onnx":
                return quantize_onnx(exact, target, linears)
            assert calibration_images is not None  # require_possible has looked
            return save_quantized(exact, target, calibration_images, linears)

    def _write_exact(self, target: Path, runtime: RuntimeName) -> None:
        """Writes the model in fp32."""
        if runtime == "torch":
            write_torch(self.program, target)
        elif runtime == "onnx":
            write_onnx(self.program, target, {"spec": self.model.spec}, opset=self.opset)
        else:
            write_openvino(self.program, target)

    @property
    def gates(self) -> list[str]:
        """The gated units, by path, in the order of the masks."""
        units, policies = self.model.backbone.all_units(), self.model.policies
        return [unit.path for unit in units if any(policy.gates(unit) for policy in policies)]


def write(
    model: TunedModel,
    folder: str | Path,
    *,
    runtime: RuntimeName = "onnx",
    precision: Precision = "fp32",
    masks: bool = False,
    rate: float | None = None,
    calibration_images: Tensor | None = None,
    opset: int | None = None,
) -> Path:
    """Writes a folder with the model for a runtime, its preprocessing, classes and a runner.

    Args:
        model: left as it is.
        folder: must not be there yet.
        runtime: ``onnx`` (ONNX Runtime), ``openvino`` or ``torch`` (torch.export).
        precision: of the linear layers in the backbone's blocks; all else is in fp32. In ONNX, int8 scales activations
            by their range over the whole batch, so that an image's logits depend on the images beside it.
        masks: whether the deployed model also gives which patches each gated unit computed, which costs some time.
        rate: share of the patches that gated units shall compute, for a calibrated model; see ``set_rate``.
        calibration_images: preprocessed, ``(N, 3, height, width)``; int8 in OpenVINO needs them.
        opset: version of ONNX's operators, for ``onnx`` alone: 18 or newer, where a runtime does not read 23, which is
            written if none is given.

    Returns:
        ``folder``.

    Raises:
        DeploymentError: the folder is there already, a library is missing, or the model cannot be had this way.
    """
    folder = Path(folder)
    require_possible(runtime, precision, calibration_images)
    if opset is not None and runtime != "onnx":
        raise DeploymentError(f"an opset is for the runtime onnx; given {opset} for {runtime}. Leave it out.")
    with place_for(folder) as room:
        Export(model, rate=rate, masks=masks, opset=OPSET if opset is None else opset).write(
            room / "model", runtime, precision, calibration_images
        )
        (room / "model").rename(folder)
    return folder


@contextmanager
def place_for(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder``, from which what is finished can be renamed to it.

    Raises:
        DeploymentError: ``folder`` is there already.
    """
    if folder.exists():
        raise DeploymentError(f"{folder} is there already, and is not overwritten. Give another folder, or remove it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as room:
        yield Path(room)


def record(folder: Path, **figures: Any) -> None:
    """Adds figures to ``deploy.json``, such as those of a check, and to the folder's README."""
    config = read_config(folder) | figures
    write_json(folder / CONFIG, config)
    write_text(folder / CARD, deployment_card(config))


def require_possible(runtime: str, precision: str, calibration_images: Tensor | None) -> None:
    """Checks that a runtime offers a precision.

    Raises:
        DeploymentError: it does not, or needs images for it.
    """
    if runtime == "torch" and precision == "int8":
        raise DeploymentError("int8 is for the runtimes onnx and openvino; give one of them, or --precision fp32.")
    if runtime == "openvino" and precision == "int8" and calibration_images is None:
        raise DeploymentError(
            "int8 in OpenVINO takes its scales from images: give some of the kind that the model will see "
            "(calibration_images, --calibrate-on DATA), or take the runtime onnx, which needs none."
        )
