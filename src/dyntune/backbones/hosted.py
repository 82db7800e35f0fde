"""Attention and MLP sub-layers made of a host's own modules, which a family names by their roles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.layers import GELU, GELUTanh, QuickGELU
from torch import Tensor, nn

from dyntune.backbones.sites import JointSite, QueriesApart, Site
from dyntune.backbones.units import Attention, Block, Mlp, MlpParts, Nonlinearity, OpaqueAttention
from dyntune.core.tokens import Tokens


@dataclass(frozen=True)
class Ref:
    """A module or a vector of the host, under the name that its owner has for it; what stands there now is meant.

    Args:
        owner: the host's module that holds it.
        attribute: under which name; None may stand there, for nothing.
        vector: name of the parameter by which the module there, if it has one, multiplies each channel (LayerScale).
    """

    owner: nn.Module
    attribute: str
    vector: str = ""

    @property
    def now(self) -> Any:
        """What stands there."""
        return getattr(self.owner, self.attribute)

    def __call__(self, x: Tensor) -> Tensor:
        now = self.now
        if now is None:
            return x
        return x * now if isinstance(now, Tensor) else now(x)

    @property
    def factor(self) -> Tensor | None:
        """What each channel is multiplied by, ``(C,)``, if that is what it does."""
        now = self.now
        return now if isinstance(now, Tensor) else getattr(now, self.vector, None) if self.vector else None

    def clear(self) -> None:
        """Leaves nothing there: what a factor did has been written into the weights before it."""
        setattr(self.owner, self.attribute, None if isinstance(self.now, Tensor) else nn.Identity())


Chain = Sequence[Site | Ref]
"""What a token goes through, one after the other; sites are those of linear maps and norms."""


def _through(chain: Chain, x: Tensor) -> Tensor:
    for link in chain:
        x = link(x)
    return x


def _live(link: Site | Ref) -> Any:
    return link.now if isinstance(link, Ref) else getattr(link.owner, link.attribute)


def _drop_path_rate(chain: Chain) -> float:
    return float(max(getattr(_live(link), "drop_prob", None) or 0.0 for link in chain))


def _fold(chain: Chain, out: Site) -> None:
    """Writes what the chain multiplies the update by into its last linear map, if nothing is put on that."""
    for link in chain:
        factor = link.factor if isinstance(link, Ref) else None
        if factor is None or not out.plain:
            continue
        with torch.no_grad():
            linear = cast(nn.Linear, out.module)
            linear.weight.mul_(factor.unsqueeze(1))
            if linear.bias is not None:
                linear.bias.mul_(factor)
        cast(Ref, link).clear()


class _OfModules:
    """What attention and MLP have in common where they are made of the host's modules."""

    norm_site: Site | None
    maps: tuple[Site, ...]
    chain: Chain
    out: Site

    @property
    def norm_first(self) -> bool:
        return self.norm_site is not None

    def norm(self, x: Tensor) -> Tensor:
        return x if self.norm_site is None else self.norm_site(x)

    @property
    def drop_path_rate(self) -> float:
        return _drop_path_rate(self.chain)

    def fold_factors(self) -> None:
        """Writes what the update is multiplied by, and biases that stand beside their maps, into the maps."""
        _fold(self.chain, self.out)
        for site in self.maps:
            if site.plain and site.biases and site.bias is not None:
                site.set_bias(site.bias)


class HostedAttention(_OfModules, Attention):
    """An attention sub-layer made of the host's modules.

    ``x`` goes through ``norm``; ``maps`` give queries, keys and values, which ``q_norm`` and ``k_norm`` see head by
    head; behind the softmax comes ``chain``, in which ``out`` is.

    Args:
        path: where it stands, for instance ``blocks.3.attn``.
        width: channels C of its tokens.
        head_width: channels D of one head; keys and values may have fewer heads than queries.
        norm: in front; None where the host has it behind, in ``chain``.
        maps: one site ``qkv``, in thirds, or the three ``q``, ``k`` and ``v``.
        chain: from the heads' outputs to the update: inner norm, output map, dropout, LayerScale, norm, drop path.
        out: the output map.
        q_norm: of each query head.
        k_norm: of each key head.
        dropout: of attention weights: a module with a probability ``p``, or the probability.
        table: its number among the attentions, where each has rotations of its own.
        relative: gives what is added to the logits of the host's own prefix tokens and the image's patches,
            ``(H, own + P, own + P)``, maybe in a batch of one; a method of a module of the host.
    """

    def __init__(
        self,
        path: str,
        width: int,
        *,
        head_width: int,
        norm: Site | None,
        maps: Sequence[Site],
        chain: Chain,
        out: Site,
        q_norm: Ref | None = None,
        k_norm: Ref | None = None,
        dropout: Ref | None = None,
        table: int = 0,
        relative: Callable[[], Tensor] | None = None,
    ) -> None:
        super().__init__(path, width)
        # None of the host's modules is registered here: they must not appear twice in the state dict.
        self._head_width = head_width
        self.norm_site = norm
        self.maps = tuple(maps)
        self.qkv = self.maps[0] if len(self.maps) == 1 else JointSite.of(self.maps)
        self.chain = tuple(chain)
        self.out = out
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.dropout = dropout
        self.table = table
        self.own_relative = relative

    def project(self, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        normed = self.normed(tokens)
        if isinstance(self.qkv, JointSite):
            q, k, v = (y.unflatten(-1, (-1, self._head_width)) for y in self.qkv.outputs((normed,) * 3))
        else:
            q, k, v = self.qkv(normed).unflatten(-1, (3, -1, self._head_width)).unbind(-3)
        return self._head_norms(q, k, v)

    def _head_norms(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q if self.q_norm is None else self.q_norm(q), k if self.k_norm is None else self.k_norm(k), v

    def split_queries(self) -> bool:
        if not isinstance(self.qkv, JointSite):
            setattr(self.qkv.owner, self.qkv.attribute, QueriesApart(cast(nn.Linear, self.qkv.module)))
        return True

    def project_first(self, tokens: Tokens, count: int) -> tuple[Tensor, Tensor, Tensor]:
        normed, width = self.normed(tokens), self._head_width
        if not isinstance(self.qkv, JointSite):
            apart = _live(self.qkv)
            q = apart.queries(normed[:, :count]).unflatten(-1, (-1, width))
            k, v = apart.keys_values(normed).unflatten(-1, (2, -1, width)).unbind(-3)
        else:
            outputs = self.qkv.outputs((normed[:, :count], normed, normed))
            q, k, v = (y.unflatten(-1, (-1, width)) for y in outputs)
        return self._head_norms(q, k, v)

    def relative(self, tokens: Tokens) -> Tensor | None:
        shared = super().relative(tokens)
        if self.own_relative is None:
            return shared
        own = self.own_relative()
        own = own[0] if own.ndim == 4 else own
        return own if shared is None else own + shared

    def combine(self, attended: Tensor) -> Tensor:
        return _through(self.chain, attended)

    @property
    def head_width(self) -> int:
        return self._head_width

    @property
    def attention_dropout(self) -> float:
        if self.dropout is None or not self.training:
            return 0.0
        return float(getattr(self.dropout.now, "p", self.dropout.now))


class HostedWhole(_OfModules, OpaqueAttention):
    """An attention sub-layer that a method of the host computes as a whole, with the host's modules around it.

    ``x`` goes through ``norm``, ``whole`` and ``chain``.

    Args:
        path: where it stands, for instance ``blocks.3.attn``.
        width: channels C of its tokens.
        norm: in front; None where the host has it behind, in ``chain``.
        qkv: the map to queries, keys and values in ``whole``.
        out: the output map in ``whole``.
        whole: a method of a module of the host that calls these maps as modules, ``(B, rows, columns, C)`` to the same.
        chain: from there to the update: norm, drop path.
    """

    def __init__(
        self,
        path: str,
        width: int,
        *,
        norm: Site | None,
        qkv: Site,
        out: Site,
        whole: Callable[[Tensor], Tensor],
        chain: Chain,
    ) -> None:
        super().__init__(path, width)
        self.norm_site = norm
        self.qkv = qkv
        self.maps = (qkv,)
        self.out = out
        self.whole = whole
        self.chain = tuple(chain)

    def attended(self, normed: Tensor, grid: tuple[int, int]) -> Tensor:
        return _through(self.chain, self.whole(normed.unflatten(1, grid)).flatten(1, 2))


class HostedMlp(_OfModules, Mlp):
    """An MLP sub-layer made of the host's modules: ``x`` goes through ``norm``, then through ``chain``.

    Args:
        path: where it stands, for instance ``blocks.3.mlp``.
        width: channels C of its tokens.
        norm: in front; None where the host has it behind, in ``chain``.
        maps: the linear maps to the hidden layer: one, or in a gated MLP one or two.
        chain: from the norm's output to the update; a host's MLP may be one link of it.
        out: the linear map from the hidden layer.
        layers: the chain in as many links as there are layers, where the host's MLP is one link; kernels compute an MLP
            in which these are map, activation and map, besides what does nothing in evaluation.
    """

    def __init__(
        self,
        path: str,
        width: int,
        *,
        norm: Site | None,
        maps: Sequence[Site],
        chain: Chain,
        out: Site,
        layers: Chain = (),
    ) -> None:
        super().__init__(path, width)
        self.norm_site = norm
        self.maps = tuple(maps)
        self.chain = tuple(chain)
        self.out = out
        self.layers = tuple(layers) or self.chain

    @property
    def parts(self) -> MlpParts | None:
        norm = None if self.norm_site is None else _live(self.norm_site)
        live = [_live(link) for link in self.layers]
        links = [link for link in live if link is not None and not _idle(link)]
        if not isinstance(norm, nn.LayerNorm) or len(links) != 3:
            return None
        first, activation, second = links
        nonlinearity = _nonlinearity(activation)
        if type(first) is not nn.Linear or nonlinearity is None or type(second) is not nn.Linear:
            return None
        return MlpParts(norm, first, nonlinearity, second)

    def transform(self, normed: Tensor) -> Tensor:
        return _through(self.chain, normed)


def _idle(link: Any) -> bool:
    """Whether a link does nothing in evaluation."""
    return isinstance(link, nn.Identity | nn.Dropout) or hasattr(link, "drop_prob")


def _nonlinearity(module: Any) -> Nonlinearity | None:
    """The name of an MLP's nonlinearity, if it has one."""
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    names: dict[type[nn.Module], Nonlinearity] = {GELU: "gelu", GELUTanh: "gelu_tanh", QuickGELU: "quick_gelu"}
    return names.get(type(module))


def block_sites(block: Block) -> Iterator[Site]:
    """The sites of a block of hosted sub-layers, in the order of a forward pass, but for norms that stand behind."""
    attn, mlp = cast("HostedAttention | HostedWhole", block.attn), cast(HostedMlp, block.mlp)
    for part, maps in ((attn, (attn.qkv,)), (mlp, mlp.maps)):
        behind = [link for link in part.chain if isinstance(link, Site) and link.kind in ("norm1", "norm2")]
        yield from (() if part.norm_site is None else (part.norm_site,))
        yield from (*maps, part.out, *behind)


def fold_factors(blocks: Sequence[Block]) -> None:
    """``Backbone.fold_factors`` of a host whose blocks have hosted sub-layers."""
    for block in blocks:
        for part in (block.attn, block.mlp):
            cast(_OfModules, part).fold_factors()
