"""timm's blocks, read as hosted sub-layers: its attentions and MLPs have other names in each of its files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from timm.layers import GluMlp, SwiGLU
from timm.layers import Mlp as TimmMlp
from timm.models.eva import EvaBlockPostNorm
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.vision_transformer import ResPostBlock
from timm.models.vision_transformer_relpos import ResPostRelPosBlock
from timm.models.vitamin import GeGluMlp
from torch import Tensor

from dyntune.backbones.hosted import Chain, HostedAttention, HostedMlp, HostedWhole, Ref
from dyntune.backbones.sites import Changed, Site, SiteKind
from dyntune.backbones.units import Attention, Block
from dyntune.core.tokens import Tokens

_FIRST = ("fc1", "fc1_g", "fc1_x", "w0", "w1")
_SECOND = ("fc2", "w2")
"""Names of an MLP's maps to the hidden layer and from it."""
_NORMS_BEHIND = (EvaBlockPostNorm, ResPostBlock, ResPostRelPosBlock, SwinTransformerV2Block)
"""Blocks whose norms stand behind attention and MLP, instead of in front of them."""


def named(host: Any) -> Iterator[tuple[str, Any]]:
    """Every block of a host by its name there, in the order of a forward pass: in ``blocks``, or stage by stage."""
    if hasattr(host, "blocks"):
        yield from ((f"blocks.{index}", one) for index, one in enumerate(host.blocks))
        return
    for number, stage in enumerate(host.layers):
        yield from ((f"layers.{number}.blocks.{index}", one) for index, one in enumerate(stage.blocks))


def refusal(host: Any, blocks: tuple[type, ...], attentions: tuple[type, ...]) -> str | None:
    """Why a host's blocks cannot be read; None if they can.

    Args:
        host: timm's model.
        blocks: classes of blocks that can.
        attentions: of attentions.
    """
    if any(isinstance(module, Changed) for module in host.modules()):
        return "another tuned model has changed its modules; build a backbone for each"
    for name, one in named(host):
        if type(one) not in blocks:
            return f"{name} is a {type(one).__name__}"
        if type(one.attn) not in attentions:
            return f"{name}.attn is a {type(one.attn).__name__}"
        if getattr(one.attn, "gate", None) is not None:
            return f"{name}.attn is gated"
        if not isinstance(one.mlp, TimmMlp | GluMlp | SwiGLU | GeGluMlp):
            return f"{name}.mlp is a {type(one.mlp).__name__}"
    return None


def block(
    index: int,
    host: Any,
    width: int,
    *,
    name: str = "",
    whole: Callable[[Tensor], Tensor] | None = None,
    before: Callable[[Tokens], Tokens] | None = None,
) -> Block:
    """A block of two sub-layers, each between a norm and a drop path.

    Args:
        index: its number.
        host: timm's block.
        width: channels C of its tokens.
        name: of the block in its model, where it is not ``blocks.INDEX``.
        whole: a method of the host's block that computes the attention as a whole, as ``HostedWhole`` takes it.
        before: what the host does in front of the block.
    """
    path = name or f"blocks.{index}"
    norms = [_site("norm1", index, path, host), _site("norm2", index, path, host)]
    norm_first = not isinstance(host, _NORMS_BEHIND)
    behind: list[Chain] = []
    for number, norm in enumerate(norms, start=1):
        factors = (Ref(host, f"ls{number}", "gamma"), Ref(host, f"gamma_{number}", "gamma"))
        links = (*factors, *(() if norm_first else (norm,)), Ref(host, f"drop_path{number}"))
        behind.append([link for link in links if isinstance(link, Site) or hasattr(host, link.attribute)])
    attn_norm, mlp_norm = norms if norm_first else (None, None)
    attn: Attention
    if whole is None:
        attn = _attention(index, width, f"{path}.attn", host.attn, attn_norm, behind[0])
    else:
        attn = _whole(index, width, f"{path}.attn", host.attn, attn_norm, behind[0], whole)
    return Block(index, attn, _mlp(index, width, f"{path}.mlp", host, mlp_norm, behind[1]), before)


def _site(kind: SiteKind, index: int, path: str, owner: Any, name: str = "", biases: tuple[str, ...] = ()) -> Site:
    name = name or kind
    return Site(kind, index, f"{path}.{name}", owner, name, biases=biases)


def _biases(attn: Any) -> tuple[str, ...]:
    """Names of the biases that stand beside an attention's map to queries, keys and values."""
    return ("q_bias", "k_bias", "v_bias") if hasattr(attn, "q_bias") else ()


def _whole(
    index: int,
    width: int,
    path: str,
    attn: Any,
    norm: Site | None,
    behind: Chain,
    whole: Callable[[Tensor], Tensor],
) -> HostedWhole:
    qkv = Site("qkv", index, f"{path}.qkv", attn, "qkv", biases=_biases(attn), host_adds=True)
    out = _site("proj", index, path, attn)
    return HostedWhole(f"blocks.{index}.attn", width, norm=norm, qkv=qkv, out=out, whole=whole, chain=behind)


def _attention(index: int, width: int, path: str, attn: Any, norm: Site | None, behind: Chain) -> HostedAttention:
    if attn.qkv is not None:
        maps = [_site("qkv", index, path, attn, biases=_biases(attn))]
    else:
        maps = [_site("q", index, path, attn, "q_proj"), _site("k", index, path, attn, "k_proj")]
        maps.append(_site("v", index, path, attn, "v_proj"))
    out = _site("proj", index, path, attn)
    inner, q_norm, k_norm = (Ref(attn, name) if hasattr(attn, name) else None for name in ("norm", "q_norm", "k_norm"))
    return HostedAttention(
        f"blocks.{index}.attn",
        width,
        head_width=out.inputs // attn.num_heads,
        norm=norm,
        maps=maps,
        chain=(*((inner,) if inner else ()), out, Ref(attn, "proj_drop"), *behind),
        out=out,
        q_norm=q_norm,
        k_norm=k_norm,
        dropout=Ref(attn, "attn_drop"),
        table=index,
        relative=_relative(attn),
    )


def _relative(attn: Any) -> Callable[[], Tensor] | None:
    """What gives the bias of an attention's pairs of places, in BEiT's and in VisionTransformerRelPos's form."""
    if getattr(attn, "rel_pos", None) is not None:
        return attn.rel_pos.get_bias
    return attn._get_rel_pos_bias if getattr(attn, "relative_position_bias_table", None) is not None else None


def _mlp(index: int, width: int, path: str, host: Any, norm: Site | None, behind: Chain) -> HostedMlp:
    mlp = host.mlp
    maps = [_site("fc1", index, path, mlp, name) for name in _FIRST if hasattr(mlp, name)]
    out = next(_site("fc2", index, path, mlp, name) for name in _SECOND if hasattr(mlp, name))
    layers: Chain = ()
    if type(mlp) is TimmMlp:
        inside = (maps[0], Ref(mlp, "act"), Ref(mlp, "drop1"), Ref(mlp, "norm"), out, Ref(mlp, "drop2"))
        layers = (*inside, *behind)
    chain = (Ref(host, "mlp"), *behind)
    return HostedMlp(f"blocks.{index}.mlp", width, norm=norm, maps=maps, chain=chain, out=out, layers=layers)
