"""What every tuning method offers: which parameters are added, and which are trained."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.parts.spec import Part

Init = Literal["zero", "noah"]


def quick_gelu(x: Tensor) -> Tensor:
    """``x sigmoid(1.702 x)``, the approximation of GELU that CLIP made common."""
    return x * (1.702 * x).sigmoid()


def initialise_bottleneck(down: nn.Linear, up: nn.Linear, init: Init) -> None:
    """Starts two projections with biases: "zero" as no update, "noah" as its code does."""
    if init == "noah":
        nn.init.trunc_normal_(down.weight, std=0.02)
        nn.init.trunc_normal_(up.weight, std=0.02)
    else:
        nn.init.xavier_uniform_(down.weight)
        nn.init.zeros_(up.weight)
    nn.init.zeros_(down.bias)
    nn.init.zeros_(up.bias)


def initialise_low_rank(down: nn.Linear, up: nn.Linear, init: Init) -> None:
    """Starts the two factors of a low-rank update: "zero" as no update, "noah" as its code does."""
    if init == "noah":
        nn.init.trunc_normal_(down.weight, std=0.02)
        nn.init.trunc_normal_(up.weight, std=0.02)
    else:
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)


def initialise_tuner(down: nn.Linear, up: nn.Linear, zero: bool) -> None:
    """Starts the two projections of a tuner as Res-Tuning's code does; with ``zero`` as no update."""
    for projection in (down, up):
        nn.init.xavier_uniform_(projection.weight)
        nn.init.normal_(projection.bias, std=1e-6)
    if zero:
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)


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
