"""The tokens on their way through a model: features plus what must be known about them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dyntune.core.errors import DyntuneError
from dyntune.core.places import EVERY_PLACE, Places
from dyntune.core.rotation import Rotation


@dataclass(frozen=True)
class Provenance:
    """Which image patches the P tokens behind the prefix stand for; without any field, token j is patch j.

    Args:
        owner: ``(B, places)``, for each place of the grid, which is an image patch or a cell of several, the number,
            from 0 to P - 1, of the token that it has become part of; -1 where it was dropped. None before a policy has
            merged, dropped or reordered anything.
        sizes: ``(B, P)``, how many places a token counts for in a mean; None where all count alike.
        present: ``(B, P)``, 1 for the tokens that are there and 0 for those that training keeps behind a mask; it
            carries the gradient of the decision. None where all are there.
        cells: ``(patches of the image,)``, for each image patch the number of the place that it is in, on a host that
            makes one token of several patches between its stages; None where each patch is a place.
    """

    owner: Tensor | None = None
    sizes: Tensor | None = None
    present: Tensor | None = None
    cells: Tensor | None = None

    @property
    def weights(self) -> Tensor | None:
        """``(B, P)``, how much each token counts in a mean over the image; None where all count alike."""
        if self.present is None:
            return self.sizes
        # An image of which nothing is present is read whole: a mean over nothing would be NaN.
        present = self.present + (self.present.sum(1, keepdim=True) < 0.5)
        return present if self.sizes is None else self.sizes * present

    def of_patches(self, values: Tensor, dropped: float = 0.0) -> Tensor:
        """One value per token, ``(B, P)`` or ``(B, P, C)``, as one per image patch; ``dropped`` where it is gone."""
        values = self.of_places(values, dropped)
        return values if self.cells is None else values[:, self.cells.to(values.device)]

    def of_places(self, values: Tensor, dropped: float = 0.0) -> Tensor:
        """As ``of_patches``, as one per place of the grid."""
        if self.owner is None:
            return values
        owner = self.owner.to(values.device)
        gone = owner < 0
        index = owner.clamp_min(0)
        if values.ndim == 3:
            index, gone = index.unsqueeze(-1).expand(-1, -1, values.shape[-1]), gone.unsqueeze(-1)
        return values.gather(1, index).masked_fill(gone, dropped)


class Projected(NamedTuple):
    """Queries, keys and values of an attention, each ``(..., H, D)``, as it multiplies them.

    Args:
        q: queries, rotated where the host rotates.
        k: keys, likewise.
        v: values.
        unrotated: the keys before rotation, ``(..., heads of keys, D)``: what a token holds, wherever it lies.
        bias: ``(1 or B, H, N, N)``, added to the logits of queries and keys of the dense tokens, in either layout; None
            for nothing.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    unrotated: Tensor
    bias: Tensor | None = None


EVERY_PATCH = Provenance()
"""Every token is a patch, and every patch a token."""


@dataclass(frozen=True)
class Tokens:
    """Token features and their layout; immutable, local to one forward pass.

    Two layouts exist. *Dense*: ``x`` is ``(B, N, C)``. *Ragged*: ``x`` is ``(M, C)``, the tokens of all images one
    after the other, ``counts[b]`` of them from image ``b``.

    Args:
        x: features, ``(B, N, C)`` or ``(M, C)``.
        prefix: leading tokens of every image (class, register, prompts) that are no image patches. They are always
            computed.
        grid: rows and columns of the places that the tokens behind the prefix have: the patches of the image, or cells
            of several patches on a host that makes one token of them between its stages.
        keys: ``(B, N)`` with 1 for the tokens that may be attended to, 0 for the others; None means all.
        counts: tokens of each image in the ragged layout, as numbers or, in a traced graph, as a tensor ``(B,)``; None
            where nothing asks which token is whose.
        prompts: how many of the prefix tokens, the last ones, a method has inserted.
        normed: what the next unit's norm makes of ``x``, of its shape, where that is known already.
        projected: queries, keys and values of the next attention, where known already.
        provenance: which image patches the tokens behind the prefix stand for.
        places: where they lie.
        rotation: how queries and keys are rotated by where their patches lie; None where the host does not do so.
        relative: ``(H, own + P, own + P)``, what every attention adds to the logits of the host's own prefix tokens and
            the image's P patches; None for nothing.
        key_bias: ``(B, P)``, added to the logits of every query for the keys of these tokens; None for nothing.
        only_read: the patches are gone because nothing behind reads them; nobody decides about them any more.
    """

    x: Tensor
    prefix: int
    grid: tuple[int, int]
    keys: Tensor | None = None
    counts: tuple[int, ...] | Tensor | None = None
    prompts: int = 0
    normed: Tensor | None = None
    projected: Projected | None = None
    provenance: Provenance = EVERY_PATCH
    places: Places = EVERY_PLACE
    rotation: Rotation | None = None
    relative: Tensor | None = None
    key_bias: Tensor | None = None
    only_read: bool = False

    @property
    def patches(self) -> Tensor:
        """The features without prefix tokens, ``(B, P, C)``; dense layout only."""
        return self.x[:, self.prefix :]

    @property
    def mean(self) -> Tensor:
        """The mean of each image's tokens, ``(B, C)``, in which each counts by ``provenance.weights``; dense only."""
        weights = self.provenance.weights
        if weights is None:
            return self.x.mean(1)
        weights = self.cover_prefix(weights).to(self.x.dtype).unsqueeze(-1)
        return (self.x * weights).sum(1) / weights.sum(1)

    def with_x(self, x: Tensor) -> Tokens:
        """The same tokens with other features of the same layout."""
        return replace(self, x=x, normed=None, projected=None)

    def with_normed(self, normed: Tensor) -> Tokens:
        """The same tokens together with what the next unit's norm makes of them."""
        return replace(self, normed=normed)

    def with_projected(self, projected: Projected) -> Tokens:
        """The same tokens together with what the next attention projects them to."""
        return replace(self, projected=projected)

    def with_patches(
        self,
        patches: Tensor,
        moved: Tensor,
        *,
        sizes: Tensor | None = None,
        key_bias: Tensor | None = None,
    ) -> Tokens:
        """The prefix tokens and, behind them, others in place of the present ones; dense layout only.

        Args:
            patches: ``(B, Q, C)``.
            moved: ``(B, P)``, for each of the P present ones the number of the new one that it has become part of; -1
                where it is dropped.
            sizes: ``(B, Q)``, what the new ones count for in a mean; None where all count alike.
            key_bias: ``(B, Q)``, as above.
        """
        owner = moved
        if self.provenance.owner is not None:
            gone = self.provenance.owner < 0
            owner = moved.gather(1, self.provenance.owner.clamp_min(0)).masked_fill(gone, -1)
        x = torch.cat([self.x[:, : self.prefix], patches.to(self.x.dtype)], dim=1)
        places = self.places.following(owner, patches.shape[1])
        provenance = Provenance(owner, sizes, cells=self.provenance.cells)
        return replace(self.with_x(x), provenance=provenance, places=places, key_bias=key_bias)

    def with_cells(self, x: Tensor, grid: tuple[int, int], moved: Tensor) -> Tokens:
        """The tokens that a host makes of these between two stages, each in its place on a coarser grid; dense only.

        Args:
            x: ``(B, prefix + rows * columns, C)``, maybe of another width.
            grid: its rows and columns.
            moved: ``(rows * columns of this grid,)``, for each place the number of that on the new grid.
        """
        cells = moved if self.provenance.cells is None else moved[self.provenance.cells]
        return replace(self.with_x(x), grid=grid, provenance=replace(self.provenance, cells=cells))

    def with_present(self, present: Tensor) -> Tokens:
        """The same tokens, of which those with ``present`` 0, ``(B, P)``, are kept behind a mask."""
        return replace(self, provenance=replace(self.provenance, present=present))

    def on_grid(self) -> Tensor:
        """The features at every place of the grid, ``(B, C, rows, columns)``; merged ones share those of their token.

        Raises:
            DyntuneError: a patch was dropped, so that it has none.
        """
        owner = self.provenance.owner
        if owner is not None and not owner.is_meta and bool((owner < 0).any()):
            raise DyntuneError(
                "patches were dropped, so they have no features; a task that needs them all needs a policy that merges "
                "(tome, pyra, fpet, evit with fuse=true) or dispatch, which keeps every token."
            )
        return self.provenance.of_places(self.patches).transpose(1, 2).unflatten(2, self.grid)

    def on_places(self) -> Tensor:
        """The prefix tokens and behind them the features at every place of the grid, ``(B, prefix + places, C)``.

        As ``on_grid`` says.
        """
        return torch.cat([self.x[:, : self.prefix], self.on_grid().flatten(2).mT], dim=1)

    def with_prompts(self, prompts: Tensor) -> Tokens:
        """The same tokens with ``prompts``, ``(B, p, C)``, in place of those inserted before; dense layout only."""
        own = self.prefix - self.prompts
        x = torch.cat([self.x[:, :own], prompts.to(self.x.dtype), self.patches], dim=1)
        return replace(self.with_x(x), prefix=own + prompts.shape[1], prompts=prompts.shape[1])

    def without_prompts(self) -> Tokens:
        """The same tokens less the inserted prompts; dense layout only."""
        return self.with_prompts(self.x[:, :0]) if self.prompts else self

    def first(self, count: int) -> Tokens:
        """The first ``count`` tokens of each image, prefix tokens all, for a head that reads no others; dense only."""
        return Tokens(self.x[:, :count], count, self.grid, provenance=Provenance(), places=Places(), only_read=True)

    def take(self, index: Tensor, counts: tuple[int, ...] | Tensor | None) -> Tokens:
        """The tokens at ``index`` of the flattened batch, in the ragged layout: ``counts`` of them from each image."""
        normed = None if self.normed is None else self.normed.flatten(0, 1).index_select(0, index)
        x = self.x.flatten(0, 1).index_select(0, index)
        return Tokens(
            x,
            self.prefix,
            self.grid,
            counts=counts,
            prompts=self.prompts,
            normed=normed,
            provenance=Provenance(),
            places=self.places.taken(index),
            rotation=self.rotation,
            relative=self.relative,
        )

    def with_keys(self, keys: Tensor) -> Tokens:
        """The same tokens, of which only those with ``keys`` 1, ``(B, N)``, may be attended to."""
        return replace(self, keys=keys)

    def cover_prefix(self, gate: Tensor) -> Tensor:
        """Extends a gate over patches, ``(B, P)``, to all tokens, ``(B, N)``: prefix tokens are always active."""
        return torch.cat([gate.new_ones(gate.shape[0], self.prefix), gate], dim=1)
