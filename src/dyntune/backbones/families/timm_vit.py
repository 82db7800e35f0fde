"""timm's VisionTransformer with its standard Block, behind the backbone interface."""

from typing import ClassVar

from timm.layers import Attention as TimmAttention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn

from dyntune.backbones import timm_blocks
from dyntune.backbones.timm_models import PATCH_DROP, TimmBackbone
from dyntune.core.places import Places
from dyntune.core.tokens import Provenance, Tokens


class TimmViT(TimmBackbone):
    """A timm VisionTransformer as a backbone.

    Args:
        host: the model, one that ``refusal`` has nothing against; used as it is, its parameters stay where they are.
    """

    host: VisionTransformer
    supported: ClassVar[str] = (
        "timm's VisionTransformer with its standard Block or one with its norms behind, such as "
        "ViT Ti/S/B/L/H, DeiT, AugReg, DINO, DINOv2, CLIP, SigLIP and ViTamin"
    )

    @classmethod
    def knows(cls, host: nn.Module) -> bool:
        return isinstance(host, VisionTransformer)

    @classmethod
    def refusal(cls, host: nn.Module) -> str | None:
        assert isinstance(host, VisionTransformer)
        if type(host).forward_features is not VisionTransformer.forward_features:
            return "it overrides forward_features"
        if not isinstance(host.patch_drop, nn.Identity):
            return PATCH_DROP
        return timm_blocks.refusal(host, (TimmBlock, ResPostBlock), (TimmAttention,))

    def embed(self, images: Tensor) -> Tokens:
        host = self.host
        self.check_images(images)
        embedded = host.patch_embed(images)
        x = host.norm_pre(host._pos_embed(embedded))
        # Provenance is given, not left to the default, which torch.compile cannot trace.
        return Tokens(x, host.num_prefix_tokens, self.grid_of(embedded), provenance=Provenance(), places=Places())

    @property
    def read_first(self) -> int | None:
        host = self.host
        if not self.class_token or host.global_pool != "token" or host.attn_pool is not None:
            return None
        if (
            any(name in vars(host) for name in ("pool", "forward_head"))
            or type(host).pool is not VisionTransformer.pool
        ):
            return None  # what they read instead is not known
        if type(host).forward_head is VisionTransformerDistilled.forward_head:
            return 2
        return 1 if type(host).forward_head is VisionTransformer.forward_head else None
