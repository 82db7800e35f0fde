"""Finding the thresholds with which a model's gates come to other activation rates, on images without labels."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from dyntune.backbones.hosts import not_tuned
from dyntune.backbones.units import Unit
from dyntune.core.errors import DataError, SpecError
from dyntune.core.tokens import Tokens
from dyntune.data.others import require_images
from dyntune.data.transforms import Preprocessing, preprocessed
from dyntune.model.activation import MeanActivation
from dyntune.model.executions import Compact
from dyntune.model.rates import Calibration, Gated, dispatchers, require_gates, set_thresholds, shift_gates
from dyntune.model.twin import twin
from dyntune.parts.policies.base import Gate, Output
from dyntune.parts.policies.gating import GatingPolicy, LearnedGate

RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""The rates that a model is calibrated for unless others are asked for; those between are interpolated."""
IMAGES = 256
"""Images that suffice: with some dozen patches each, a gate's quantile is known to a fraction of a point."""
_CLOSE = 0.005
"""Distance of the mean activation to the asked one that is good enough."""
_EXTREME = 0.01
"""A gate that keeps less than this share, or drops less, counts as keeping, or dropping, this share."""

log = logging.getLogger("dyntune")


class Calibrated(Gated, Protocol):
    """A model that can be run to calibrate its gates."""

    preprocessing: Preprocessing

    def run(self, images: Tensor, *, execution: Any = None) -> Output: ...

    def eval(self) -> Any: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def buffers(self) -> Iterator[Tensor]: ...


def set_rate(model: Calibrated, rate: float | None, data: Dataset[Any] | Tensor | None = None) -> None:
    """Shifts the gates' thresholds; see ``TunedModel.set_rate``."""
    measured = data is not None and isinstance(rate, Real) and 0 < rate < 1
    shift_gates(model, rate, calibrate(model, data, (rate,)) if measured else model.calibration)  # type: ignore[arg-type]


@torch.no_grad()
def calibrate(
    model: Calibrated,
    data: Dataset[Any] | Tensor,
    rates: Sequence[float] = RATES,
    *,
    images: int = IMAGES,
    batch_size: int = 32,
    watch: Callable[[int], object] | None = None,
) -> Calibration:
    """Finds, for each rate, the thresholds at which that share of the patches is active, the mean over all gates.

    Gates that training has left more open stay so: with a_l the activation of gate l as trained (of an elastic gate,
    at the middle of its range), it is to have ``sigmoid(logit(a_l) + d)``, with the same d for all of them that
    gives the mean asked for. From the first gate to the last, each takes as threshold the quantile of its logits, so
    that later ones see what earlier ones let through. Where tokens are merged or dropped, a gate's activation is the
    share of the tokens that reach it. What comes out is measured, and corrected once where it is half a point off.

    Args:
        model: with dispatch; it is left as it was.
        data: images ``(N, 3, height, width)``, preprocessed, or a data set of (image, label); labels are not used.
        rates: mean activations, above 0 and below 1.
        images: how many to use, drawn from the data at random, always the same; all, where there are fewer.
        batch_size: images per forward pass.
        watch: is told after each rate how many are done.

    Raises:
        SpecError: the model has no gates, or a rate is not above 0 and below 1.
        DataError: there is no image.
    """
    if not hasattr(model, "backbone"):
        raise not_tuned(model, "calibrate")
    gates = dispatchers(model.backbone)
    require_gates(model, gates)
    require_images(data, "what to calibrate on")
    if not isinstance(rates, Sequence) or not rates or not all(0 < rate < 1 for rate in rates):
        raise SpecError(f"rates {rates}: expected a list of rates above 0 and below 1, for instance (0.3, 0.5).")
    asked = tuple(sorted({float(rate) for rate in rates}))
    batches = _batches(model, data, images, batch_size)
    # On a twin: who runs the model in another thread meanwhile sees nothing of what is tried here.
    model = twin(model, [gate.shift for gate in dispatchers(model.backbone).values()])
    gates = dispatchers(model.backbone)
    model.eval()
    set_thresholds(gates, dict.fromkeys(gates, (0.0, None)))
    natural = _activations(model, batches)
    points = []
    for rate in asked:
        points.append(_point(model, gates, batches, rate, natural))
        if watch:
            watch(len(points))
    for rate, (_, came_out) in zip(asked, points, strict=True):
        if abs(_mean(came_out) - rate) > 4 * _CLOSE:
            log.warning(
                "rate %g: on these images the gates came to %.3f. Many of their logits may be equal.",
                rate,
                _mean(came_out),
            )
    shifts, activations = ({unit: tuple(p[i][unit] for p in points) for unit in gates} for i in (0, 1))
    return Calibration(sum(map(len, batches)), asked, shifts, activations)


def _point(
    model: Calibrated, gates: dict[str, LearnedGate], batches: list[Tensor], rate: float, natural: dict[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Shift and activation of every gate at one rate."""

    def attempt(aim: float) -> tuple[dict[str, float], dict[str, float]]:
        execution = _AtQuantiles(_targets(natural, aim))
        for batch in batches:
            model.run(_to_device(batch, model), execution=execution)
        shifts = {unit: -summed / execution.counted[unit] for unit, summed in execution.summed.items()}
        with _shifted(gates, shifts):
            return shifts, _activations(model, batches)

    first = attempt(rate)
    error = _mean(first[1]) - rate
    if abs(error) <= _CLOSE:
        return first
    second = attempt(min(max(rate - error, _EXTREME), 1 - _EXTREME))
    return min(first, second, key=lambda point: abs(_mean(point[1]) - rate))


class _AtQuantiles(Compact):
    """Opens every gate for a given share of the tokens of the batch, those with the highest logits.

    Args:
        targets: the share of each gated unit, by path.
    """

    def __init__(self, targets: dict[str, float]) -> None:
        self.targets = targets
        self.summed = dict.fromkeys(targets, 0.0)
        """Of each gated unit, the sum over all images, or frames, of the threshold that their batch was given."""
        self.counted = dict.fromkeys(targets, 0)
        """How many images or frames each gated unit has seen."""

    def gated(self, unit: Unit, tokens: Tokens, policy: GatingPolicy) -> tuple[Tokens, Gate]:
        gate = policy.gate(unit, tokens)
        if unit.path in self.targets and gate.logits is not None:
            if not bool(gate.logits.isfinite().all()):
                raise DataError(
                    f"the logits of the gate of {unit.path} are not finite on the images of the calibration, so that "
                    "nothing can be set by them. Look for images that are not, or weights that a step has spoilt."
                )
            between = threshold(gate.logits, self.targets[unit.path])
            self.summed[unit.path] += len(gate.logits) * between.item()
            self.counted[unit.path] += len(gate.logits)
            gate = replace(gate, values=(gate.logits > between).to(gate.values.dtype))
        return tokens.with_x(self.computed(unit, tokens, gate)), gate


def threshold(logits: Tensor, share: float) -> Tensor:
    """A number in the middle between two of the logits that differ, above which lies about a share of them.

    As close to ``share`` as equal logits allow: they are all above it, or none is.
    """
    ordered = logits.flatten().sort(descending=True).values
    margin = ordered[:1].abs().maximum(ordered[-1:].abs()).clamp_min(1)
    padded = torch.cat([ordered[:1] + margin, ordered, ordered[-1:] - margin])
    possible = (padded[:-1] > padded[1:]).nonzero().squeeze(1)  # so many logits can be above a number
    active = possible[(possible - share * len(ordered)).abs().argmin()]
    return (padded[active] + padded[active + 1]) / 2


def _targets(natural: dict[str, float], rate: float) -> dict[str, float]:
    """The share of each gate: as far from its natural one as all others, in logits, with ``rate`` as their mean."""
    clamped = {unit: min(max(share, _EXTREME), 1 - _EXTREME) for unit, share in natural.items()}
    logits = np.array([math.log(share / (1 - share)) for share in clamped.values()])
    asked = math.log(rate / (1 - rate))
    low, high = asked - logits.max(), asked - logits.min()
    for _ in range(60):
        middle = (low + high) / 2
        if (1 / (1 + np.exp(-(logits + middle)))).mean() < rate:
            low = middle
        else:
            high = middle
    return dict(zip(clamped, (1 / (1 + np.exp(-(logits + high)))).tolist(), strict=True))


def _activations(model: Calibrated, batches: list[Tensor]) -> dict[str, float]:
    """Share of active tokens of each gated unit, as ``evaluate`` counts it."""
    active = MeanActivation()
    for batch in batches:
        active.add(model.run(_to_device(batch, model), execution="compact").gates, len(batch))
    return active.per_unit


def _mean(activations: dict[str, float]) -> float:
    return sum(activations.values()) / len(activations)


def _batches(model: Calibrated, data: Dataset[Any] | Tensor, images: int, batch_size: int) -> list[Tensor]:
    """Images of ``data``, preprocessed; read once, because every rate sees them several times.

    They are drawn at random, always the same ones: in a batch of one class gates have other quantiles than in all.
    """
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise DataError(
            f"calibration takes a tensor of preprocessed images (N, 3, height, width) or a data set with a length; "
            f"given {type(data).__name__}. Of a DataLoader, give the data set."
        )
    size = len(data)
    count = min(images, size)
    if count < 1:
        raise DataError(f"calibration needs images; given {size}, of which {images} were to be used.")
    places = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:count]
    if isinstance(data, Tensor):
        if data.ndim != len(model.backbone.input_shape) + 1 or not data.is_floating_point():
            raise DataError(
                f"calibration takes preprocessed images (N, 3, height, width) in floating point; given {data.dtype} of "
                f"shape {tuple(data.shape)}. Give what the model is given."
            )
        return list(data[places].split(batch_size))
    # With a generator of its own the loader draws nothing from the caller's.
    subset = Subset(preprocessed(data, model.preprocessing), places.tolist())
    loader = DataLoader(subset, batch_size, generator=torch.Generator())
    return [batch[0] if isinstance(batch, list | tuple) else batch for batch in loader]


def _to_device(batch: Tensor, model: Calibrated) -> Tensor:
    like = next(model.parameters())
    return batch.to(device=like.device, dtype=like.dtype)


@contextmanager
def _shifted(gates: dict[str, LearnedGate], shifts: dict[str, float]) -> Iterator[None]:
    for unit, gate in gates.items():
        gate.set_rate(shifts[unit], None)
    try:
        yield
    finally:
        for gate in gates.values():
            gate.set_rate(0.0, None)
