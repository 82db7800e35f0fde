"""timm's VisionTransformer with the standard pre-norm Block, behind the backbone interface."""

from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
from timm.layers import GELU, GELUTanh, GluMlp, LayerScale, QuickGELU, SwiGLU
from timm.layers import Attention as TimmAttention
from timm.layers import Mlp as TimmMlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dyntune.backbones.sites import Changed, QueriesApart, Site, SiteKind
from dyntune.backbones.timm_models import TimmBackbone
from dyntune.backbones.units import Attention, Block, Mlp, MlpParts, Nonlinearity
from dyntune.core.errors import BackboneError
from dyntune.core.tokens import Provenance, Tokens

_BLOCK_SITES: tuple[tuple[SiteKind, str, str], ...] = (
    ("norm1", "", "norm1"),
    ("qkv", "attn", "qkv"),
    ("proj", "attn", "proj"),
    ("norm2", "", "norm2"),
    ("fc1", "mlp", "fc1"),
    ("fc1", "mlp", "fc1_g"),
    ("fc1", "mlp", "fc1_x"),
    ("fc2", "mlp", "fc2"),
)
"""Kind, module of timm's block, and attribute of each site."""


class _HostedAttention(Attention):
    host: Any

    def __init__(self, path: str, width: int, host: TimmBlock) -> None:
        super().__init__(path, width)
        # Not registered: the host owns its modules, and they must not appear twice in the state dict.
        object.__setattr__(self, "host", host)

    def norm(self, x: Tensor) -> Tensor:
        return self.host.norm1(x)

    @property
    def drop_path_rate(self) -> float:
        return float(getattr(self.host.drop_path1, "drop_prob", 0.0))

    def project(self, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        attn = self.host.attn
        qkv = attn.qkv(self.normed(tokens)).unflatten(-1, (3, attn.num_heads, attn.head_dim))
        q, k, v = qkv.unbind(-3)
        return attn.q_norm(q), attn.k_norm(k), v

    def split_queries(self) -> bool:
        self.host.attn.qkv = QueriesApart(self.host.attn.qkv)
        return True

    def project_first(self, tokens: Tokens, count: int) -> tuple[Tensor, Tensor, Tensor]:
        attn, normed = self.host.attn, self.normed(tokens)
        q = attn.qkv.queries(normed[:, :count]).unflatten(-1, (attn.num_heads, attn.head_dim))
        k, v = attn.qkv.keys_values(normed).unflatten(-1, (2, attn.num_heads, attn.head_dim)).unbind(-3)
        return attn.q_norm(q), attn.k_norm(k), v

    def combine(self, attended: Tensor) -> Tensor:
        host = self.host
        return host.drop_path1(host.ls1(host.attn.proj_drop(host.attn.proj(host.attn.norm(attended)))))

    @property
    def head_width(self) -> int:
        return self.host.attn.head_dim

    @property
    def attention_dropout(self) -> float:
        return self.host.attn.attn_drop.p if self.training else 0.0


class _HostedMlp(Mlp):
    host: Any

    def __init__(self, path: str, width: int, host: TimmBlock) -> None:
        super().__init__(path, width)
        object.__setattr__(self, "host", host)

    def norm(self, x: Tensor) -> Tensor:
        return self.host.norm2(x)

    @property
    def drop_path_rate(self) -> float:
        return float(getattr(self.host.drop_path2, "drop_prob", 0.0))

    @property
    def parts(self) -> MlpParts | None:
        host, mlp = self.host, self.host.mlp
        if type(mlp) is not TimmMlp or not isinstance(host.ls2, nn.Identity) or not isinstance(mlp.norm, nn.Identity):
            return None
        nonlinearity = _nonlinearity(mlp.act)
        linear = type(mlp.fc1) is nn.Linear and type(mlp.fc2) is nn.Linear
        if not linear or nonlinearity is None or not isinstance(host.norm2, nn.LayerNorm):
            return None
        return MlpParts(host.norm2, mlp.fc1, nonlinearity, mlp.fc2)

    def transform(self, normed: Tensor) -> Tensor:
        host = self.host
        return host.drop_path2(host.ls2(host.mlp(normed)))


def _nonlinearity(module: nn.Module) -> Nonlinearity | None:
    """The name of an MLP's nonlinearity, if it has one."""
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    names: dict[type[nn.Module], Nonlinearity] = {GELU: "gelu", GELUTanh: "gelu_tanh", QuickGELU: "quick_gelu"}
    return names.get(type(module))


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
        width = self.host.embed_dim
        self.blocks = nn.ModuleList(  # type: ignore[assignment]
            Block(
                index,
                _HostedAttention(f"blocks.{index}.attn", width, block),
                _HostedMlp(f"blocks.{index}.mlp", width, block),
            )
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

    def finish(self, tokens: Tokens) -> Tokens:
        # The norm sees the prompts too, as in the published models, whose MACs are counted so.
        return tokens.with_x(self.host.norm(tokens.x)).without_prompts()

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

    def fold_factors(self) -> None:
        for block in self.host.blocks:
            for scale, linear in (("ls1", block.attn.proj), ("ls2", block.mlp.fc2)):
                layer_scale = getattr(block, scale)
                if isinstance(layer_scale, LayerScale) and type(linear) is nn.Linear:
                    with torch.no_grad():
                        linear.weight.mul_(layer_scale.gamma.unsqueeze(1))
                        if linear.bias is not None:
                            linear.bias.mul_(layer_scale.gamma)
                    setattr(block, scale, nn.Identity())

    @property
    def class_token(self) -> bool:
        return self.host.cls_token is not None

    def all_sites(self) -> Iterator[Site]:
        host = self.host
        yield Site("patch", None, "patch_embed.proj", host.patch_embed, "proj")
        for index, block in enumerate(host.blocks):
            for kind, part, attribute in _BLOCK_SITES:
                owner = cast(nn.Module, block.get_submodule(part))
                if hasattr(owner, attribute):
                    path = ".".join(filter(None, ("blocks", str(index), part, attribute)))
                    yield Site(kind, index, path, owner, attribute)
        yield Site("norm", None, "norm", host, "norm")
        yield Site("norm", None, "fc_norm", host, "fc_norm")

    @property
    def heads(self) -> tuple[nn.Module, ...]:
        head = self.host.get_classifier()
        return tuple(head) if isinstance(head, tuple) else (head,)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        height, width = self.host.patch_embed.img_size or self.host.pretrained_cfg["input_size"][1:]
        return self.host.in_chans, height, width

    @property
    def grid(self) -> tuple[int, int]:
        return self.host.patch_embed.dynamic_feat_size(self.image_shape[1:])

    @property
    def gradient_checkpointing(self) -> bool:
        return self.host.grad_checkpointing and torch.is_grad_enabled()

    def switch_gradient_checkpointing(self, on: bool) -> None:
        self.host.set_grad_checkpointing(on)
