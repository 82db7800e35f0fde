"""timm's Eva behind the backbone interface: rotary embeddings, biases beside their maps, gated MLPs."""

from typing import Any, ClassVar

from timm.layers import AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from dyntune.backbones import timm_blocks
from dyntune.backbones.timm_models import PATCH_DROP, TimmRotary, rotation
from dyntune.core.places import Places
from dyntune.core.tokens import Provenance, Tokens


class TimmEva(TimmRotary):
    """A timm Eva as a backbone.

    Args:
        host: the model, one that ``refusal`` has nothing against; used as it is, its parameters stay where they are.
    """

    supported: ClassVar[str] = (
        "timm's Eva without gated attention, such as EVA, EVA02, DINOv3, the Perception Encoder, RoPE-ViT and Sapiens2"
    )

    @classmethod
    def knows(cls, host: nn.Module) -> bool:
        return isinstance(host, Eva)

    @classmethod
    def refusal(cls, host: nn.Module) -> str | None:
        own: Any = type(host)
        if any(getattr(own, name) is not getattr(Eva, name) for name in ("forward_features", "forward_head", "pool")):
            return "it overrides forward_features, forward_head or pool"
        if host.patch_drop is not None:
            return PATCH_DROP
        return timm_blocks.refusal(host, (EvaBlock, EvaBlockPostNorm), (EvaAttention, AttentionRope))

    def embed(self, images: Tensor) -> Tokens:
        host = self.host
        self.check_images(images)
        embedded = host.patch_embed(images)
        x, table = host._pos_embed(embedded)
        return Tokens(
            host.norm_pre(x),
            host.num_prefix_tokens,
            self.grid_of(embedded),
            provenance=Provenance(),
            places=Places(),
            rotation=rotation(table, host.blocks[0].attn.rotate_half),
        )

    @property
    def pools_prefix(self) -> bool:
        return self.host.attn_pool is not None

    @property
    def read_first(self) -> int | None:
        plain = not any(name in vars(self.host) for name in ("pool", "forward_head"))
        return 1 if self.class_token and self.host.global_pool == "token" and plain else None
