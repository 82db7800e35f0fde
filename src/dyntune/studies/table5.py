"""Table 5 of the DyT paper: what methods cost with token reduction, by our count beside the printed figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dyntune.backbones.hosts import create_backbone
from dyntune.core.shapes import shapes_only
from dyntune.model.cost import Cost, cost
from dyntune.model.tune import tune

SOURCE = "Zhao et al., NeurIPS 2024, arXiv 2403.11808, table 5 (the first two rows: tables 3 and 4)"
MODEL = "vit_base_patch16_224"
CLASSES = 100
WIDTHS = (8, 64)
"""Widths of the adapter: beside EViT, ToMe and DynamicViT the paper prints parameters of one and MACs of the other."""

_SAME = "the same"
_WIDTH = "printed are the parameters of width 8 and the MACs of width 64"
_DYT = (
    "ours at exactly half of the patches; the printed MACs are measured, and mean that 54.3 % (width 8) or 52.5 % "
    "(width 64) are active; printed parameters are without the dispatchers"
)
_DYT_TOME = (
    "the paper does not give r; r=7 comes to the printed MACs with 54.9 % (width 8) or 53.0 % (width 64) active, "
    "nearly as without ToMe; r=8 would need 59.6 % or 57.8 %"
)


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        name: as printed.
        method: the tuning method; one with an adapter is counted with each of ``WIDTHS``.
        tokens: the token policy beside it.
        params_m: printed trained parameters in millions, without the head.
        gmacs: printed giga-MACs per image.
        note: why the printed figures differ from ours.
    """

    name: str
    method: str
    tokens: str | None
    params_m: float
    gmacs: float
    note: str

    @property
    def specs(self) -> tuple[str, ...]:
        """The method, with each width if it has an adapter."""
        if self.method == "full":
            return (self.method,)
        return tuple(f"{self.method}{',' if ':' in self.method else ':'}bottleneck={width}" for width in WIDTHS)

    def costs(self) -> tuple[Cost, ...]:
        """Our count for each of ``specs``; no weights are needed."""
        return tuple(_cost(spec, self.tokens) for spec in self.specs)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        counted = [
            {"method": spec, "trainable_params": figures.trainable_params, "macs": figures.macs}
            for spec, figures in zip(self.specs, self.costs(), strict=True)
        ]
        return {
            "name": self.name,
            "method": self.method,
            "tokens": self.tokens,
            "counted": counted,
            "published": {"params_m": self.params_m, "gmacs": self.gmacs},
            "note": self.note,
        }


ROWS = (
    Row("Full tuning", "full", None, 85.80, 17.58, _SAME),
    Row("AdaptFormer", "adaptformer", None, 0.16, 17.61, "printed are the parameters and the MACs of width 8"),
    Row("DyT r=0.5", "dyt:rate=0.5,recipe=published", None, 0.16, 12.54, _DYT),
    Row("EViT", "full", "evit:keep=0.7", 85.80, 11.62, _SAME),
    Row("EViT + AdaptFormer", "adaptformer", "evit:keep=0.7", 0.16, 11.77, _WIDTH),
    Row("Full tuning + ToMe", "full", "tome:r=8", 85.80, 13.12, _SAME),
    Row("AdaptFormer + ToMe", "adaptformer", "tome:r=8", 0.16, 13.29, _WIDTH),
    Row("DyT r=0.5 + ToMe", "dyt:rate=0.5,recipe=published", "tome:r=7", 0.16, 9.85, _DYT_TOME),
    Row(
        "DynamicViT",
        "full",
        "dynamicvit:keep=0.9/0.7/0.5",
        88.70,
        14.05,
        "printed parameters are rounded, 85.80 + 2.89 (predictors)",
    ),
    Row(
        "DynamicViT + AdaptFormer",
        "adaptformer",
        "dynamicvit:keep=0.9/0.7/0.5",
        3.10,
        14.23,
        f"{_WIDTH}; 2.89 (predictors) + 0.16 is 3.04",
    ),
)


def _cost(method: str, tokens: str | None) -> Cost:
    with shapes_only():
        host = create_backbone(MODEL, pretrained=False, num_classes=CLASSES)
        return cost(tune(host, method, *([tokens] if tokens else [])))
