"""Gates that a training has closed although the model needs what is behind them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from dyntune.backbones.units import Unit
from dyntune.core.modes import evaluating
from dyntune.core.tokens import Tokens
from dyntune.data.transforms import preprocessed
from dyntune.model.activation import MeanActivation
from dyntune.model.executions import Compact, Execution
from dyntune.model.tuned import ExecutionName, TunedModel
from dyntune.parts.policies.base import Gate, Output
from dyntune.parts.policies.gating import GatingPolicy, gating

CLOSED = 0.1
"""A gate is closed that lets less than this share of the patches through, where twice as many were asked for."""
NEEDED = 0.05
"""The model needs a unit where closing it alone changes the answers on this share of the images."""
IMAGES = 128
"""Images to look at: one of them is less than a point of either share."""


@dataclass(frozen=True)
class ClosedGate:
    """A gate that has closed although the complete model needs its unit.

    Args:
        unit: the path of the unit, such as ``blocks.0.mlp``.
        activation: share of the patches that it lets through.
        target: share that its policy was asked for, the mean over its gates.
        changed: share of the images on which the complete model answers otherwise with this gate alone in it.
        advice: what to try.
    """

    unit: str
    activation: float
    target: float
    changed: float
    advice: str

    def __str__(self) -> str:
        return (
            f"the gate of {self.unit} has closed: it lets {self.activation:.0%} of the patches through, where "
            f"{self.target:.0%} were asked for on average, and the complete model needs what is behind it (with this "
            f"gate alone {self.changed:.0%} of its answers change). Such a gate does not open again. Try {self.advice}."
        )


@torch.no_grad()
def closed_gates(model: TunedModel, data: Dataset[Any], batch_size: int = 32) -> tuple[ClosedGate, ...]:
    """The gates that have closed although the model needs their units: one forward pass, and one more for each.

    Args:
        model: with its thresholds as trained; it is left as it was.
        data: images of (image, target); targets are not used.
        batch_size: images per forward pass.
    """
    gated = {
        unit.path: (unit, policy) for unit in model.backbone.all_units() if (policy := gating(model.policies, unit))
    }
    if not gated:
        return ()
    with evaluating(model):
        batches = list(_batches(model, data, batch_size))
        like = next(model.parameters())

        def run(batch: Tensor, execution: ExecutionName | Execution) -> Output:
            return model.run(batch.to(device=like.device, dtype=like.dtype), execution=execution)

        mean = MeanActivation()
        for batch in batches:
            mean.add(run(batch, "compact").gates, len(batch))
        active = mean.per_unit
        found = []
        complete: list[Tensor] = []
        for path, (unit, policy) in gated.items():
            target = policy.target_rate(unit)
            if active[path] >= CLOSED or target < 2 * CLOSED:
                continue
            complete = complete or [run(batch, _Alone(None)).logits for batch in batches]
            alone = (run(batch, _Alone(path)).logits for batch in batches)
            same = [model.task.agreement(one, other) for one, other in zip(alone, complete, strict=True)]
            changed = 1 - torch.cat(same).float().mean().item()
            if changed >= NEEDED:
                found.append(ClosedGate(path, active[path], target, changed, _advice(policy)))
        return tuple(found)


def _advice(policy: GatingPolicy) -> str:
    steady = "recipe=steady, " if getattr(policy, "recipe", "steady") != "steady" else ""
    return f"{steady}another seed, more epochs or a higher rate"


def _batches(model: TunedModel, data: Dataset[Any], batch_size: int) -> Iterator[Tensor]:
    """Images from all over the data set, preprocessed; on the CPU, because a device may have room for few."""
    images = preprocessed(data, model.preprocessing)
    places = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:IMAGES].tolist()
    for batch in DataLoader(Subset(images, places), batch_size, generator=torch.Generator()):
        yield batch[0]


class _Alone(Compact):
    """Opens every gate but one.

    Args:
        path: the unit whose gate decides; None opens all.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path

    def gated(self, unit: Unit, tokens: Tokens, policy: GatingPolicy) -> tuple[Tokens, Gate]:
        gate = policy.gate(unit, tokens)
        if unit.path != self.path:
            gate = replace(gate, values=torch.ones_like(gate.values))
        return tokens.with_x(self.computed(unit, tokens, gate)), gate
