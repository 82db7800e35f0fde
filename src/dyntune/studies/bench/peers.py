"""The models that are timed in turns: the one in question, the dense backbone and other peers; gates set to a rate."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dyntune.backbones.hosts import create_backbone
from dyntune.backbones.owners import release
from dyntune.backbones.units import Unit
from dyntune.core.errors import SpecError
from dyntune.core.tokens import Tokens
from dyntune.model.calibrate import threshold
from dyntune.model.executions import Compact
from dyntune.model.tuned import TunedModel
from dyntune.parts.policies.base import Gate
from dyntune.parts.policies.gating import GatingPolicy
from dyntune.parts.registry import resolve

DENSE = "dense"
"""The untouched backbone with the model's weights and head; in eager mode its own forward pass."""
GATHER = "gather"
"""The model itself, its active tokens gathered, computed and scattered by plain torch operators."""


@dataclass(frozen=True)
class Candidate:
    """One of those that are timed in turns.

    Args:
        name: ``dense``, ``gather``, or a spec as it was written.
        model: what other runtimes are built from; in eval mode.
        eager: images to logits, in torch as it is.
        trained: whether the gates are those of a trained run.
    """

    name: str
    model: TunedModel
    eager: Callable[[Tensor], Tensor]
    trained: bool = False

    @property
    def gated(self) -> bool:
        """Whether some unit has a gate."""
        return any(policy.gates(unit) for policy in self.model.policies for unit in self.model.backbone.all_units())


def fresh(name: str, parts: Sequence[str], *, classes: int, weights: str | None, pretrained: bool) -> TunedModel:
    """A model that nobody has trained; what starts at zero is random, so that an error in it would be seen.

    Args:
        name: timm name of the backbone.
        parts: tuning methods and token policies.
        classes: of the head.
        weights: local weight file of the backbone.
        pretrained: whether to load the weights that timm knows for ``name``.
    """
    host = create_backbone(name, weights=weights, pretrained=pretrained, num_classes=classes)
    return _awake(TunedModel(host, resolve(parts)))


def candidates(name: str, model: TunedModel, against: Sequence[str], *, trained: bool) -> list[Candidate]:
    """The model, ``dense``, and the other peers, each with weights of its own.

    Args:
        name: of the model.
        model: put in eval mode.
        against: ``dense``, ``gather``, or specs of fresh models on the same backbone.
        trained: whether the model's gates are trained.

    Raises:
        SpecError: the model is compared with itself.
    """
    found = [Candidate(name, model.eval(), model, trained)]
    for peer in against:
        if peer == GATHER:
            found.append(Candidate(peer, model, _Gathered(model), trained))
        elif peer == DENSE:
            dense = TunedModel(untouched(model), resolve(["linear"])).eval()
            release(dense.backbone)  # nothing is on it: what is timed is its own forward pass
            found.append(Candidate(peer, dense, dense.backbone.host_logits))
        else:
            other = _awake(TunedModel(untouched(model), resolve([peer]))).eval()
            found.append(Candidate(peer, other, other))
    specs = [candidate.model.spec for candidate in found if candidate.name not in (DENSE, GATHER)]
    if len(set(specs)) < len(specs):
        raise SpecError(f"{', '.join(specs)}: the model and its peers must differ; give each once.")
    return found


def untouched(model: TunedModel) -> nn.Module:
    """The host of a tuned model, copied, without anything that was put on it."""
    backbone = copy.deepcopy(model.backbone)
    for site in backbone.sites():
        site.restore()
    return backbone.plain().host


class _Gathered:
    def __init__(self, model: TunedModel) -> None:
        self.model = model

    def __call__(self, images: Tensor) -> Tensor:
        return self.model.run(images, execution=Compact()).logits


@torch.no_grad()
def _awake(model: TunedModel) -> TunedModel:
    for tensor in model.tuned_state().values():
        if tensor.ndim > 1 and not tensor.any():
            nn.init.trunc_normal_(tensor, std=0.02)
    return model


class _Setting(Compact):
    """Moves the bias of each gate on the way, so that those behind it see what it lets through.

    Args:
        rate: share of the patches; None for the target of each gate.
    """

    def __init__(self, rate: float | None) -> None:
        self.rate = rate

    def gated(self, unit: Unit, tokens: Tokens, policy: GatingPolicy) -> tuple[Tokens, Gate]:
        linear, gate = policy.linear_gate(unit), policy.learned(unit)
        logits = gate.logits(tokens.patches)
        between = threshold(logits, policy.target_rate(unit) if self.rate is None else self.rate)
        if linear is not None and linear.bias is not None:
            linear.bias.sub_(between)
        else:
            gate.set_rate(gate.shift.item() - between.item(), gate.rate)
        return super().gated(unit, tokens, policy)


@torch.no_grad()
def set_gates(model: TunedModel, images: Tensor, rate: float | None = None) -> None:
    """Sets every gate, by bias or threshold, so that it lets the given share of the patches of these images through.

    The share is met exactly, up to whole patches, unless patches have equal logits. It is that of the whole batch:
    images in it may differ.

    Args:
        model: changed in place; put in eval mode.
        images: ``(B, 3, height, width)``.
        rate: share of the patches, between 0 and 1; None for the target that each gate was built with.
    """
    model.eval().run(images, execution=_Setting(rate))
