"""How public code trains on VTAB-1K: one preset per code base, with everything in which they differ as an option."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

import torch

from dyntune.core.errors import TrainingError, unknown_name
from dyntune.core.fields import Range, require_ranges
from dyntune.studies.noah import SearchSettings
from dyntune.training.inputs import Interpolation, Normalisation
from dyntune.training.settings import Precision, TrainSettings


@dataclass(frozen=True)
class Recipe:
    """How every job of a benchmark is trained.

    Args:
        name: what ``--recipe`` takes.
        source: the code that it follows.
        checkpoint: the weights that this code starts from; they are no part of the recipe, but of ``--weights``.
        reports: which epoch's accuracy this code reports; ``settings.select`` is what is done here.
        settings: of the training loop.
        drop_path: stochastic depth rate of the last block, rising linearly from 0 at the first.
        normalisation: of the pixels: the backbone's own, 0.5/0.5, ImageNet's statistics, or none.
        interpolation: how images are resized.
        full_lr: factor on the learning rate of jobs that train every weight; the DyT paper takes a tenth for them.
        supernet: epochs and learning rate of noah's supernet, each a factor on those of the job (500 to 100, and 5e-4
            to 1e-3, in NOAH's code).
        noah: sizes and limits of noah's search.
    """

    name: str
    source: str
    checkpoint: str
    reports: str
    settings: TrainSettings
    drop_path: Annotated[float, Range(0, 0.99)] = 0.0
    normalisation: Normalisation = "backbone"
    interpolation: Interpolation = "bicubic"
    full_lr: float = 0.1
    supernet: tuple[float, float] = (5.0, 0.5)
    noah: SearchSettings = field(default_factory=SearchSettings)

    def __post_init__(self) -> None:
        require_ranges(self, TrainingError)
        if not (self.full_lr > 0 and math.isfinite(self.full_lr)):
            raise TrainingError(f"full_lr={self.full_lr}: expected a number above 0, such as 0.1 for a tenth.")

    def changed(self, **changes: Any) -> Recipe:
        """The recipe with options replaced, those of ``settings`` among them; None leaves an option as it is.

        Another number of epochs scales warm-up and cooldown with it, unless they are given too.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        options = ("drop_path", "normalisation", "interpolation", "full_lr", "supernet", "noah")
        own = {name: given.pop(name) for name in options if name in given}
        if "epochs" in given:
            factor = given["epochs"] / self.settings.epochs
            given.setdefault("warmup_epochs", self.settings.warmup * factor)
            given.setdefault("cooldown_epochs", int(self.settings.cooldown_epochs * factor))
        if "lr" in given:
            lowest = given["lr"]
            given.setdefault("min_lr", min(self.settings.min_lr, lowest))
            given.setdefault("warmup_lr", min(self.settings.warmup_lr, lowest))
        return replace(self, settings=replace(self.settings, **given), **own)

    def on(self, device: torch.device) -> Recipe:
        """The recipe on a device: fp16 is for GPUs only, and elsewhere becomes fp32."""
        if device.type == "cuda" or self.settings.precision != "fp16":
            return self
        precision: Precision = "fp32"
        return self.changed(precision=precision)

    def identity(self) -> dict[str, Any]:
        """What decides the outcome of a job, as plain values, without the seed and what changes speed alone."""
        free = ("seed", "device", "workers", "log_every")
        settings = {name: value for name, value in asdict(self.settings).items() if name not in free}
        return {
            **settings,
            "drop_path": self.drop_path,
            "normalisation": self.normalisation,
            "interpolation": self.interpolation,
            "full_lr": self.full_lr,
            "supernet": list(self.supernet),
            "noah": asdict(self.noah),
        }


_NPZ = "ViT-B_16.npz, the original ImageNet-21k file (timm: vit_base_patch16_224.orig_in21k)"
_AUGREG = "the AugReg ImageNet-21k file (timm: vit_base_patch16_224.augreg_in21k)"
_DYT = TrainSettings(
    epochs=100,
    batch_size=64,
    lr=1e-3,
    min_lr=1e-5,
    weight_decay=1e-4,
    warmup_epochs=10,
    precision="fp16",
    select="last",
)
_FACT = replace(_DYT, drop_last=True, warmup_lr=1e-6, schedule="timm-lagged", precision="fp32", eval_every=10)

_ALL = (
    Recipe(
        name="dyt",
        source="the DyT code (main_vtab.py)",
        checkpoint="the original ImageNet-21k weights as converted by timm (vit_base_patch16_224.orig_in21k)",
        reports="the best of all epochs on the test images",
        settings=_DYT,
        normalisation="inception",
    ),
    Recipe(
        name="fact",
        source="the PETL-ViT code of FacT and ConvPass",
        checkpoint=_NPZ,
        reports="the best of every 10th epoch on the test images",
        settings=_FACT,
        drop_path=0.1,
        normalisation="imagenet",
    ),
    Recipe(
        name="binary",
        source="the PETL-ViT code of the binary adapters, which is also that of AdaptFormer and LoRA there",
        checkpoint=_NPZ,
        reports="the best of every 10th epoch on the test images",
        settings=_FACT,
        drop_path=0.1,
        normalisation="none",
    ),
    Recipe(
        name="noah",
        source="the NOAH code's Adapter and LoRA runs and its retraining",
        checkpoint=_NPZ,
        reports="the best of every 10th epoch on the test images",
        settings=replace(_FACT, decay_1d=False),
        drop_path=0.1,
        normalisation="imagenet",
    ),
    Recipe(
        name="ssf",
        source="the SSF code",
        checkpoint=_AUGREG,
        reports="the best epoch on the test images",
        settings=replace(
            _DYT,
            epochs=110,
            cooldown_epochs=10,
            drop_last=True,
            decay_1d=False,
            min_lr=1e-8,
            warmup_lr=1e-7,
            weight_decay=5e-5,
            schedule="timm",
        ),
        normalisation="inception",
    ),
    Recipe(
        name="vpt",
        source="the VPT code",
        checkpoint=_NPZ,
        reports="the last epoch, the mean of 5 seeds",
        settings=replace(_DYT, optimizer="sgd", lr=1.25, min_lr=0.0, schedule="epoch", precision="fp32"),
        normalisation="imagenet",
        interpolation="bilinear",
    ),
)
RECIPES = {recipe.name: recipe for recipe in _ALL}
"""The presets by name."""


def find_recipe(name: str) -> Recipe:
    """The preset called ``name``.

    Raises:
        TrainingError: there is none.
    """
    if name not in RECIPES:
        raise TrainingError(unknown_name("recipe", name, RECIPES))
    return RECIPES[name]
