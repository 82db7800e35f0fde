"""The one forward path of every model, and its executions: masked and sampled (to train), compact (really skipping).

Training, evaluation, skipping and counting all walk the blocks with ``run``; an ``Execution`` only says how a gated
unit is computed.
"""

import abc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dyntune.backbones.base import Backbone
from dyntune.backbones.units import Block, Mlp, Unit
from dyntune.core.errors import DyntuneError
from dyntune.core.tokens import Tokens
from dyntune.parts.policies.base import Gate, Output, Reduction, TokenPolicy


class Execution(abc.ABC):
    """How one unit is computed: one that every token goes through, or one with a gate."""

    def plain(self, unit: Unit, tokens: Tokens) -> Tokens:
        """The tokens behind ``unit``, an attention or MLP sub-layer that computes all of them."""
        return tokens.with_x(tokens.x + unit.change(tokens))

    @abc.abstractmethod
    def gated(self, unit: Unit, tokens: Tokens, policy: TokenPolicy) -> tuple[Tokens, Gate]:
        """The tokens behind ``unit``, of which only prefix tokens and those that ``policy`` lets through computed."""


class Masked(Execution):
    """Computes every token and multiplies the update by the gate: differentiable in the gate."""

    def gated(self, unit: Unit, tokens: Tokens, policy: TokenPolicy) -> tuple[Tokens, Gate]:
        gate = policy.gate(unit, tokens)
        tokens = unit.prepare(tokens)
        mask = tokens.cover_prefix(gate.values)
        update = unit.update(tokens.with_keys(mask)) * mask.unsqueeze(-1)
        beside = unit.beside_update(tokens)
        return tokens.with_x(tokens.x + update if beside is None else tokens.x + update + beside), gate


class Sampled(Masked):
    """Computes the active tokens and, for the gradient of their gates, the share of the others that a policy explores.

    Forward this is ``Masked``: the gate of a skipped token is 0. Backward that 0 lets no gradient into the token's
    update either, so an explored token is computed without a graph; only its gate has a gradient, ``1 / share`` times
    that of ``Masked``, so that their expectations are equal. With a share of 1 nothing is random, and every gradient is
    that of ``Masked`` up to rounding. Units other than MLPs, and those whose update the host drops for whole images
    (stochastic depth), are masked.
    """

    def gated(self, unit: Unit, tokens: Tokens, policy: TokenPolicy) -> tuple[Tokens, Gate]:
        share = policy.explored(unit)
        if share is None or not isinstance(unit, Mlp) or unit.drop_path_rate:
            return super().gated(unit, tokens, policy)
        gate = policy.gate(unit, tokens)
        tokens = unit.prepare(tokens)
        mask = tokens.cover_prefix(gate.values).flatten()
        explored = mask < 0.5
        active = (~explored).nonzero().squeeze(1)
        if share < 1:
            explored = explored & (torch.rand(mask.shape, device=mask.device) < share)
        others = explored.nonzero().squeeze(1)
        # These first: autocast keeps the weights that it casts, and those that it casts without a graph learn nothing.
        update = unit.update(tokens.take(active, None)) * mask[active].unsqueeze(1)
        with torch.no_grad():
            skipped = unit.update(tokens.take(others, None))
        beside = unit.beside_update(tokens)
        out = (tokens.x if beside is None else tokens.x + beside).flatten(0, 1)
        out = out.index_add(0, active, update.to(out.dtype))
        out = out.index_add(0, others, (skipped * (mask[others] / share).unsqueeze(1)).to(out.dtype))
        return tokens.with_x(out.view_as(tokens.x)), gate


class Compact(Execution):
    """Gathers the active tokens of the whole batch, computes only those, and adds them back where they came from."""

    def gated(self, unit: Unit, tokens: Tokens, policy: TokenPolicy) -> tuple[Tokens, Gate]:
        gate = policy.gate(unit, tokens)
        return tokens.with_x(self.computed(unit, tokens, gate)), gate

    def computed(self, unit: Unit, tokens: Tokens, gate: Gate) -> Tensor:
        """The residual stream ``(B, N, C)`` behind ``unit``."""
        batch, count, width = tokens.x.shape
        index, counts = self.select(unit, tokens, gate)
        tokens = unit.prepare(tokens)
        beside = unit.beside_update(tokens)
        if not torch.compiler.is_compiling() and len(index) == batch * count:
            update = unit.update(tokens)
            return tokens.x + update if beside is None else tokens.x + update + beside
        update = unit.update(tokens.take(index, counts))
        out = (tokens.x.clone() if beside is None else tokens.x + beside).reshape(batch * count, width)
        return out.index_add_(0, index, update.to(out.dtype)).view(batch, count, width)

    def select(self, unit: Unit, tokens: Tokens, gate: Gate) -> tuple[Tensor, tuple[int, ...] | Tensor | None]:
        """Positions of the active tokens in the flattened batch, and for attention how many each image has.

        A traced graph, in which there are no such numbers yet, gets them as a tensor.
        """
        mask = tokens.cover_prefix(gate.values) > 0.5
        if tokens.sources.present is not None and not unit.tokenwise:
            raise DyntuneError(
                f"{unit.path}: while training, a policy hides tokens behind a mask, which attention among the active "
                'tokens alone cannot see. Run with execution="masked", or in eval mode.'
            )
        # Only attention asks which token belongs to which image, and on a GPU the answer costs a synchronisation.
        counts: tuple[int, ...] | Tensor | None = None
        if not unit.tokenwise:
            counts = mask.sum(1) if torch.compiler.is_compiling() else tuple(mask.sum(1).tolist())
        return mask.flatten().nonzero().squeeze(1), counts


def run(
    backbone: Backbone,
    policies: Sequence[TokenPolicy],
    images: Tensor,
    execution: Execution,
    watch: Callable[[Block, Tokens], None] | None = None,
) -> Output:
    """Runs a backbone with everything that is installed on it.

    Args:
        backbone: with its methods' and policies' modules.
        policies: which tokens there are and which a unit computes; an empty sequence computes every token (DyT's
            "complete model").
        images: ``(B, 3, height, width)``.
        execution: how gated units compute.
        watch: called behind every block with the block and the tokens that left it.
    """
    bypass = backbone.bypass
    # No gradient goes from a bypass to the blocks, so they need not remember anything for it.
    with torch.set_grad_enabled(torch.is_grad_enabled() and bypass is None):
        tokens = backbone.embed(images)
    stream = bypass.begin(tokens.x) if bypass else None
    decisions: list[Gate | Reduction] = []
    for block in backbone.blocks:
        with torch.set_grad_enabled(torch.is_grad_enabled() and bypass is None):
            if backbone.gradient_checkpointing and backbone.training:
                # The tensor by itself: from it checkpoint learns of which device to keep the random state.
                tokens, decided = checkpoint(
                    _recomputed, tokens.x, block, tokens, policies, execution, use_reentrant=False
                )
            else:
                tokens, decided = _enter(block, tokens, policies, execution)
        decisions.extend(decided)
        stream = bypass.step(block.index, stream, tokens.x) if bypass and stream is not None else None
        if watch:
            watch(block, tokens)
    finished = backbone.finish(tokens if stream is None else tokens.with_x(stream))
    return Output(
        backbone.readout(finished),
        tuple(decision for decision in decisions if isinstance(decision, Gate)),
        finished.grid,
        tuple(decision for decision in decisions if isinstance(decision, Reduction)),
        finished,
    )


def _enter(
    block: Block, tokens: Tokens, policies: Sequence[TokenPolicy], execution: Execution
) -> tuple[Tokens, tuple[Gate | Reduction, ...]]:
    """One block, with what stands in front of it."""
    tokens, _, reduced = _reduce(block, block.enter(tokens), None, policies, None)
    tokens, decided = _step(block, tokens, policies, execution)
    return tokens, (*reduced, *decided)


def _recomputed(
    x: Tensor, block: Block, tokens: Tokens, policies: Sequence[TokenPolicy], execution: Execution
) -> tuple[Tokens, tuple[Gate | Reduction, ...]]:
    return _enter(block, tokens.with_x(x), policies, execution)


def _step(
    unit: Unit, tokens: Tokens, policies: Sequence[TokenPolicy], execution: Execution
) -> tuple[Tokens, tuple[Gate | Reduction, ...]]:
    """One unit: gated as a whole, or for a block that is not, its two sub-layers in turn."""
    policy = None if tokens.only_read else _deciding(policies, unit)
    if policy is not None:
        tokens, gate = execution.gated(unit, tokens, policy)
        return tokens, (gate,)
    if not isinstance(unit, Block):
        return execution.plain(unit, tokens), ()
    beside = unit.beside_update(tokens)
    projected = None
    if any(policy.reduces(unit.mlp) for policy in policies):
        # Computed here once, for the attention and for the policy that reads them.
        projected = unit.attn.projected(tokens := unit.attn.prepare(tokens))
        tokens = tokens.with_projected(projected)
    tokens, decided = _step(unit.attn, tokens, policies, execution)
    if tokens.only_read and beside is not None:
        beside = beside[:, : tokens.prefix]
    tokens, beside, reduced = _reduce(unit.mlp, tokens, beside, policies, projected)
    tokens, mlp_decided = _step(unit.mlp, tokens, policies, execution)
    return (tokens if beside is None else tokens.with_x(tokens.x + beside)), (*decided, *reduced, *mlp_decided)


def _deciding(policies: Sequence[TokenPolicy], unit: Unit) -> TokenPolicy | None:
    """The policy that decides which tokens go through ``unit``, if one does."""
    for policy in policies:  # not next(), whose default torch.compile of PyTorch 2.8 cannot trace
        if policy.gates(unit):
            return policy
    return None


def _reduce(
    unit: Unit,
    tokens: Tokens,
    beside: Tensor | None,
    policies: Sequence[TokenPolicy],
    projected: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[Tokens, Tensor | None, tuple[Reduction, ...]]:
    """The tokens that go on into ``unit``, and the update ``beside`` them that is yet to be added, for those."""
    for policy in policies:
        apply = policy.reduction(unit, tokens, projected) if policy.reduces(unit) else None
        if apply is not None:
            beside = None if beside is None else apply(tokens.with_x(beside)).x
            tokens = apply(tokens)
            return tokens, beside, (Reduction(unit.path, policy, tokens.sources, tokens.x.shape[1]),)
    return tokens, beside, ()


def activation_rates(gates: Sequence[Gate]) -> Tensor:
    """Share of the tokens that each gate kept active, averaged over the batch: ``(gates,)``, between 0 and 1."""
    return torch.stack([gate.there.detach().float().mean() for gate in gates]) if gates else torch.empty(0)
