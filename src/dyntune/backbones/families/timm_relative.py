"""timm's Beit and VisionTransformerRelPos behind the backbone interface: attention with biases of pairs of places."""

from typing import Any, ClassVar

import torch
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Beit
from timm.models.beit import Block as BeitBlock
from timm.models.vision_transformer_relpos import (
    RelPosAttention,
    RelPosBlock,
    ResPostRelPosBlock,
    VisionTransformerRelPos,
)
from torch import Tensor, nn

from dyntune.backbones import timm_blocks
from dyntune.backbones.timm_models import TimmBackbone
from dyntune.core.places import Places
from dyntune.core.tokens import Provenance, Tokens


class TimmRelative(TimmBackbone):
    """A timm Beit or VisionTransformerRelPos as a backbone.

    Args:
        host: the model, one that ``refusal`` has nothing against; used as it is, its parameters stay where they are.
    """

    supported: ClassVar[str] = (
        "timm's Beit and VisionTransformerRelPos, such as BEiT, BEiT v2 and ViT with relative positions"
    )

    @classmethod
    def knows(cls, host: nn.Module) -> bool:
        return isinstance(host, Beit | VisionTransformerRelPos)

    @classmethod
    def refusal(cls, host: nn.Module) -> str | None:
        own: Any = type(host)
        base: Any = Beit if isinstance(host, Beit) else VisionTransformerRelPos
        if any(getattr(own, name) is not getattr(base, name) for name in ("forward_features", "forward_head")):
            return "it overrides forward_features or forward_head"
        blocks = (BeitBlock, RelPosBlock, ResPostRelPosBlock)
        return timm_blocks.refusal(host, blocks, (BeitAttention, RelPosAttention))

    def embed(self, images: Tensor) -> Tokens:
        host = self.host
        self.check_images(images)
        x = host.patch_embed(images)
        if host.cls_token is not None:
            x = torch.cat([host.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        relative = None
        if isinstance(host, Beit):
            x = host.pos_drop(x if host.pos_embed is None else x + host.pos_embed)
            relative = None if host.rel_pos_bias is None else host.rel_pos_bias()
        elif host.shared_rel_pos is not None:
            relative = host.shared_rel_pos.get_bias()[0]
        grid = self.grid_of(x)
        return Tokens(x, host.num_prefix_tokens, grid, provenance=Provenance(), places=Places(), relative=relative)

    @property
    def read_first(self) -> int | None:
        return 1 if self.class_token and self.host.global_pool == "token" else None
