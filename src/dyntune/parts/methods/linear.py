"""Linear probe: the backbone stays frozen and only the head is trained."""

from dataclasses import dataclass
from typing import ClassVar

from dyntune.backbones.base import Backbone
from dyntune.parts.methods.base import TuningMethod


@dataclass(frozen=True)
class Linear(TuningMethod):
    """Trains the head alone; the row "Frozen" of the VTAB-1K table."""

    source: ClassVar[str] = "baseline"

    def install(self, backbone: Backbone) -> None:
        """Nothing: the head is trained with every method."""
