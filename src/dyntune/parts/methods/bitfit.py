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
        # By role, not by name: a table of relative positions is called a bias too, and is none of a map or norm.
        names = {"bias", "in_proj_bias", *(name for site in backbone.sites() for name in site.biases)}
        named = backbone.host.named_parameters()
        biases = [p for name, p in named if name.rpartition(".")[2] in names and p.ndim == 1]
        head = {id(p) for head in backbone.heads for p in head.parameters()}
        if all(id(p) in head for p in biases):
            raise BackboneError("bitfit trains biases, but this backbone has none outside its head; use linear.")
        for bias in biases:
            bias.requires_grad_(True)
