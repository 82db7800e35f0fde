"""What every tuning method offers: which parameters are added, and which are trained."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dyntune.backbones.base import Backbone
from dyntune.parts.spec import Part


def quick_gelu(x: Tensor) -> Tensor:
    """``x sigmoid(1.702 x)``, the approximation of GELU that CLIP made common."""
    return x * (1.702 * x).sigmoid()


@dataclass(frozen=True)
class TuningMethod(Part):
    """A configuration whose ``install`` adds modules to a backbone, or unfreezes parameters of it.

    When ``install`` is called the whole backbone but its head is frozen. What it adds is trained and saved.

    Attributes:
        stays: why the method's modules remain after a merge; None if all of it folds into the host's weights.
    """

    stays: ClassVar[str | None] = None

    def install(self, backbone: Backbone) -> None:
        """Adds this method's modules to ``backbone`` in place.

        Raises:
            BackboneError: the method is not defined on this backbone.
        """
        raise NotImplementedError
