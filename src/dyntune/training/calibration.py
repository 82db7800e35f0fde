"""Gates of a finished run, calibrated for other rates of activation."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from dyntune.core.errors import DyntuneError
from dyntune.model.adapter_folder import read_config, write_calibration
from dyntune.model.rates import IMAGES, Calibration, calibrate, dispatchers
from dyntune.model.tuned import TunedModel
from dyntune.training.progress import CalibrationProgress, Progress

log = logging.getLogger("dyntune")


def calibrate_run(model: TunedModel, images: Dataset[Any], folder: Path | None, progress: Progress) -> None:
    """Calibrates a model's gates, if it has some that are learned, and saves that with its run.

    A run that was complete before, and had only to be read, has its calibration already.

    Args:
        model: as the training has left it.
        images: of a kind that ``fit`` takes.
        folder: of the run, if it has one.
        progress: is told of it, if it wants to be.
    """
    if not dispatchers(model.backbone):
        return
    saved = None if folder is None else read_config(folder).get("calibration")
    if saved is not None:
        model.calibration = Calibration.from_dict(saved)
        return
    if isinstance(progress, CalibrationProgress):
        noun = "image" if model.preprocessing.clip is None else "video"
        progress.calibrating(min(IMAGES, len(images)), noun)  # type: ignore[arg-type]
    try:
        model.calibration = calibrate(model, images)
    except DyntuneError as error:
        log.warning("the gates are not calibrated, so that set_rate needs images: %s", error)
        return
    if folder is not None:
        write_calibration(folder, model.calibration)
