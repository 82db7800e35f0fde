"""Activation rates: which share of the patches the gates let through."""

from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from dyntune.parts.policies.base import Gate


def activation_rates(gates: Sequence[Gate]) -> Tensor:
    """Share of the tokens that each gate kept active, averaged over the batch: ``(gates,)``, between 0 and 1."""
    return torch.stack([gate.there.detach().float().mean() for gate in gates]) if gates else torch.empty(0)


class MeanActivation:
    """Mean activation rate of each gated unit over the images of several batches."""

    def __init__(self) -> None:
        self._summed: dict[str, float] = {}
        self._images = 0

    def add(self, gates: Sequence[Gate], images: int) -> None:
        """Counts a batch of so many images, with what the gates decided in it."""
        self._images += images
        for gate, rate in zip(gates, activation_rates(gates).tolist(), strict=True):
            self._summed[gate.unit] = self._summed.get(gate.unit, 0.0) + images * rate

    @property
    def per_unit(self) -> dict[str, float]:
        """Of each gated unit, between 0 and 1; empty without gates."""
        return {unit: total / self._images for unit, total in self._summed.items()}

    @property
    def mean(self) -> float:
        """Over all gated units; 1 without gates, where every unit computes every patch."""
        return fmean(self.per_unit.values()) if self._summed else 1.0
