"""Auto: another token policy, with the settings that meet a MACs budget."""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from dyntune.backbones.base import Backbone
from dyntune.core.errors import SpecError
from dyntune.parts.policies.base import TokenPolicy, Trial
from dyntune.parts.spec import format_value


@dataclass(frozen=True)
class Auto(TokenPolicy):
    """Another token policy, with the settings that meet a MACs budget on the backbone at hand.

    Candidates are ordered from none to the strongest reduction, by which their MACs fall. They are counted from shapes,
    with everything installed that is given beside them; no image is looked at and nothing is trained. Of those within
    the budget the one nearest to it is taken. The tuned model holds what was found, so it is written and saved as, for
    instance, ``tome:r=9``.

    - tome: the same r in every block, one more in the last few, and one pair more in the last block in which that
      meets the budget, so r may rise and fall by one. A late merge saves less than an early one, but it is decided on
      features that know more.
    - evit: one keep rate k for the blocks a quarter, a half and three quarters of the way; in the last of them a lower
      one where that comes nearer to the budget.
    - dynamicvit: k, k^2 and k^3 of the patches in front of the same blocks, the last lower where that comes nearer.
    - dispatch: one rate for all MLPs.

    Rates have three decimals. Any other policy may be given beside this one: ``dyt`` with ``auto`` searches r of DyT +
    ToMe.

    Args:
        budget: share of the untouched backbone's MACs, without the head, that the tuned model, method and policy
            included, may take; above 0 and at most 1.
        policy: the policy whose settings are searched.
    """

    source: ClassVar[str] = "a search over the settings of published policies, each with its own source"

    budget: float = 0.6
    policy: Literal["tome", "evit", "dynamicvit", "dispatch"] = "tome"

    def check(self) -> None:
        self.require(0 < self.budget <= 1, "budget above 0 and at most 1")

    def install(self, backbone: Backbone) -> None:
        raise SpecError("auto searches beside everything else that is given, so it can be given only once.")

    def settle(self, trial: Trial) -> str:
        macs = functools.cache(trial.macs)

        def fits(spec: str) -> bool:
            return macs(spec) <= self.budget * trial.dense_macs

        line = _LINES[self.policy](trial)
        weakest, strongest = line.candidate(0), line.candidate(line.levels)
        if fits(weakest):
            return weakest
        if not fits(strongest):
            lowest = math.ceil(macs(strongest) / trial.dense_macs * 1000) / 1000
            raise SpecError(
                f"auto: {self.policy}, with everything that is given beside it, takes between {lowest:g} and "
                f"{macs(weakest) / trial.dense_macs:.3f} of this backbone's MACs; given budget={self.budget:g}. "
                "Give a budget in that range, or another policy."
            )
        level = 1 + bisect_left(range(1, line.levels), True, key=lambda level: fits(line.candidate(level)))
        between = line.between(level)
        first = bisect_left(between, True, key=fits)
        return max([*between[first : first + 1], line.candidate(level)], key=macs)


@dataclass(frozen=True)
class _Line:
    """Candidates in the order of falling MACs.

    Args:
        levels: number of the last one.
        candidate: its spec from its number; number 0 reduces nothing.
        between: candidates between a number and the one before it, in the same order.
    """

    levels: int
    candidate: Callable[[int], str]
    between: Callable[[int], list[str]]


def _tome(trial: Trial) -> _Line:
    depth = trial.depth

    def spec(merges: list[int]) -> str:
        return f"tome:r={format_value(tuple(merges)) if len(set(merges)) > 1 else merges[0]}"

    def merges(level: int) -> list[int]:
        same, more = divmod(level, depth)
        return [same + (block >= depth - more) for block in range(depth)]

    def between(level: int) -> list[str]:
        before = merges(level - 1)
        return [spec([*before[:block], before[block] + 1, *before[block + 1 :]]) for block in reversed(range(depth))]

    return _Line(depth * (trial.patches // 2), lambda level: spec(merges(level)), between)


def _evit(trial: Trial) -> _Line:
    return _staged("evit", trial, lambda keep, stage: keep)


def _dynamicvit(trial: Trial) -> _Line:
    return _staged("dynamicvit", trial, lambda keep, stage: max(keep**stage, 0.001))


def _staged(policy: str, trial: Trial, rate: Callable[[float, int], float]) -> _Line:
    """Keep rates of a few blocks, from one number and the number of the stage, which begins at 1."""
    layers = tuple(sorted({trial.depth * quarter // 4 for quarter in (1, 2, 3)}))

    def spec(rates: list[float]) -> str:
        return f"{policy}:keep={format_value(tuple(rates))},layers={format_value(layers)}"

    def rates(level: int) -> list[float]:
        return [round(rate(1 - level / 1000, stage), 3) for stage in range(1, len(layers) + 1)]

    def between(level: int) -> list[str]:
        *before, last = rates(level - 1)
        return [spec([*before, lower / 1000]) for lower in reversed(range(1, round(1000 * last)))]

    return _Line(999, lambda level: spec(rates(level)), between)


def _dispatch(trial: Trial) -> _Line:
    return _Line(1000, lambda level: f"dispatch:rate={format_value(round(1 - level / 1000, 3))}", lambda level: [])


_LINES: dict[str, Callable[[Trial], _Line]] = {
    "tome": _tome,
    "evit": _evit,
    "dynamicvit": _dynamicvit,
    "dispatch": _dispatch,
}
