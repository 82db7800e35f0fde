"""The one forward pass of every model.

Training, evaluation, skipping and counting all walk the blocks with ``run``; an ``Execution`` only says how a gated
unit is computed.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dyntune.backbones.base import Backbone
from dyntune.backbones.hosts import DATA_PARALLEL
from dyntune.backbones.units import Block, Unit
from dyntune.core.errors import BackboneError
from dyntune.core.tokens import Projected, Tokens
from dyntune.model.executions import Execution
from dyntune.parts.policies.base import Gate, Output, Reduction, TokenPolicy
from dyntune.parts.policies.gating import gating
from dyntune.parts.policies.reducing import ReducingPolicy


def run(
    backbone: Backbone,
    policies: Sequence[TokenPolicy],
    images: Tensor,
    execution: Execution,
    watch: Callable[[Tokens], None] | None = None,
) -> Output:
    """Runs a backbone with everything that is installed on it.

    Args:
        backbone: with its methods' and policies' modules.
        policies: which tokens there are and which a unit computes; an empty sequence computes every token (DyT's
            "complete model").
        images: ``(B, 3, height, width)``; they are brought to the precision of the backbone's weights.
        execution: how gated units compute.
        watch: called with the tokens that the embedding gives, and behind every block with those that leave it.
    """
    if getattr(backbone, "_is_replica", False):  # of nn.DataParallel, which wraps from outside
        raise BackboneError(DATA_PARALLEL)
    bypass = backbone.bypass
    images = backbone.in_its_precision(images)
    # No gradient goes from a bypass to the blocks, so they need not remember anything for it.
    with torch.set_grad_enabled(torch.is_grad_enabled() and bypass is None):
        tokens = backbone.embed(images)
    grid = tokens.grid
    if watch:
        watch(tokens)
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
            watch(tokens)
    finished = backbone.finish(tokens if stream is None else tokens.with_x(stream))
    return Output(
        backbone.readout(finished),
        tuple(decision for decision in decisions if isinstance(decision, Gate)),
        grid,
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
    policy = None if tokens.only_read else gating(policies, unit)
    if policy is not None:
        tokens, gate = execution.gated(unit, tokens, policy)
        return tokens, (gate,)
    if not isinstance(unit, Block):
        return execution.plain(unit, tokens), ()
    parallel = unit.parallel_update(tokens)
    projected = None
    if any(policy.reduces(unit.mlp) for policy in policies):
        # Computed here once, for the attention and for the policy that reads them.
        projected = unit.attn.projected(tokens := unit.attn.with_norm(tokens))
        tokens = tokens.with_projected(projected)
    tokens, decided = _step(unit.attn, tokens, policies, execution)
    if tokens.only_read and parallel is not None:
        parallel = parallel[:, : tokens.prefix]
    tokens, parallel, reduced = _reduce(unit.mlp, tokens, parallel, policies, projected)
    tokens, mlp_decided = _step(unit.mlp, tokens, policies, execution)
    return (tokens if parallel is None else tokens.with_x(tokens.x + parallel)), (*decided, *reduced, *mlp_decided)


def _reduce(
    unit: Unit,
    tokens: Tokens,
    parallel: Tensor | None,
    policies: Sequence[TokenPolicy],
    projected: Projected | None,
) -> tuple[Tokens, Tensor | None, tuple[Reduction, ...]]:
    """The tokens that go on into ``unit``, and the update ``parallel`` to them that is yet to be added, for those."""
    for policy in policies:
        if not policy.reduces(unit):
            continue
        apply = cast(ReducingPolicy, policy).reduction(unit, tokens, projected)
        if apply is not None:
            parallel = None if parallel is None else apply(tokens.with_x(parallel)).x
            tokens = apply(tokens)
            return tokens, parallel, (Reduction(unit.path, policy, tokens.provenance, tokens.x.shape[1]),)
    return tokens, parallel, ()
