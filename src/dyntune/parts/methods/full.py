"""Full tuning: every parameter of the backbone is trained."""

from dataclasses import dataclass
from typing import ClassVar

from dyntune.backbones.base import Backbone
from dyntune.parts.methods.base import TuningMethod


@dataclass(frozen=True)
class Full(TuningMethod):
    """Trains every parameter of the backbone and adds none."""

    source: ClassVar[str] = "baseline"

    def install(self, backbone: Backbone) -> None:
        backbone.host.requires_grad_(True)
