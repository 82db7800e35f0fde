"""The options of a training run, and the learning rate that follows from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_type_hints

from dyntune.core.errors import TrainingError, unknown_name
from dyntune.core.fields import Range, require_ranges
from dyntune.parts.spec import coerce
from dyntune.training.schedule import Schedule, warmup_cosine

Optimizer = Literal["adamw", "sgd"]
Precision = Literal["fp32", "bf16", "fp16"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Select = Literal["val", "test", "last"]

_ELSEWHERE = {
    **dict.fromkeys(("learning_rate", "base_lr"), "lr"),
    **dict.fromkeys(("num_epochs", "num_train_epochs", "max_epochs", "n_epochs"), "epochs"),
    **dict.fromkeys(("per_device_train_batch_size", "train_batch_size", "bs"), "batch_size"),
    **dict.fromkeys(("gradient_accumulation_steps", "grad_accum_steps", "accumulate_grad_batches"), "accumulate"),
    **dict.fromkeys(("opt", "optim"), "optimizer"),
    **dict.fromkeys(("sched", "scheduler", "lr_scheduler_type"), "schedule"),
    **dict.fromkeys(("warmup", "warmup_steps", "warmup_ratio"), "warmup_epochs"),
    **dict.fromkeys(("clip_grad", "max_grad_norm", "gradient_clip_val"), "clip_norm"),
    **dict.fromkeys(("smoothing", "label_smoothing_factor"), "label_smoothing"),
    **dict.fromkeys(("num_workers", "dataloader_num_workers"), "workers"),
    **dict.fromkeys(("fp16", "bf16", "amp", "mixed_precision"), "precision"),
    **dict.fromkeys(("aa", "auto_augment", "augmentation"), "augment"),
    **dict.fromkeys(("grad_checkpointing", "checkpointing"), "gradient_checkpointing"),
    **dict.fromkeys(("mixup_alpha",), "mixup"),
    **dict.fromkeys(("cutmix_alpha",), "cutmix"),
    "wd": "weight_decay",
}
"""What timm, transformers and Lightning call options, and what they are here."""
_INDIFFERENT = ("workers", "device", "log_every", "gradient_checkpointing")
"""Options that the trained weights do not depend on."""


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Args:
        epochs: passes over the training images.
        batch_size: images per step and process.
        drop_last: leaves out the last batch of an epoch when it is not full, of all processes together.
        optimizer: AdamW, or SGD with momentum 0.9.
        lr: peak learning rate.
        min_lr: learning rate at the end of the cosine.
        backbone_lr: factor on the learning rate of the pretrained backbone's own tensors, where they are trained
            (``full``, ``bitfit``); above 0 and at most 1. What is new (adapters, predictors, the head) has factor 1.
        weight_decay: weight decay of the trained tensors.
        decay_1d: whether weight decay holds for biases and other tensors of one dimension too.
        warmup_epochs: epochs of linear warm-up, which ends before the last step; None, the default of ``fit``, is a
            tenth of all.
        warmup_lr: learning rate at which the warm-up begins.
        cooldown_epochs: the last epochs, spent at ``min_lr``.
        schedule: learning rate per iteration or per epoch; timm's cosine counts the warm-up as its part. See
            ``dyntune.training.schedule.warmup_cosine``.
        label_smoothing: share of the target spread over all classes.
        mixup: alpha of mixup, 0 for none.
        cutmix: alpha of CutMix, 0 for none.
        augment: ``none`` resizes only, as VTAB-1K does; ``timm`` adds timm's random crops, flips and colour changes.
        accumulate: steps whose gradients are added before the weights change.
        clip_norm: largest norm of the gradient; no limit by default.
        precision: of the forward and backward pass; weights stay as they are.
        gradient_checkpointing: recomputes each block in the backward pass, which takes time and saves memory; the
            weights come to the same. Without it the backbone's own switch stays as it is.
        device: ``auto`` takes an accelerator if there is one.
        workers: processes that read images; 0 reads in the training process.
        seed: decides the order of images and every random number.
        select: the split whose accuracy, or other figure of merit, picks the saved epoch; ``last`` saves the last
            epoch, ``test`` is for those who must reproduce published numbers.
        eval_every: epochs between two evaluations; the last epoch is always evaluated.
        log_every: steps between two records in the log.
    """

    epochs: Annotated[int, Range(1)] = 30
    batch_size: Annotated[int, Range(1)] = 64
    drop_last: bool = False
    optimizer: Optimizer = "adamw"
    lr: float = 1e-3
    min_lr: float = 1e-5
    backbone_lr: float = 1.0
    weight_decay: float = 1e-4
    decay_1d: bool = True
    warmup_epochs: float | None = None
    warmup_lr: float = 0.0
    cooldown_epochs: Annotated[int, Range(0)] = 0
    schedule: Schedule = "iteration"
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    augment: Literal["none", "timm"] = "none"
    accumulate: Annotated[int, Range(1)] = 1
    clip_norm: float | None = None
    precision: Precision = "fp32"
    gradient_checkpointing: bool = False
    device: Device = "auto"
    workers: Annotated[int, Range(0)] = 0
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    select: Select = "val"
    eval_every: Annotated[int, Range(1)] = 1
    log_every: Annotated[int, Range(1)] = 10

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            try:
                object.__setattr__(self, name, coerce(getattr(self, name), hint))
            except ValueError as error:
                raise TrainingError(f"{name}={getattr(self, name)!r}: expected {error}.") from None
        require_ranges(self, TrainingError)
        if not 0 <= self.min_lr <= self.lr or self.lr == 0:
            raise TrainingError(f"lr={self.lr}, min_lr={self.min_lr}: expected 0 <= min_lr <= lr and lr above 0.")
        if not 0 < self.backbone_lr <= 1:
            raise TrainingError(f"backbone_lr={self.backbone_lr}: expected above 0 and at most 1.")
        if self.cooldown_epochs >= self.epochs:
            raise TrainingError(f"cooldown_epochs={self.cooldown_epochs}: expected below epochs={self.epochs}.")
        if not 0 <= self.warmup_lr <= self.lr:
            raise TrainingError(f"warmup_lr={self.warmup_lr}: expected between 0 and lr={self.lr}.")
        if self.warmup_epochs is not None and not 0 <= self.warmup_epochs <= self.epochs:
            raise TrainingError(f"warmup_epochs={self.warmup_epochs}: expected between 0 and epochs={self.epochs}.")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise TrainingError(f"clip_norm={self.clip_norm}: expected above 0, or None for no limit.")
        if not 0 <= self.label_smoothing < 1 or min(self.mixup, self.cutmix, self.weight_decay) < 0:
            raise TrainingError("expected label_smoothing in [0, 1) and mixup, cutmix, weight_decay of at least 0.")

    @classmethod
    def of(cls, **options: Any) -> TrainSettings:
        """Settings from keyword options; an unknown one raises TrainingError with the nearest valid name."""
        known = {field.name for field in dataclasses.fields(cls)}
        for name in options:
            if name not in known:
                raise TrainingError(unknown_name("training option", name, known, _ELSEWHERE))
        return cls(**options)

    @property
    def warmup(self) -> float:
        """Epochs of warm-up."""
        return self.epochs / 10 if self.warmup_epochs is None else self.warmup_epochs

    def learning_rate(self, epoch: float, steps: int | None = None) -> float:
        """The learning rate of a step, by ``schedule``.

        Args:
            epoch: epochs done, with the fraction of the running one.
            steps: of an epoch; None where they are many.
        """
        return warmup_cosine(
            epoch,
            form=self.schedule,
            epochs=self.epochs - self.cooldown_epochs,
            warmup=self.warmup,
            lr=self.lr,
            min_lr=self.min_lr,
            warmup_lr=self.warmup_lr,
            steps=steps,
        )

    def differences(self, other: dict[str, Any], besides: Collection[str] = ()) -> list[str]:
        """What differs from ``other``, settings as a dictionary, among what decides the trained weights.

        An option that ``other`` does not have yet was at its default.

        Args:
            other: the settings of another run.
            besides: names of settings that may differ too.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        other = defaults | other
        mine = self.deciding()
        return [f"{k} was {other[k]}, is {mine[k]}" for k in mine if k not in besides and mine[k] != other[k]]

    def deciding(self) -> dict[str, Any]:
        """What decides the trained weights, as plain values."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in _INDIFFERENT}
