"""timm's VisionTransformer with the standard pre-norm Block, behind the backbone interface."""

from typing import ClassVar

import torch
from timm.layers import Attention as TimmAttention
from timm.layers import GluMlp, SwiGLU
from timm.layers import Mlp as TimmMlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dyntune.backbones import timm_blocks
from dyntune.backbones.sites import Changed
from dyntune.backbones.timm_models import TimmBackbone
from dyntune.core.errors import BackboneError
from dyntune.core.tokens import Provenance, Tokens


class TimmViT(TimmBackbone):
    """A timm VisionTransformer as a backbone.

    Args:
        host: the model, one that ``refusal`` has nothing against; used as it is, its parameters stay where they are.
    """

    host: VisionTransformer
    supported: ClassVar[str] = (
        "timm's VisionTransformer with its standard pre-norm Block, such as "
        "ViT Ti/S/B/L/H, DeiT, AugReg, DINO, DINOv2, CLIP and SigLIP"
    )

    def __init__(self, host: nn.Module) -> None:
        super().__init__(host)
        self.blocks = nn.ModuleList(  # type: ignore[assignment]
            timm_blocks.block(index, block, self.host.embed_dim, factors=("ls1", "ls2"))
            for index, block in enumerate(self.host.blocks)
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
            return "it drops patches at random (patch_drop_rate); build it with patch_drop_rate=0"
        if any(isinstance(module, Changed) for module in host.modules()):
            return "another tuned model has changed its modules; build a backbone for each"
        for index, block in enumerate(host.blocks):
            if type(block) is not TimmBlock:
                return f"blocks.{index} is a {type(block).__name__}"
            if type(block.attn) is not TimmAttention:
                return f"blocks.{index}.attn is a {type(block.attn).__name__}"
            if getattr(block.attn, "gate", None) is not None:
                return f"blocks.{index}.attn is gated"
            if not isinstance(block.mlp, TimmMlp | GluMlp | SwiGLU):
                return f"blocks.{index}.mlp is a {type(block.mlp).__name__}"
        return None

    def embed(self, images: Tensor) -> Tokens:
        host = self.host
        channels, height, width = self.image_shape
        if images.ndim != 4 or images.shape[1] != channels:
            raise BackboneError(f"expected images of shape (B, {channels}, {height}, {width}); given {images.shape}.")
        if not host.dynamic_img_size and images.shape[2:] != (height, width):
            raise BackboneError(
                f"the backbone was built for images of {height} x {width} pixels; given {tuple(images.shape[2:])}. "
                "Resize the images, or build the backbone with img_size=... or dynamic_img_size=True."
            )
        embedded = host.patch_embed(images)
        grid = tuple(embedded.shape[1:3]) if host.dynamic_img_size else host.patch_embed.grid_size
        x = host.norm_pre(host._pos_embed(embedded))
        # Sources are given, not left to the default, which torch.compile cannot trace.
        return Tokens(x, host.num_prefix_tokens, (int(grid[0]), int(grid[1])), provenance=Provenance())

    def readout(self, tokens: Tokens) -> Tensor:
        host = self.host
        if not host.global_pool and tokens.provenance.owner is not None:  # the head reads every patch
            tokens = tokens.with_x(torch.cat([tokens.x[:, : tokens.prefix], tokens.on_grid().flatten(2).mT], dim=1))
        weights = tokens.provenance.weights
        if weights is None or host.global_pool in ("", "token"):
            return host.forward_head(tokens.x)
        return host.head(host.head_drop(host.fc_norm(self._pooled(tokens, weights))))

    def _pooled(self, tokens: Tokens, weights: Tensor) -> Tensor:
        """The host's pooling, ``(B, C)``, with weights ``(B, P)`` of the patches."""
        host, x = self.host, tokens.x
        weights = tokens.cover_prefix(weights).to(x.dtype)
        if not host.pool_include_prefix:
            x, weights = x[:, tokens.prefix :], weights[:, tokens.prefix :]
        if host.attn_pool is not None:
            return host.attn_pool(x, attn_mask=weights.clamp_min(torch.finfo(weights.dtype).tiny).log()[:, None, None])
        mean = (x * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True)
        most = x.masked_fill(weights.unsqueeze(-1) <= 0, -torch.inf).amax(1)
        return {"avg": mean, "max": most, "avgmax": 0.5 * (mean + most)}[host.global_pool]

    @property
    def head_reads_grid(self) -> bool:
        return not self.host.global_pool

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
