"""The execution of an optimised model: compact, with shared products, and no token computed that nobody reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from dyntune.backbones.units import Attention, Unit
from dyntune.core.tokens import Tokens
from dyntune.inference.joint import Joint, key
from dyntune.model.executions import Compact, Execution
from dyntune.parts.policies.base import Gate
from dyntune.parts.policies.gating import GatingPolicy


@dataclass(frozen=True)
class Ending:
    """The place in the last block behind which only the tokens that the head reads are computed.

    Args:
        attention: path of the last block's attention.
        count: how many leading tokens of each image the head reads.
        queries: whether that attention, too, computes queries and what follows for them alone.
    """

    attention: str
    count: int
    queries: bool


class Fast(Execution):
    """Computes no token that nobody reads.

    Args:
        within: how units compute apart from that.
        ending: what may be left out at the end; None if nothing.
    """

    def __init__(self, within: Execution, ending: Ending | None) -> None:
        self.within = within
        self.ending = ending

    def plain(self, unit: Unit, tokens: Tokens) -> Tokens:
        if self.ending is None or unit.path != self.ending.attention:
            return self.within.plain(unit, tokens)
        if self.ending.queries:
            return _asked_by(cast(Attention, unit), tokens, self.ending.count)
        return self.within.plain(unit, tokens).first(self.ending.count)

    def gated(self, unit: Unit, tokens: Tokens, policy: GatingPolicy) -> tuple[Tokens, Gate]:
        tokens, gate = self.within.gated(unit, tokens, policy)
        if self.ending is not None and unit.path == self.ending.attention:
            tokens = tokens.first(self.ending.count)
        return tokens, gate


class Shared(Compact):
    """Computes the active tokens only, and gate and adapter in one product; without gradients.

    Args:
        joints: the shared products, by the unit's key.
    """

    def __init__(self, joints: nn.ModuleDict) -> None:
        self.joints = joints

    def gated(self, unit: Unit, tokens: Tokens, policy: GatingPolicy) -> tuple[Tokens, Gate]:
        if key(unit) not in self.joints:
            return super().gated(unit, tokens, policy)
        joint = cast(Joint, self.joints[key(unit)])
        read = joint(tokens.x)
        gate = policy.gate_from(unit, tokens, read[:, tokens.prefix :, 0])
        out = joint.written(tokens.x, read, tokens.cover_prefix(gate.values))
        return tokens.with_x(self.computed(unit, tokens, gate, out)), gate


def _asked_by(unit: Attention, tokens: Tokens, count: int) -> Tokens:
    """The first ``count`` tokens of each image behind an attention in which all tokens are keys."""
    normed = unit.normed(tokens)
    few = tokens.first(count).with_normed(normed[:, :count])
    update = unit.behind(unit.combine(unit.attended_by(tokens.with_normed(normed), count)))
    parallel: Tensor | None = unit.parallel_update(few)
    return few.with_x(few.x + update if parallel is None else few.x + update + parallel)
