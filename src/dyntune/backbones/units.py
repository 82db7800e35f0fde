"""Units: the residual sub-layers and blocks that a host shows itself as, and the places on them for modules."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

from torch import Tensor, nn

from dyntune.core.attention import attend
from dyntune.core.errors import BackboneError
from dyntune.core.tokens import Projected, Tokens

Where = Literal["mlp", "attn", "attn-mlp", "layer"]
"""Units that a module or a gate is put on: each MLP, each attention, both separately, or the whole block."""


class Parallel(nn.Module, abc.ABC):
    """A module parallel to a unit: it reads the unit's input, sees every token, and its output is added."""

    tokenwise: bool = True
    """Whether the update of a token depends on that token alone."""
    reads_normed: bool = False
    """Whether it reads the output of the unit's norm, ``tokens.normed``."""
    reads_grid: bool = False
    """Whether it needs every patch of the grid in its place."""

    @abc.abstractmethod
    def forward(self, tokens: Tokens) -> Tensor:
        """An update of the shape of ``tokens.x``."""

    def fold_scale(self) -> None:
        """Writes a fixed factor on the output, where there is one, into the weights before it."""


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
        self.parallel = nn.ModuleDict()
        self.sequential = nn.ModuleDict()
        self.reducers = nn.ModuleDict()
        self.dispatcher: nn.Module | None = None
        """The learned gate that lets tokens through this unit or not, for the policy that gates it."""
        self.surrogate: nn.Module | None = None
        """What stands in for this unit at the tokens that skip it, for the policy that gates it; None: nothing does."""

    def add_parallel(self, name: str, module: Parallel) -> None:
        """Puts a module beside this unit, which sees the tokens that skip the unit too.

        Raises:
            BackboneError: a module of that name is there already, or it reads a norm that the unit does not have.
        """
        if module.reads_normed and not isinstance(self, SubLayer):
            raise BackboneError(f"{name} reads the output of a norm, which {self.path}, a whole block, does not have.")
        if module.reads_normed and isinstance(self, SubLayer) and not self.norm_first:
            raise BackboneError(
                f"{name} reads the output of a norm in front of {self.path}, but this backbone has its norms behind "
                "attention and MLP. Use a method that reads the tokens themselves, such as adaptformer."
            )
        _add(self.parallel, name, module, self.path)

    def add_sequential(self, name: str, module: nn.Module) -> None:
        """Puts a module behind this unit: what it makes of the unit's update, token by token, is added instead of it.

        A token that skips the unit skips the module too.

        Args:
            module: maps an update ``(..., C)`` to one of the same shape.

        Raises:
            BackboneError: a module of that name is there already, or the unit is a whole block.
        """
        if not isinstance(self, SubLayer):
            raise BackboneError(f"{name} cannot stand behind {self.path}, a whole block; put it behind its sub-layers.")
        _add(self.sequential, name, module, self.path)

    def add_reducer(self, name: str, module: nn.Module) -> None:
        """Puts a module in front of this unit that decides which tokens go on, for the policy called ``name``.

        Raises:
            BackboneError: a module is there already.
        """
        if self.reducers:
            other = next(iter(self.reducers))
            if other == name:
                raise BackboneError(f"{name} is given twice (auto counts as the policy that it finds); give it once.")
            raise BackboneError(f"{name} and {other} would each decide which tokens there are; give one of them.")
        self.reducers[name] = module

    @abc.abstractmethod
    def host_update(self, tokens: Tokens) -> Tensor:
        """What the host adds to its residual stream, of the shape of ``tokens.x``."""

    def update(self, tokens: Tokens) -> Tensor:
        """The host's update as the modules behind it leave it; without the modules beside it."""
        return self.behind(self.host_update(tokens))

    def behind(self, update: Tensor) -> Tensor:
        """What the modules behind this unit make of the host's update."""
        for module in self.sequential.values():
            update = module(update)
        return update

    def beside(self) -> Iterator[Parallel]:
        """The modules parallel to this unit."""
        return (cast(Parallel, module) for module in self.parallel.values())

    def parallel_update(self, tokens: Tokens) -> Tensor | None:
        """The sum of the modules parallel to this unit, or None without any; ``tokens`` as ``with_norm`` left them."""
        total: Tensor | None = None
        for module in self.parallel.values():
            total = module(tokens) if total is None else total + module(tokens)
        return total

    def skipped_update(self, tokens: Tokens, mask: Tensor) -> Tensor | None:
        """What is added in place of this unit's update at the tokens that skip it, and zeros at the others.

        Args:
            tokens: what enters this unit.
            mask: ``(B, N)``, 1 for the tokens that go through it.

        Returns:
            Of the shape of ``tokens.x``; None where nothing is added.
        """
        return None if self.surrogate is None else self.surrogate(tokens.x, 1 - mask)

    def with_norm(self, tokens: Tokens) -> Tokens:
        """The tokens with what the host and the modules beside it share: the norm's output, where one of them reads it.

        Call it before ``parallel_update`` and ``update``.
        """
        return tokens

    def change(self, tokens: Tokens) -> Tensor:
        """Everything that this unit adds to the residual stream."""
        tokens = self.with_norm(tokens)
        parallel = self.parallel_update(tokens)
        update = self.update(tokens)
        return update if parallel is None else update + parallel


class SubLayer(Unit):
    """A unit that begins with a norm."""

    @property
    def norm_first(self) -> bool:
        """Whether it does; a host may have the norm behind, and then ``norm`` changes nothing."""
        return True

    @abc.abstractmethod
    def norm(self, x: Tensor) -> Tensor:
        """The norm at its beginning: ``(..., C)`` to the same shape."""

    @property
    @abc.abstractmethod
    def drop_path_rate(self) -> float:
        """Probability with which the host drops this unit's whole update while training."""

    def with_norm(self, tokens: Tokens) -> Tokens:
        if tokens.normed is None and any(module.reads_normed for module in self.beside()):
            return tokens.with_normed(self.norm(tokens.x))
        return tokens

    def normed(self, tokens: Tokens) -> Tensor:
        """The norm's output, computed unless ``with_norm`` has done so."""
        return self.norm(tokens.x) if tokens.normed is None else tokens.normed


class Attention(SubLayer):
    """An attention sub-layer, split around the softmax, which is ours: token-wise before and after it."""

    kind = "attn"
    opaque: ClassVar[bool] = False
    """Whether the host computes it as a whole, among all tokens in their places; see ``OpaqueAttention``."""
    table: int = 0
    """Its number among the attentions, where each has rotations of its own."""

    @abc.abstractmethod
    def project(self, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the tokens, each ``(..., H, D)``, from the norm's output, ``normed(tokens)``.

        They are not rotated yet. Keys and values may have fewer heads than queries: each is then that of as many
        queries' heads, one after the other.
        """

    def split_queries(self) -> bool:
        """Takes the queries' projection apart from that of keys and values, so that ``project_first`` saves it.

        Returns:
            Whether it does.
        """
        return False

    def project_first(self, tokens: Tokens, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """As ``project``, with queries ``(B, count, H, D)`` of the first tokens alone; ``split_queries`` comes before.

        Args:
            tokens: ``(B, N, C)``.
            count: prefix tokens that ask.
        """
        q, k, v = self.project(tokens)
        return q[:, :count], k, v

    def attended_by(self, tokens: Tokens, count: int) -> Tensor:
        """What the first ``count`` tokens, prefix tokens all, gather from all tokens, ``(B, count, H * D)``."""
        projected = self._placed(*self.project_first(tokens, count), tokens)
        if projected.bias is not None:
            projected = projected._replace(bias=projected.bias[:, :, :count])
        return attend(projected, tokens)

    @abc.abstractmethod
    def combine(self, attended: Tensor) -> Tensor:
        """Output projection, LayerScale and drop path: ``(..., H * D)`` to the update ``(..., C)``."""

    @property
    @abc.abstractmethod
    def head_width(self) -> int:
        """Channels D of one head's keys."""

    @property
    @abc.abstractmethod
    def attention_dropout(self) -> float:
        """Probability of dropping an attention weight, 0 in evaluation."""

    def relative(self, tokens: Tokens) -> Tensor | None:
        """``(H, own + P, own + P)``, added to the logits of the host's own prefix tokens and the image's P patches."""
        return tokens.relative

    def projected(self, tokens: Tokens) -> Projected:
        """Queries, keys and values as they are multiplied, computed unless ``tokens`` brings them."""
        return self._placed(*self.project(tokens), tokens) if tokens.projected is None else tokens.projected

    def _placed(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> Projected:
        """Queries and keys rotated by where their tokens lie, and keys and values for each head of the queries."""
        unrotated, bias = k, self.relative(tokens)
        if bias is not None:
            bias = tokens.places.of_pairs(bias, tokens.prefix - tokens.prompts, tokens.prefix)
        if tokens.rotation is not None:
            rows = tokens.rotation.rows(self.table, tokens.places, tokens.prefix)
            k = tokens.rotation.turn(k, rows)
            if q.shape[:-2] == k.shape[:-2]:  # else of prefix tokens alone, which are not rotated
                q = tokens.rotation.turn(q, rows)
        shared = q.shape[-2] // k.shape[-2]
        if shared > 1:
            k, v = k.repeat_interleave(shared, dim=-2), v.repeat_interleave(shared, dim=-2)
        return Projected(q, k, v, unrotated, bias)

    def host_update(self, tokens: Tokens) -> Tensor:
        return self.combine(attend(self.projected(tokens), tokens, self.attention_dropout))


class OpaqueAttention(Attention):
    """An attention sub-layer that the host computes as a whole, as it does windows and relative positions.

    It sees all tokens in their places. So a policy may gate the MLP, but not this attention, and cannot take tokens
    away; methods can change the host's maps and stand beside, behind and in front of the sub-layer.
    """

    opaque = True

    @abc.abstractmethod
    def attended(self, normed: Tensor, grid: tuple[int, int]) -> Tensor:
        """The norm's output to the update, both ``(B, N, C)``: attention, LayerScale and drop path.

        Args:
            normed: a row for each token.
            grid: rows and columns of the places of tokens behind the prefix.
        """

    def host_update(self, tokens: Tokens) -> Tensor:
        return self.attended(self.normed(tokens), tokens.grid)

    def project(self, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        raise BackboneError(f"{self.path} is computed by the host as a whole; it has no queries to be read.")

    def combine(self, attended: Tensor) -> Tensor:
        raise BackboneError(f"{self.path} is computed by the host as a whole; its output map cannot stand alone.")

    @property
    def head_width(self) -> int:
        return self.width

    @property
    def attention_dropout(self) -> float:
        return 0.0


Nonlinearity = Literal["gelu", "gelu_tanh", "quick_gelu"]
"""GELU, its tanh form, and ``x sigmoid(1.702 x)``."""


@dataclass(frozen=True)
class MlpParts:
    """An MLP as ``second(nonlinearity(first(norm(x))))``, in evaluation.

    Args:
        norm: with weight and bias.
        first: ``C -> H``.
        nonlinearity: of the hidden layer.
        second: ``H -> C``.
    """

    norm: nn.LayerNorm
    first: nn.Linear
    nonlinearity: Nonlinearity
    second: nn.Linear


class Mlp(SubLayer):
    """An MLP sub-layer: token-wise, from norm to drop path."""

    kind = "mlp"
    tokenwise = True

    @property
    def parts(self) -> MlpParts | None:
        """The layers of which the host's update consists; None if it consists of others."""
        return None

    @abc.abstractmethod
    def transform(self, normed: Tensor) -> Tensor:
        """The MLP, LayerScale and drop path: the norm's output ``(..., C)`` to the update ``(..., C)``."""

    def host_update(self, tokens: Tokens) -> Tensor:
        return self.transform(self.normed(tokens))


class Block(Unit):
    """One transformer block: attention, then MLP.

    Args:
        index: its number.
        attn: its attention.
        mlp: its MLP.
        before: what the host does to all tokens in front of it, such as making one of several between two stages.
    """

    kind = "layer"

    def __init__(self, index: int, attn: Attention, mlp: Mlp, before: Callable[[Tokens], Tokens] | None = None) -> None:
        super().__init__(f"blocks.{index}", mlp.width)
        self.index = index
        self.attn = attn
        self.mlp = mlp
        self.before = before
        self.prompts = nn.ModuleDict()

    def add_prompts(self, name: str, module: nn.Module) -> None:
        """Puts a module in front of this block that may change which tokens there are, such as prompts.

        Args:
            module: maps Tokens to Tokens.

        Raises:
            BackboneError: a module is there already; two of them would remove each other's tokens.
        """
        if self.attn.opaque:
            raise BackboneError(
                f"{name} inserts tokens at {self.path}, whose attention the host computes as a whole, among the image "
                "patches in their places. Use a method that leaves the tokens alone, such as adaptformer or lora."
            )
        if self.prompts:
            raise BackboneError(
                f"{name} and {next(iter(self.prompts))} both insert tokens at {self.path}; give one of them."
            )
        self.prompts[name] = module

    def enter(self, tokens: Tokens) -> Tokens:
        """The tokens that this block computes."""
        if self.before is not None:
            tokens = self.before(tokens)
        for module in self.prompts.values():
            tokens = module(tokens)
        return tokens

    def host_update(self, tokens: Tokens) -> Tensor:
        attended = self.attn.change(tokens)
        return attended + self.mlp.change(tokens.with_x(tokens.x + attended))


def _add(modules: nn.ModuleDict, name: str, module: nn.Module, path: str) -> None:
    if name in modules:
        raise BackboneError(f"{name} is already installed at {path}; give each tuning method once per place.")
    modules[name] = module
