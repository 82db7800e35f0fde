"""Installing parts on a backbone; before that, a policy that searches its settings finds them on an empty copy."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import chain
from typing import cast

from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.backbones.hosts import wrap
from dyntune.core.limits import limits_named
from dyntune.core.shapes import shapes_only
from dyntune.model.macs import trace, traced_macs
from dyntune.parts.checks import check_bypass, check_gates, check_grid, check_reductions
from dyntune.parts.methods.base import TuningMethod
from dyntune.parts.policies.base import Searching, TokenPolicy
from dyntune.parts.policies.gating import gating
from dyntune.parts.registry import expand, resolve
from dyntune.parts.spec import Part, format_value

log = logging.getLogger("dyntune")


def install(backbone: Backbone, parts: Sequence[Part]) -> tuple[TokenPolicy, ...]:
    """Freezes a backbone but for its heads, puts parts on it in their order, and checks that they go together.

    Args:
        backbone: changed in place; where a part is refused, what the host itself has lost is given back.
        parts: tuning methods, token policies and presets.

    Returns:
        The token policies among them.

    Raises:
        BackboneError: a part is not defined on the backbone or beside the others.
    """
    installed = expand(parts)
    policies = tuple(part for part in installed if isinstance(part, TokenPolicy))
    host = backbone.host
    trained_before = {p: p.requires_grad for p in host.parameters()}
    host.requires_grad_(False)
    for parameter in chain(backbone.adopted, *(m.parameters() for m in (*backbone.heads, *backbone.necks))):
        parameter.requires_grad_(True)
    try:
        with limits_named():
            for part in installed:
                cast(TuningMethod | TokenPolicy, part).install(backbone)
        for parameter in backbone.idle:
            parameter.requires_grad_(False)
        check_grid(backbone)
        check_gates(backbone, policies)
        check_reductions(backbone, policies)
        check_bypass(backbone, policies)
    except BaseException:
        for site in backbone.sites():
            site.restore()
        for parameter, trained in trained_before.items():
            parameter.requires_grad_(trained)
        raise
    like = next(host.parameters())
    for name, module in backbone.named_children():
        if name != "host":
            module.to(device=like.device, dtype=like.dtype)
    return policies


def settled(host: nn.Module, parts: Sequence[Part], dense_macs: int) -> tuple[Part, ...]:
    """The parts, with those that search their settings replaced by what they have found; a log message says what.

    Args:
        host: the model that the parts are meant for; nothing is put on it.
        parts: tuning methods, token policies and presets.
        dense_macs: MACs per image of the untouched backbone without its head.
    """
    for place, part in enumerate(parts):
        if isinstance(part, Searching):
            trial = CopyTrial(host, (*parts[:place], *parts[place + 1 :]), place, dense_macs)
            spec = part.settle(trial)
            asked = ",".join(f"{name}={format_value(value)}" for name, value in asdict(part).items())
            log.warning("%s:%s is %s: %s.", part.name(), asked, spec, trial.describe(spec))
            parts = trial.parts(spec)
    return tuple(parts)


class CopyTrial:
    """A ``Trial`` on copies of the host that have shapes and no content, so that the host itself stays as it is.

    Args:
        host: the model that the parts are meant for.
        others: the parts beside the one that is searched for.
        place: where among them it stands.
        dense_macs: MACs per image of the untouched backbone without its head.
    """

    def __init__(self, host: nn.Module, others: Sequence[Part], place: int, dense_macs: int) -> None:
        self.dense_macs = dense_macs
        self._host = host
        self._others = tuple(others)
        self._place = place

    @cached_property
    def depth(self) -> int:
        return len(self._wrapped().blocks)

    @cached_property
    def patches(self) -> int:
        return math.prod(self._wrapped().grid)

    def macs(self, spec: str) -> int:
        return traced_macs(*self._build(spec))

    def parts(self, spec: str) -> tuple[Part, ...]:
        """All parts, with ``spec`` in the place of the one that is searched for."""
        return (*self._others[: self._place], *resolve([spec]), *self._others[self._place :])

    def describe(self, spec: str) -> str:
        """What ``spec`` costs in this place, and its schedule, for people."""
        backbone, policies = self._build(spec)
        traced = trace(backbone, policies)
        text = f"{traced.macs:,} of {self.dense_macs:,} MACs ({traced.macs / self.dense_macs:.2%})"
        if any(policy.reduces(unit) for policy in policies for unit in backbone.all_units()):
            text += f"; tokens in the MLP of each block: {' '.join(map(str, traced.mlp_tokens))}"
        gated = ((unit, gating(policies, unit)) for unit in backbone.all_units())
        rates = [policy.target_rate(unit) for unit, policy in gated if policy is not None]
        if rates:
            text += f"; share of patches computed in each gated unit: {' '.join(f'{rate:g}' for rate in rates)}"
        return text

    def _build(self, spec: str) -> tuple[Backbone, tuple[TokenPolicy, ...]]:
        backbone = self._wrapped()
        with shapes_only():
            return backbone, install(backbone, self.parts(spec))

    def _wrapped(self) -> Backbone:
        return wrap(copy.deepcopy(self._empty))

    @cached_property
    def _empty(self) -> nn.Module:
        return empty_copy(self._host)


def empty_copy(host: nn.Module) -> nn.Module:
    """A copy of a model with tensors on the meta device."""
    tensors: dict[int, Tensor] = {id(b): b.to("meta") for b in host.buffers()}
    for p in host.parameters():
        tensors[id(p)] = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
    return copy.deepcopy(host, tensors)
