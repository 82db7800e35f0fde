"""NOAH: prompts, LoRA and adapters together, each block with sizes of its own that a search has found."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.backbones.sites import Change, Site
from dyntune.core.errors import BackboneError, SpecError
from dyntune.core.tokens import Tokens
from dyntune.core.words import counted
from dyntune.parts.methods.base import Init, TuningMethod, initialise_bottleneck, initialise_low_rank, quick_gelu

PUBLISHED_WIDTH = 100
"""Width of the tensors that the published code slices, and whose initial statistics the slices have."""

_DEAD = ("visual_prompt_token", "visual_prompt_token_pos_embed")
"""Tensors of the published code that its first block removes from the sequence again."""


@dataclass(frozen=True)
class Subnet:
    """The sizes of one sub-network, a number for each block; 0 means that there is no such module in the block.

    Args:
        prompts: prompts p.
        ranks: ranks r of the low-rank updates.
        bottlenecks: hidden channels h of the adapters.
    """

    prompts: tuple[int, ...]
    ranks: tuple[int, ...]
    bottlenecks: tuple[int, ...]

    def parameters(self, width: int) -> int:
        """Trained parameters without the head on a host of D = ``width`` channels."""
        adapters = sum((2 * width + 1) * h + width for h in self.bottlenecks if h)
        return width * sum(self.prompts) + 4 * width * sum(self.ranks) + adapters


@dataclass(frozen=True)
class Space:
    """The sub-networks that there are: of each kind of module the first few blocks have one, the others none.

    Args:
        blocks: of the host.
        choices: sizes that a module may have.
        depths: how many blocks may have one.
    """

    blocks: int
    choices: tuple[int, ...]
    depths: tuple[int, ...]

    def draw(self, below: Callable[[int], int]) -> Subnet:
        """A random sub-network; ``below(n)`` gives a random whole number of at least 0 and below n."""
        return Subnet(*(self.fill((), self.depths[below(len(self.depths))], below) for _ in range(3)))

    def fill(self, sizes: tuple[int, ...], depth: int, below: Callable[[int], int]) -> tuple[int, ...]:
        """Sizes of all blocks: ``sizes`` of the first ones, random ones up to ``depth``, then zeros."""
        more = (self.choices[below(len(self.choices))] for _ in range(depth - len(sizes)))
        return (*sizes[:depth], *more, *(0,) * (self.blocks - depth))

    @property
    def largest(self) -> Subnet:
        """Every module of every block at its largest size."""
        return Subnet(*((max(self.choices),) * self.blocks,) * 3)

    @property
    def smallest(self) -> Subnet:
        """The fewest modules at their smallest size."""
        sizes = self.fill((min(self.choices),) * min(self.depths), min(self.depths), lambda _: 0)
        return Subnet(sizes, sizes, sizes)


class Selection(nn.Module):
    """Which sub-network computes: the modules of all blocks ask it.

    Of a supernet a random one computes in each training step, and ``subnet`` in evaluation. Modules that it leaves out
    take part with a gradient of zero, so that every step finds all parameters in the graph, as optimiser and
    distributed training expect.

    Args:
        largest: the sizes at which the modules are stored.
        space: what training draws from; None where there is nothing to draw.
    """

    def __init__(self, largest: Subnet, space: Space | None) -> None:
        super().__init__()
        self.largest = largest
        self.space = space
        self.subnet = largest
        self._drawn = largest

    def begin_step(self, epoch: float | None = None, progress: float | None = None) -> None:
        """Draws the sub-network of a training step, for all its forward passes and what is recomputed of them.

        The CPU generator decides, which ``fit`` seeds in every step.
        """
        if self.training and self.space is not None:
            self._drawn = self.space.draw(lambda below: int(torch.randint(below, (), device="cpu")))

    @property
    def sizes(self) -> Subnet:
        """The sub-network that computes now."""
        return self._drawn if self.training and self.space is not None else self.subnet

    def set_subnet(self, subnet: Subnet) -> None:
        """Chooses the sub-network that evaluation computes and ``merge`` folds; it is no part of what is saved.

        Raises:
            SpecError: it has another number of blocks, or a size beyond what is stored.
        """
        for name, stored in vars(self.largest).items():
            sizes = getattr(subnet, name)
            if len(sizes) != len(stored) or not all(
                0 <= size <= most for size, most in zip(sizes, stored, strict=True)
            ):
                raise SpecError(f"noah: {name}={sizes} is no part of the supernet; expected at most {stored}.")
        self.subnet = subnet


class ElasticPrompts(nn.Module):
    """Puts the first p of its prompts into every image, in place of those that the block before has put there.

    Where p is 0, what is left of an earlier block's prompts goes on.

    Args:
        block: index of its block.
        count: prompts that are stored.
        width: channels D of a token.
        bound: prompts start uniform in (-bound, bound).
        dropout: probability of dropping a value of a prompt while training.
        selection: says how large p is.
    """

    def __init__(self, block: int, count: int, width: int, bound: float, dropout: float, selection: Selection) -> None:
        super().__init__()
        self.block = block
        self.prompts = nn.Parameter(torch.empty(count, width).uniform_(-bound, bound))
        self.dropout = nn.Dropout(dropout)
        self.selection = selection

    def forward(self, tokens: Tokens) -> Tokens:
        """The tokens with this block's prompts behind the host's own prefix tokens."""
        sizes = self.selection.sizes.prompts
        own = self.prompts[: sizes[self.block]]
        if not len(own):
            return tokens.with_x(tokens.x + own.sum()) if self.training else tokens
        there = tokens.x[:, tokens.prefix - tokens.prompts : tokens.prefix]
        left = there[:, : tokens.prompts - (sizes[self.block - 1] if self.block else 0)]
        fresh = self.dropout(own.expand(left.shape[0], -1, -1))
        return tokens.with_prompts(torch.cat([left, fresh.to(left.dtype)], dim=1))


class ElasticLowRank(Change):
    """``y + B[:, :r] A[:r] x``.

    Args:
        block: index of its block.
        inputs: channels of x.
        outputs: channels of y.
        rank: rows of A and columns of B that are stored.
        dropout: probability of dropping a value of x while training.
        init: see ``Noah``.
        selection: says how large r is.
    """

    def __init__(
        self, block: int, inputs: int, outputs: int, rank: int, dropout: float, init: Init, selection: Selection
    ) -> None:
        super().__init__()
        self.block = block
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.selection = selection
        initialise_low_rank(self.down, self.up, init)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        down, up = self._sliced(self.selection.sizes)
        return y + F.linear(F.linear(self.dropout(x), down), up)

    @torch.no_grad()
    def fold(self, site: Site) -> None:
        down, up = self._sliced(self.selection.subnet)
        site.weight.add_(up @ down)

    def _sliced(self, sizes: Subnet) -> tuple[Tensor, Tensor]:
        rank = sizes.ranks[self.block]
        return self.down.weight[:rank], self.up.weight[:, :rank]


class ElasticAdapter(nn.Module):
    """``u + W_up[:, :h] drop(act(W_down[:h] u + b_down[:h])) + b_up`` for each token's update u; u itself if h is 0.

    ``act(t) = t sigmoid(1.702 t)``.

    Args:
        block: index of its block.
        width: channels D of a token.
        bottleneck: hidden channels that are stored.
        dropout: probability of dropping a hidden value while training.
        init: see ``Noah``.
        selection: says how large h is.
    """

    def __init__(
        self, block: int, width: int, bottleneck: int, dropout: float, init: Init, selection: Selection
    ) -> None:
        super().__init__()
        self.block = block
        self.down_proj = nn.Linear(width, bottleneck)
        self.up_proj = nn.Linear(bottleneck, width)
        self.dropout = nn.Dropout(dropout)
        self.selection = selection
        initialise_bottleneck(self.down_proj, self.up_proj, init)

    def forward(self, update: Tensor) -> Tensor:
        """What is added to the residual stream instead of ``update``, ``(..., D)``."""
        size = self.selection.sizes.bottlenecks[self.block]
        hidden = F.linear(update, self.down_proj.weight[:size], self.down_proj.bias[:size])
        hidden = self.dropout(quick_gelu(hidden))
        return update + F.linear(hidden, self.up_proj.weight[:, :size], self.up_proj.bias * (size > 0))


@dataclass(frozen=True)
class Noah(TuningMethod):
    """Prompts, a low-rank update of the query-key-value map and an adapter in each block, with sizes from a search.

    A block with p prompts, rank r and h hidden channels takes the prompts of the block before out of the sequence, puts
    its own in, and gives ``z = x + attn(x)`` with ``W + B A`` in place of its query-key-value map W, then
    ``z + u + up(drop(act(down(u))))`` with ``u = mlp(norm2(z))``, after drop path, and ``act(t) = t sigmoid(1.702 t)``.
    Any of the three may be 0; without prompts of its own a block leaves those that are there.

    Without sizes it is the supernet, with every module at its largest: each training step computes a random
    sub-network, in which the first few blocks have prompts, the first few a low-rank update and the first few an
    adapter; evaluation computes the largest one. ``dyntune noah`` trains it, searches it and trains what was found.
    By default a quarter (of at least 3), half, three quarters or all of the blocks have a kind of module.

    A block of width D adds ``D p + 4 D r`` parameters, and ``(2 D + 1) h + D`` if h > 0. With n tokens in it, its own
    prompts included, it computes ``n (4 D r + 2 D h)`` MACs more, and each prompt costs what any token does. Only the
    low-rank updates fold.

    The published code starts the weights of updates and adapters with a deviation of 0.02, so that they act at once,
    and prompts uniform in (-v, v) with ``v = sqrt(6 / (100 D + D))``, as parts of 100; here v has p in place of 100.

    Args:
        prompts: prompts of each block, written 5/5/1/...; one number for all blocks, empty for the supernet.
        ranks: ranks of the low-rank updates, written alike.
        bottlenecks: hidden channels of the adapters, written alike.
        choices: sizes that the supernet's modules may have.
        depths: how many of the first blocks may have modules in the supernet; empty is 3/6/9/12 of 12 blocks.
        dropout: probability of dropping a value of prompts, update's input and adapter's hidden layer in training.
        init: zero starts updates and adapters without effect; noah starts all as the published code does.
    """

    source: ClassVar[str] = "Zhang et al., 2022, arXiv 2206.04673"
    stays: ClassVar[str | None] = "prompts are tokens and adapters are not linear; its low-rank updates are folded"

    prompts: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()
    bottlenecks: tuple[int, ...] = ()
    choices: tuple[int, ...] = (1, 5, 10)
    depths: tuple[int, ...] = ()
    dropout: float = 0.1
    init: Init = "zero"

    def check(self) -> None:
        given = (self.prompts, self.ranks, self.bottlenecks)
        self.require(all(given) or not any(given), "prompts, ranks and bottlenecks together (0 for none), or none")
        self.require(all(size >= 0 for sizes in given for size in sizes), "sizes of at least 0")
        self.require(bool(self.choices) and min(self.choices) >= 1, "choices of at least 1")
        self.require(all(depth >= 1 for depth in self.depths), "depths of at least 1")
        self.require(0 <= self.dropout < 1, "dropout in [0, 1)")
        if self.searched and not any(self.prompts) and not any(self.bottlenecks):
            object.__setattr__(self, "stays", None)

    @property
    def searched(self) -> bool:
        """Whether it has sizes, instead of being the supernet."""
        return bool(self.prompts)

    def with_sizes(self, subnet: Subnet) -> Noah:
        """This configuration with the sizes of a sub-network."""
        return Noah(subnet.prompts, subnet.ranks, subnet.bottlenecks, dropout=self.dropout, init=self.init)

    def space(self, blocks: int) -> Space:
        """The supernet's sub-networks on a host of so many blocks."""
        depths = self.depths or tuple(max(3, round(blocks * quarters / 4)) for quarters in range(1, 5))
        return Space(blocks, tuple(sorted(set(self.choices))), tuple(sorted({min(depth, blocks) for depth in depths})))

    def subnet(self, blocks: int) -> Subnet:
        """The sizes of every block of a host; those of the supernet's largest sub-network where there are none.

        Raises:
            BackboneError: the numbers given are not one per block.
        """
        if not self.searched:
            return self.space(blocks).largest
        sizes = []
        for name in ("prompts", "ranks", "bottlenecks"):
            given = getattr(self, name)
            if len(given) not in (1, blocks):
                raise BackboneError(
                    f"noah: {name} has {len(given)} numbers, but the backbone has {counted(blocks, 'block')}; give "
                    "one for each block, or one for all."
                )
            sizes.append(given if len(given) == blocks else given * blocks)
        return Subnet(*sizes)

    def install(self, backbone: Backbone) -> None:
        blocks = len(backbone.blocks)
        stored = self.subnet(blocks)
        selection = Selection(stored, None if self.searched else self.space(blocks))
        backbone.shared["noah"] = selection
        for block, count, size in zip(backbone.blocks, stored.prompts, stored.bottlenecks, strict=True):
            if count:
                rows = PUBLISHED_WIDTH if self.init == "noah" else count
                bound = math.sqrt(6 / (rows * block.width + block.width))
                prompts = ElasticPrompts(block.index, count, block.width, bound, self.dropout, selection)
                block.add_prompts("noah", prompts)
            if size:
                adapter = ElasticAdapter(block.index, block.width, size, self.dropout, self.init, selection)
                block.mlp.add_sequential("noah", adapter)
        for site in backbone.sites("qkv"):
            index = cast(int, site.block)
            if rank := stored.ranks[index]:
                site.add(
                    "noah",
                    ElasticLowRank(index, site.inputs, site.channels, rank, self.dropout, self.init, selection),
                )

    def from_published(self, name: str, tensor: Tensor) -> dict[str, Tensor] | None:
        if name in _DEAD or re.search(r"\.sampled_(weight|bias)(_\d)?$", name):  # a second name of what it sampled last
            return {}
        match = re.match(r"blocks\.(\d+)\.(visual_prompt_token$|attn\.LoRA_[ab]\.weight$|adapter\.ln[12]\.)", name)
        if match is None:
            return None
        block, kind = int(match.group(1)), match.group(2)
        if "prompt" in kind:
            return _if_any({f"blocks.{block}.prompts.noah.prompts": tensor[0, : self._size(self.prompts, block)]})
        if "LoRA" in kind:
            rank = self._size(self.ranks, block)
            down = "LoRA_a" in kind
            ours = f"host.blocks.{block}.attn.qkv.changes.noah.{'down' if down else 'up'}.weight"
            return _if_any({ours: tensor[:rank] if down else tensor[:, :rank]})
        size, which = self._size(self.bottlenecks, block), name.rpartition(".")[2]
        if not size:
            return {}
        if "ln1" in kind:
            return {f"blocks.{block}.mlp.sequential.noah.down_proj.{which}": tensor[:size]}
        return {f"blocks.{block}.mlp.sequential.noah.up_proj.{which}": tensor[:, :size] if tensor.ndim == 2 else tensor}

    def _size(self, sizes: tuple[int, ...], block: int) -> int:
        """The size of a block's module of one kind; 0 beyond the last block."""
        every = sizes if self.searched else (max(self.choices),)
        return next(iter(every if len(every) == 1 else every[block : block + 1]), 0)


def _if_any(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` without those that hold no value."""
    return {name: tensor for name, tensor in tensors.items() if tensor.numel()}
