"""Gates of a finished run, calibrated for other rates of activation."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from dyntune.core.errors import DyntuneError, in_one_line
from dyntune.core.limits import limit
from dyntune.model.adapter_folder import read_config, write_calibration
from dyntune.model.rates import IMAGES, Calibration, calibrate, dispatchers
from dyntune.model.tuned import TunedModel
from dyntune.training.progress import CalibrationProgress, Progress
from dyntune.training.randomness import caller_randomness_kept

log = logging.getLogger("dyntune")


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
    model: TunedModel, images: Dataset[Any], folder: Path | None, progress: Progress, batch_size: int
) -> None:
    """Calibrates a model's gates, if it has some that are learned, and saves that with its run.

    A run that was complete before, and had only to be read, has its calibration already.

    Args:
        model: as the training has left it.
        images: of a kind that ``fit`` takes.
        folder: of the run, if it has one.
        progress: is told of it, if it wants to be.
        batch_size: images per forward pass.
    """
    if not dispatchers(model.backbone):
        return
    saved = None if folder is None else read_config(folder).get("calibration")
    if saved is not None:
        model.calibration = Calibration.from_dict(saved)
        return
    if isinstance(progress, CalibrationProgress):
        progress.calibrating(min(IMAGES, len(images)))  # type: ignore[arg-type]
    model.calibration = calibrate(model, images, batch_size=batch_size)
    if folder is not None:
        write_calibration(folder, model.calibration)
