"""The narrow interface between a backbone and everything that is put on it.

A host model shows itself as blocks of two residual sub-layers. Methods and policies see these units, never the host's
own attribute names, so another family of hosts is one more file beside ``timm_vit.py``.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn

from dyntune.attention import attend
from dyntune.errors import BackboneError
from dyntune.tokens import Tokens

Where = Literal["mlp", "attn", "attn-mlp", "layer"]
"""Units that a module or a gate is put on: each MLP, each attention, both separately, or the whole block."""


class Unit(nn.Module, abc.ABC):
    """A residual unit, ``x + update(x)``: an attention sub-layer, an MLP sub-layer, or a whole block.

    Args:
        path: where it stands, for instance ``blocks.3.mlp``.
        width: channels C of its tokens.
    """

    kind: ClassVar[Literal["attn", "mlp", "layer"]]
    tokenwise: ClassVar[bool] = False
    """Whether the update of a token depends on that token alone."""

    def __init__(self, path: str, width: int) -> None:
        super().__init__()
        self.path = path
        self.width = width
        self.beside = nn.ModuleDict()

    def add_beside(self, name: str, module: nn.Module) -> None:
        """Puts a module beside this unit: it reads the unit's input, sees every token, and its output is added.

        Args:
            module: maps Tokens to an update of the shape of ``tokens.x``. If it is not token-wise it has an attribute
                ``tokenwise = False``.

        Raises:
            BackboneError: a module of that name is there already.
        """
        if name in self.beside:
            raise BackboneError(f"{name} is already installed at {self.path}; give each tuning method once per place.")
        self.beside[name] = module

    @abc.abstractmethod
    def update(self, tokens: Tokens) -> Tensor:
        """What the host adds to its residual stream, of the shape of ``tokens.x``; without the modules beside it."""

    def beside_update(self, tokens: Tokens) -> Tensor | None:
        """The sum of the modules beside this unit, or None where there is none."""
        total: Tensor | None = None
        for module in self.beside.values():
            total = module(tokens) if total is None else total + module(tokens)
        return total

    def change(self, tokens: Tokens) -> Tensor:
        """Everything that this unit adds to the residual stream."""
        beside = self.beside_update(tokens)
        update = self.update(tokens)
        return update if beside is None else update + beside


class Attention(Unit):
    """An attention sub-layer, split around the softmax, which is ours: token-wise before and after it."""

    kind = "attn"

    @abc.abstractmethod
    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Norm and projections: ``(..., C)`` to queries, keys and values, each ``(..., H, D)``."""

    @abc.abstractmethod
    def combine(self, attended: Tensor) -> Tensor:
        """Output projection, LayerScale and drop path: ``(..., H * D)`` to the update ``(..., C)``."""

    @property
    @abc.abstractmethod
    def attention_dropout(self) -> float:
        """Probability of dropping an attention weight, 0 in evaluation."""

    def update(self, tokens: Tokens) -> Tensor:
        return self.combine(attend(*self.project(tokens.x), tokens, self.attention_dropout))


class Mlp(Unit):
    """An MLP sub-layer: token-wise, from norm to drop path."""

    kind = "mlp"
    tokenwise = True


class Block(Unit):
    """One transformer block: attention, then MLP."""

    kind = "layer"

    def __init__(self, index: int, attn: Attention, mlp: Mlp) -> None:
        super().__init__(f"blocks.{index}", mlp.width)
        self.index = index
        self.attn = attn
        self.mlp = mlp

    def update(self, tokens: Tokens) -> Tensor:
        attended = self.attn.change(tokens)
        return attended + self.mlp.change(tokens.with_x(tokens.x + attended))


class Backbone(nn.Module, abc.ABC):
    """A pretrained host model behind the interface that methods and policies are written against."""

    host: nn.Module
    blocks: Sequence[Block]

    @abc.abstractmethod
    def embed(self, images: Tensor) -> Tokens:
        """Images ``(B, 3, height, width)`` to the tokens that enter the first block."""

    @abc.abstractmethod
    def readout(self, tokens: Tokens) -> Tensor:
        """The tokens that left the last block to logits ``(B, classes)``."""

    @property
    @abc.abstractmethod
    def heads(self) -> tuple[nn.Module, ...]:
        """The classifier's modules: always trained, always saved, never counted among a method's parameters."""

    @property
    def classes(self) -> int:
        """Number of classes of the classifier; 0 without one."""
        return next((head.out_features for head in self.heads if isinstance(head, nn.Linear)), 0)

    @property
    @abc.abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that the backbone was built for."""

    @property
    @abc.abstractmethod
    def gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward pass to save memory."""

    def units(self, where: Where) -> Iterator[Unit]:
        """The units that ``where`` names, from the first block to the last."""
        for block in self.blocks:
            if where in ("attn", "attn-mlp"):
                yield block.attn
            if where in ("mlp", "attn-mlp"):
                yield block.mlp
            if where == "layer":
                yield block

    def all_units(self) -> Iterator[Unit]:
        """Every block and its sub-layers, from the first block to the last."""
        for block in self.blocks:
            yield from (block, block.attn, block.mlp)

    def head_parameters(self) -> set[str]:
        """Names, as in ``named_parameters``, of the head's parameters."""
        ids = {id(p) for head in self.heads for p in head.parameters()}
        return {name for name, p in self.named_parameters() if id(p) in ids}
