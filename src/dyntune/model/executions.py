"""How a unit is computed: masked and sampled to train, compact to really skip tokens."""

import abc

import torch
from torch import Tensor

from dyntune.backbones.units import Mlp, Unit
from dyntune.core.errors import DyntuneError
from dyntune.core.tokens import Tokens
from dyntune.parts.policies.base import Gate
from dyntune.parts.policies.gating import GatingPolicy


class Execution(abc.ABC):
    """How one unit is computed: one that every token goes through, or one with a gate."""

    def plain(self, unit: Unit, tokens: Tokens) -> Tokens:
        """The tokens behind ``unit``, an attention or MLP sub-layer that computes all of them."""
        return tokens.with_x(tokens.x + unit.change(tokens))

    @abc.abstractmethod
    def gated(self, unit: Unit, tokens: Tokens, policy: GatingPolicy) -> tuple[Tokens, Gate]:
        """The tokens behind ``unit``, of which only prefix tokens and those that ``policy`` lets through computed."""


class Masked(Execution):
    """Computes every token and multiplies the update by the gate: differentiable in the gate."""

    def gated(self, unit: Unit, tokens: Tokens, policy: GatingPolicy) -> tuple[Tokens, Gate]:
        gate = policy.gate(unit, tokens)
        tokens = unit.with_norm(tokens)
        mask = tokens.cover_prefix(gate.values)
        update = unit.update(tokens.with_keys(mask)) * mask.unsqueeze(-1)
        return tokens.with_x(_added(tokens.x + update, unit, tokens, mask)), gate


class Sampled(Masked):
    """Computes the active tokens and, for the gradient of their gates, the share of the others that a policy explores.

    Forward this is ``Masked``: the gate of a skipped token is 0. Backward that 0 lets no gradient into the token's
    update either, so an explored token is computed without a graph; only its gate has a gradient, ``1 / share`` times
    that of ``Masked``, so that their expectations are equal. With a share of 1 nothing is random, and every gradient is
    that of ``Masked`` up to rounding. Units other than MLPs, and those whose update the host drops for whole images
    (stochastic depth), are masked.
    """

    def gated(self, unit: Unit, tokens: Tokens, policy: GatingPolicy) -> tuple[Tokens, Gate]:
        share = policy.explored(unit)
        if share is None or not isinstance(unit, Mlp) or unit.drop_path_rate:
            return super().gated(unit, tokens, policy)
        gate = policy.gate(unit, tokens)
        tokens = unit.with_norm(tokens)
        covered = tokens.cover_prefix(gate.values)
        mask = covered.flatten()
        explored = mask < 0.5
        active = (~explored).nonzero().squeeze(1)
        if share < 1:
            explored = explored & (torch.rand(mask.shape, device=mask.device) < share)
        others = explored.nonzero().squeeze(1)
        # These first: autocast keeps the weights that it casts, and those that it casts without a graph learn nothing.
        update = unit.update(tokens.take(active, None)) * mask[active].unsqueeze(1)
        with torch.no_grad():
            skipped = unit.update(tokens.take(others, None))
        out = _added(tokens.x, unit, tokens, covered).flatten(0, 1)
        out = out.index_add(0, active, update.to(out.dtype))
        out = out.index_add(0, others, (skipped * (mask[others] / share).unsqueeze(1)).to(out.dtype))
        return tokens.with_x(out.view_as(tokens.x)), gate


def _added(x: Tensor, unit: Unit, tokens: Tokens, mask: Tensor | None) -> Tensor:
    """``x`` with what a gated unit adds beside its own update: that of modules parallel to it, and its surrogate's.

    Args:
        x: the stream so far.
        unit: the gated one.
        tokens: what enters it.
        mask: 1 for tokens that go through it; None where all do, so that nothing stands in.
    """
    parallel = unit.parallel_update(tokens)
    x = x if parallel is None else x + parallel
    skipped = None if mask is None else unit.skipped_update(tokens, mask)
    return x if skipped is None else x + skipped


class Compact(Execution):
    """Gathers the active tokens of the whole batch, computes only those, and adds them back where they came from."""

    takes_all: bool = True
    """Whether units through which every token goes are computed without gathering."""

    def gated(self, unit: Unit, tokens: Tokens, policy: GatingPolicy) -> tuple[Tokens, Gate]:
        gate = policy.gate(unit, tokens)
        return tokens.with_x(self.computed(unit, tokens, gate)), gate

    def computed(self, unit: Unit, tokens: Tokens, gate: Gate, out: Tensor | None = None) -> Tensor:
        """The residual stream ``(B, N, C)`` behind ``unit``.

        Args:
            unit: a gated one.
            tokens: what enters it.
            gate: which of them it computes.
            out: the stream to which all is added already that stands beside the unit; it is written to. None where
                nobody has done that.
        """
        batch, count, width = tokens.x.shape
        index, counts = self.select(unit, tokens, gate)
        every = self.takes_all and not torch.compiler.is_compiling() and len(index) == batch * count
        if out is None:
            tokens = unit.with_norm(tokens)
            if every:
                return _added(tokens.x + unit.update(tokens), unit, tokens, None)
            out = _added(tokens.x, unit, tokens, tokens.cover_prefix(gate.values))
            out = out.clone() if out is tokens.x else out
        elif every:
            return out.add_(unit.update(tokens))
        update = unit.update(tokens.take(index, counts))
        out = out.reshape(batch * count, width)
        return out.index_add_(0, index, update.to(out.dtype)).view(batch, count, width)

    def select(self, unit: Unit, tokens: Tokens, gate: Gate) -> tuple[Tensor, tuple[int, ...] | Tensor | None]:
        """Positions of the active tokens in the flattened batch, and for attention how many each image has.

        A traced graph, in which there are no such numbers yet, gets them as a tensor.
        """
        mask = tokens.cover_prefix(gate.values) > 0.5
        if tokens.provenance.present is not None and not unit.tokenwise:
            raise DyntuneError(
                f"{unit.path}: while training, a policy hides tokens behind a mask, which attention among the active "
                'tokens alone cannot see. Run with execution="masked", or in eval mode.'
            )
        # Only attention asks which token belongs to which image, and on a GPU the answer costs a synchronisation.
        counts: tuple[int, ...] | Tensor | None = None
        if not unit.tokenwise:
            counts = mask.sum(1) if torch.compiler.is_compiling() else tuple(mask.sum(1).tolist())
        return mask.flatten().nonzero().squeeze(1), counts
