"""Gates of a finished run, calibrated for other rates of activation."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from dyntune.core.errors import DataError, DyntuneError, TrainingError, in_one_line
from dyntune.core.limits import limit
from dyntune.model.adapter_folder import read_config, write_calibration
from dyntune.model.calibrate import IMAGES, calibrate
from dyntune.model.rates import Calibration, dispatchers
from dyntune.model.tuned import TunedModel
from dyntune.training.inputs import data_for
from dyntune.training.progress import CalibrationProgress, Progress
from dyntune.training.randomness import caller_randomness_kept

log = logging.getLogger("dyntune")


def wanted_calibration(model: TunedModel, asked: Any, held_out: Any) -> bool | Dataset[Any]:
    """What ``fit`` was asked to calibrate on, looked at before the training.

    Args:
        model: that is trained.
        asked: ``fit``'s argument.
        held_out: the data set that calibrates where no other is given.

    Returns:
        Whether to calibrate on that one, or the other one.

    Raises:
        TrainingError: it is neither True or False nor a data set.
        DataError: it is a data set that the model cannot be calibrated on.
    """
    if asked is None or isinstance(asked, bool):
        return asked is True
    if asked is held_out:
        return True
    if isinstance(asked, str | int | float):
        raise TrainingError(
            f"calibrate={asked!r}: expected True, False, or a data set of the images to calibrate the gates on."
        )
    images = data_for(model, asked, "the data set to calibrate on")
    if not len(images):
        raise DataError("the data set to calibrate on is empty. Give one with images, or calibrate=False.")
    return images


@contextmanager
def after_training(what: str) -> Iterator[None]:
    """Says in one warning what goes wrong once a training is over and saved, which must not be lost by it.

    Args:
        what: the training lacks then.
    """
    with caller_randomness_kept():
        try:
            yield
        except Exception as error:  # whatever the data set and the device say
            said = str(error) if isinstance(error, DyntuneError) else limit(error) or in_one_line(error)
            log.warning("%s: %s", what, said)


def calibrate_run(
    model: TunedModel,
    images: Dataset[Any],
    folder: Path | None,
    progress: Progress,
    batch_size: int,
    *,
    again: bool,
) -> None:
    """Calibrates a model's gates, if it has some that are learned, and saves that with its run.

    A run that was complete before, and had only to be read, may have its calibration already.

    Args:
        model: as the training has left it.
        images: of a kind that ``fit`` takes.
        folder: of the run, if it has one.
        progress: is told of it, if it wants to be.
        batch_size: images per forward pass.
        again: whether in place of a calibration that the run has.
    """
    if not dispatchers(model.backbone):
        return
    saved = None if folder is None or again else read_config(folder).get("calibration")
    if saved is not None:
        model.calibration = Calibration.from_dict(saved)
        return
    if isinstance(progress, CalibrationProgress):
        noun = "image" if model.preprocessing.clip is None else "video"
        progress.calibrating(min(IMAGES, len(images)), noun)  # type: ignore[arg-type]
    model.calibration = calibrate(model, images, batch_size=batch_size)
    if folder is not None:
        write_calibration(folder, model.calibration)
