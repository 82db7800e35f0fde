"""timm's NaFlexVit behind the backbone interface, for images of one size."""

from dataclasses import replace
from typing import Any, ClassVar

from timm.layers import Attention as TimmAttention
from timm.layers import AttentionRope
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from dyntune.backbones import timm_blocks
from dyntune.backbones.sites import Site
from dyntune.backbones.timm_models import PATCH_DROP, TimmRotary, rotation
from dyntune.core.errors import BackboneError
from dyntune.core.places import Places
from dyntune.core.tokens import Provenance, Tokens
from dyntune.data.transforms import Preprocessing


class TimmNaFlex(TimmRotary):
    """A timm NaFlexVit as a backbone: images ``(B, 3, height, width)``, not patches with coordinates.

    Args:
        host: the model, one that ``refusal`` has nothing against; used as it is, its parameters stay where they are.
    """

    supported: ClassVar[str] = "timm's NaFlexVit without gated attention, on images of one size"

    @classmethod
    def knows(cls, host: nn.Module) -> bool:
        return isinstance(host, NaFlexVit)

    @classmethod
    def refusal(cls, host: nn.Module) -> str | None:
        own: Any = type(host)
        if any(getattr(own, name) is not getattr(NaFlexVit, name) for name in ("forward_features", "forward_head")):
            return "it overrides forward_features or forward_head"
        if host.patch_drop is not None:
            return PATCH_DROP
        return timm_blocks.refusal(host, (TimmBlock, EvaBlock), (TimmAttention, EvaAttention, AttentionRope))

    def embed(self, images: Tensor) -> Tokens:
        host, channels = self.host, self.image_shape[0]
        if images.ndim != 4 or images.shape[1] != channels:
            raise BackboneError(f"expected images of shape (B, {channels}, height, width); given {images.shape}.")
        x, grid = host.embeds(images)
        table = None if host.rope is None else host.rope.get_embed(shape=grid)
        return Tokens(
            host.norm_pre(x),
            host.num_prefix_tokens,
            (int(grid[0]), int(grid[1])),
            provenance=Provenance(),
            places=Places(),
            rotation=rotation(table, getattr(host.blocks[0].attn, "rotate_half", False)),
        )

    @property
    def patch_site(self) -> Site:
        return Site("patch", None, "embeds.proj", self.host.embeds, "proj")

    @property
    def read_first(self) -> int | None:
        return 1 if self.class_token and self.host.global_pool == "token" else None

    @property
    def class_token(self) -> bool:
        return self.host.has_class_token

    @property
    def image_shape(self) -> tuple[int, int, int]:
        embeds = self.host.embeds
        config = getattr(self.host, "pretrained_cfg", None) or {}
        rows, columns = embeds.pos_embed_grid_size or (16, 16)
        height, width = embeds.patch_size
        size = config.get("input_size", (3, rows * height, columns * width))[1:]
        return self.host.in_chans, *size

    @property
    def built_size(self) -> tuple[int, int]:
        return self.image_shape[1:]

    def preprocessing(self) -> Preprocessing:
        return replace(super().preprocessing(), size=self.built_size)

    @property
    def grid(self) -> tuple[int, int]:
        return self.host.embeds.dynamic_feat_size(self.image_shape[1:])
