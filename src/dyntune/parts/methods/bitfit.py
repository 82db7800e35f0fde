"""BitFit: only the biases of the backbone are trained."""

from dataclasses import dataclass
from typing import ClassVar

from dyntune.backbones.base import Backbone
from dyntune.core.errors import BackboneError
from dyntune.parts.methods.base import TuningMethod


@dataclass(frozen=True)
class BitFit(TuningMethod):
    """Trains every bias of the backbone, those of the norms and of the patch embedding included, and adds nothing.

    A block of width D and MLP width H has ``7 D + H`` biases; the patch embedding and the last norm have D each. The
    keys' share of the query-key-value bias gets no gradient, because softmax does not see it, unless keys are rotated
    or normed; it is counted, as in the published tables.
    """

    source: ClassVar[str] = "Ben Zaken et al., ACL 2022, arXiv 2106.10199; for ViT as in Jia et al., ECCV 2022 (VPT)"

    def install(self, backbone: Backbone) -> None:
        biases = [p for name, p in backbone.host.named_parameters() if name.endswith("bias")]
        head = {id(p) for head in backbone.heads for p in head.parameters()}
        if all(id(p) in head for p in biases):
            raise BackboneError("bitfit trains biases, but this backbone has none outside its head; use linear.")
        for bias in biases:
            bias.requires_grad_(True)
