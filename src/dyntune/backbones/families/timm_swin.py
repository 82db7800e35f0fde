"""timm's SwinTransformer and SwinTransformerV2 behind the backbone interface: stages, and attention in windows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from timm.models import swin_transformer as v1
from timm.models import swin_transformer_v2 as v2
from torch import Tensor, nn

from dyntune.backbones import timm_blocks
from dyntune.backbones.hosted import block_sites
from dyntune.backbones.sites import Site
from dyntune.backbones.timm_models import TimmBackbone
from dyntune.backbones.units import Block
from dyntune.core.errors import BackboneError
from dyntune.core.places import Places
from dyntune.core.tokens import Provenance, Tokens


@dataclass(frozen=True)
class Merging:
    """What stands in front of a stage but the first: it makes one token, of another width, of each two by two.

    Args:
        name: of the stage in its model.
        stage: timm's, with ``downsample``.
    """

    name: str
    stage: Any

    def __call__(self, tokens: Tokens) -> Tokens:
        x = self.stage.downsample(tokens.x.unflatten(1, tokens.grid))
        grid = (int(x.shape[1]), int(x.shape[2]))
        row, column = (torch.arange(size, device=x.device) // 2 for size in tokens.grid)
        return tokens.with_cells(x.flatten(1, 2), grid, (row.unsqueeze(1) * grid[1] + column).flatten())

    @property
    def site(self) -> Site:
        """Its norm. The map between the widths has no site: the published SSF leaves it alone, too."""
        return Site("norm", None, f"{self.name}.downsample.norm", self.stage.downsample, "norm")


class TimmSwin(TimmBackbone):
    """A timm SwinTransformer or SwinTransformerV2 as a backbone.

    Args:
        host: the model, one that ``refusal`` has nothing against; used as it is, its parameters stay where they are.
    """

    supported: ClassVar[str] = "timm's SwinTransformer and SwinTransformerV2"

    def read_blocks(self) -> Iterator[Block]:
        index = 0
        for number, stage in enumerate(self.host.layers):
            name = f"layers.{number}"
            before = None if isinstance(stage.downsample, nn.Identity) else Merging(name, stage)
            for place, one in enumerate(stage.blocks):
                if isinstance(one.attn, v2.WindowAttention):
                    one.attn.qkv_bias_separate = True  # else it passes over what is put on the map
                yield timm_blocks.block(
                    index,
                    one,
                    one.dim,
                    name=f"{name}.blocks.{place}",
                    whole=one._attn,
                    before=None if place else before,
                )
                index += 1

    @classmethod
    def knows(cls, host: nn.Module) -> bool:
        return isinstance(host, v1.SwinTransformer | v2.SwinTransformerV2)

    @classmethod
    def refusal(cls, host: nn.Module) -> str | None:
        own: Any = type(host)
        base: Any = v1.SwinTransformer if isinstance(host, v1.SwinTransformer) else v2.SwinTransformerV2
        if any(getattr(own, name) is not getattr(base, name) for name in ("forward_features", "forward_head")):
            return "it overrides forward_features or forward_head"
        blocks = (v1.SwinTransformerBlock, v2.SwinTransformerV2Block)
        return timm_blocks.refusal(host, blocks, (v1.WindowAttention, v2.WindowAttention))

    def embed(self, images: Tensor) -> Tokens:
        self.check_images(images)
        x = self.host.patch_embed(images)  # (B, rows, columns, C)
        grid = (int(x.shape[1]), int(x.shape[2]))
        return Tokens(x.flatten(1, 2), 0, grid, provenance=Provenance(), places=Places())

    def readout(self, tokens: Tokens) -> Tensor:
        return self.host.forward_head(tokens.x.unflatten(1, tokens.grid))

    def pooled(self, tokens: Tokens) -> Tensor:
        return self.host.forward_head(tokens.x.unflatten(1, tokens.grid), pre_logits=True)

    def unpooled(self, tokens: Tokens) -> Tensor:
        return super().unpooled(tokens).unflatten(1, tokens.grid)

    def as_finished(self, x: Tensor) -> Tokens:
        if x.ndim != 4:
            raise BackboneError(f"expected tokens (B, rows, columns, C), as forward_features gives; given {x.shape}.")
        grid = (int(x.shape[1]), int(x.shape[2]))
        return Tokens(x.flatten(1, 2), 0, grid, provenance=Provenance(), places=Places())

    @property
    def prefix_tokens(self) -> int:
        return 0

    def all_sites(self) -> Iterator[Site]:
        yield self.patch_site
        yield Site("norm", None, "patch_embed.norm", self.host.patch_embed, "norm")
        for block in self.blocks:
            if isinstance(block.before, Merging):
                yield block.before.site
            yield from block_sites(block)
        yield Site("norm", None, "norm", self.host, "norm")

    @property
    def any_size(self) -> bool:
        return not self.host.patch_embed.strict_img_size

    @property
    def class_token(self) -> bool:
        return False

    @property
    def read_first(self) -> int | None:
        return None

    @property
    def gradient_checkpointing(self) -> bool:
        return torch.is_grad_enabled() and any(stage.grad_checkpointing for stage in self.host.layers)
