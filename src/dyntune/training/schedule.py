"""The learning rate over the epochs: a linear warm-up and a cosine, in the forms that public code uses."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["iteration", "epoch", "timm", "timm-lagged"]


def warmup_cosine(
    epoch: float,
    *,
    form: Schedule,
    epochs: float,
    warmup: float,
    lr: float,
    min_lr: float,
    warmup_lr: float,
    steps: int | None = None,
) -> float:
    """The learning rate at a point of a run; after ``epochs`` it stays at ``min_lr``.

    ``iteration`` changes it at every step and ``epoch`` once per epoch; in both the cosine begins where the warm-up
    ends. ``timm`` is timm's ``CosineLRScheduler``: once per epoch, and the cosine has been falling since epoch 0, so it
    begins below ``lr``. ``timm-lagged`` is the same one epoch late, which is what code gives that steps the scheduler
    with the epoch's own number at the epoch's end.

    The warm-up ends before the cosine does, so that a short run gets to the peak. One that is shorter than what the
    rate changes by, a step or an epoch, would only be a first one at ``warmup_lr``, which is mostly 0: there is none.

    Args:
        epoch: epochs done, with the fraction of the running one.
        form: one of the four.
        epochs: where the cosine ends.
        warmup: epochs of warm-up.
        lr: peak.
        min_lr: end of the cosine.
        warmup_lr: where the warm-up begins.
        steps: steps of an epoch; None where they are many.
    """
    tick = (1 / steps if steps else 0.0) if form == "iteration" else 1.0
    warmup = min(warmup, epochs - (2 * tick if form == "timm-lagged" else tick))
    if warmup < tick:
        warmup = 0.0
    if form != "iteration":
        epoch = float(math.floor(epoch))
    if form == "timm-lagged":
        epoch = max(epoch - 1, 0.0)
    if epoch < warmup:
        return warmup_lr + (lr - warmup_lr) * epoch / warmup
    begin = 0.0 if form.startswith("timm") else warmup
    done = (epoch - begin) / max(epochs - begin, 1e-9)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
