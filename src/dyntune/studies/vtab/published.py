"""The published VTAB-1K results of methods that Dyntune has: ViT-B/16, ImageNet-21k weights."""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from importlib import resources

from dyntune.core.errors import SpecError
from dyntune.parts.registry import registered
from dyntune.parts.spec import format_spec, split_spec
from dyntune.studies.vtab.tasks import VTAB_1K, Benchmark

SOURCE = "Zhao et al., NeurIPS 2024, arXiv 2403.11808, table 3"
_NAMES = {
    "full": "Full tuning",
    "linear": "Frozen",
    "adapter": "Adapter",
    "bitfit": "BitFit",
    "lora": "LoRA",
    "vpt": "VPT",
    "ssf": "SSF",
    "noah": "NOAH",
    "convpass": "ConvPass",
    "adaptformer": "AdaptFormer",
    "fact-tt": "FacT-TT",
    "res-tuning": "Res-Tuning",
    "dyt": "DyT r=0.5",
    "dyt:rate=0.7": "DyT r=0.7",
    "dyt:rate=0.9": "DyT r=0.9",
}
_NOTES = {
    "LoRA": "MACs with LoRA merged into the weights",
    "VPT": "parameters of 57.6 prompts per block, the mean over tasks, but MACs of 8 per block, without those of norms",
    "SSF": "parameters are cut to two decimals, and MACs are those with SSF merged into the weights",
    "NOAH": "parameters are the mean of 19 searched sub-networks, MACs the backbone's alone; here the largest one",
    "FacT-TT": "parameters are the mean over tasks, each with a rank of 4, 8 or 16; MACs with FacT merged",
    "Res-Tuning": "parameters include the head, 0.04 M on average over tasks",
    "DyT r=0.5": "parameters without the dispatchers; MACs as executed, which a mean activation of 54.3 % gives",
    "DyT r=0.7": "parameters without the dispatchers; MACs as executed, which a mean activation of 75.8 % gives",
    "DyT r=0.9": "parameters without the dispatchers; MACs as executed, which a mean activation of 95.1 % gives",
}
_ANY_VALUE = {"scale", "dropout"}
"""Options that are chosen per task, so that they do not make another method."""
_PUBLISHED_VALUES: dict[str, dict[str, tuple[str, ...]]] = {
    "adapter": {"init": ("noah",)},
    "lora": {"init": ("noah",)},
    "fact-tt": {"rank": ("4", "8", "16")},
    "convpass": {"init": ("xavier", "identity")},
    "dyt": {"recipe": ("published", "steady")},
    "vpt": {"prompts": ("1", "5", "10", "50", "100", "200")},
}
"""By method, the values that its published runs have in further options, chosen per task or other than our defaults."""
_FIGURES = ("mean", "params_m", "gflops")

MODEL = "vit_base_patch16_224"
"""The backbone of the table, whatever its weights."""
IMG_SIZE = 224


@dataclass(frozen=True)
class PublishedRow:
    """A row of the published table.

    Args:
        name: the method's name there.
        params_m: trained parameters in millions, without the head but for some rows.
        gflops: giga-MACs per image.
        mean: mean of the three group means, in per cent.
        tasks: accuracy by the task's column name, in per cent.
        note: how its parameters or MACs were counted, where that is not as here; empty otherwise.
    """

    name: str
    params_m: float
    gflops: float
    mean: float
    tasks: dict[str, float]
    note: str = ""


def comparable(benchmark: Benchmark, model: str, img_size: int | None = None) -> bool:
    """Whether a run has the tasks, the backbone and the image size (None: the backbone's) of the published table."""
    return benchmark == VTAB_1K and model.split(".")[0] == MODEL and img_size in (None, IMG_SIZE)


@functools.cache
def published_rows() -> tuple[PublishedRow, ...]:
    """All rows, in the table's order."""
    text = resources.files("dyntune.studies.vtab").joinpath("published_vtab1k.csv").read_text(encoding="utf-8")
    return tuple(
        PublishedRow(
            name=row["method"],
            params_m=float(row["params_m"]),
            gflops=float(row["gflops"]),
            mean=float(row["mean"]),
            tasks={key: float(value) for key, value in row.items() if key not in ("method", *_FIGURES)},
            note=_NOTES.get(row["method"], ""),
        )
        for row in csv.DictReader(text.splitlines())
    )


def published_specs() -> tuple[str, ...]:
    """The specs that have a published row, of the methods that there are."""
    return tuple(spec for spec in _NAMES if split_spec(spec)[0][0] in registered())


def published_row(spec: str) -> PublishedRow | None:
    """The row of the method that a spec stands for; None for a method, or an option of one, that is not in the table.

    Scale and dropout, which are chosen per task, may have any value, and other options those of the published runs.
    """
    parts = split_spec(spec)
    if len(parts) != 1:
        return None
    name, options = parts[0]
    published = _PUBLISHED_VALUES.get(name, {})
    kept = {k: v for k, v in options.items() if k not in _ANY_VALUE and v not in published.get(k, ())}
    key = f"{name}:{','.join(f'{k}={v}' for k, v in kept.items())}" if kept else name
    if name in registered():  # writes an option that has its default value as if it were not given
        try:
            key = format_spec(registered()[name].from_strings(kept))
        except SpecError:
            return None
    wanted = _NAMES.get(key)
    return next((row for row in published_rows() if row.name == wanted), None)
