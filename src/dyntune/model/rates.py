"""Another activation rate for a trained model: the thresholds of its gates, and the calibration that they come from."""

from __future__ import annotations

import math
import reprlib
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any, Protocol

import numpy as np
import torch

from dyntune.backbones.base import Backbone
from dyntune.core.errors import CheckpointError, SpecError
from dyntune.core.words import counted
from dyntune.parts.policies.gating import LearnedGate

_LARGEST = float(torch.finfo(torch.float32).max)
_TURN = threading.Lock()


@dataclass(frozen=True)
class Calibration:
    """What every gate adds to its logits for other activation rates than the trained one; plain data.

    Args:
        images: how many it was measured on.
        rates: asked mean activations, rising, above 0 and below 1.
        shifts: for each gated unit, by path, what is added to its logits at each of the rates.
        activations: for each gated unit, the share of active patches that came out at each of the rates.
    """

    images: int
    rates: tuple[float, ...]
    shifts: dict[str, tuple[float, ...]]
    activations: dict[str, tuple[float, ...]]

    def __repr__(self) -> str:
        rates = ", ".join(f"{rate:g}" for rate in self.rates)
        return f"Calibration({len(self.shifts)} gates on {self.images} images, for the rates {rates})"

    def at(self, rate: float) -> dict[str, tuple[float, float]]:
        """For each gated unit its shift and activation at ``rate``, linear between the calibrated rates.

        Raises:
            SpecError: ``rate`` is outside of them.
        """
        low, high = self.rates[0], self.rates[-1]
        if not low - 1e-9 <= rate <= high + 1e-9:
            known = f"between {low:g} and {high:g}" if low < high else f"{low:g}"
            every = "/".join(f"{each:g}" for each in sorted({*self.rates, rate}))
            raise SpecError(
                f"rate {rate:g}: this model is calibrated for rates {known} (0 and 1 always go). Give such a rate, or "
                f"calibrate for this one: model.set_rate(rate, data), or for it too: dyntune calibrate RUN DATA "
                f"--rates {every}."
            )
        return {
            unit: (
                float(np.interp(rate, self.rates, self.shifts[unit])),
                float(np.interp(rate, self.rates, self.activations[unit])),
            )
            for unit in self.shifts
        }

    def activation(self, rate: float) -> float:
        """Mean share of active patches over the gated units at ``rate``, as it came out."""
        return float(np.mean([activation for _, activation in self.at(rate).values()]))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Calibration:
        """The inverse of ``to_dict``.

        Raises:
            CheckpointError: an entry is missing, unknown, or not of the form that it must have.
        """
        try:
            rates = _numbers(data["rates"])
            shifts, activations = (
                {str(unit): _numbers(values) for unit, values in data[name].items()}
                for name in ("shifts", "activations")
            )
            sound = (
                data.keys() == cls.__dataclass_fields__.keys()
                and type(data["images"]) is int
                and data["images"] > 0
                and bool(rates)
                and all(before < after for before, after in zip((0.0, *rates), (*rates, 1.0), strict=True))
                and shifts.keys() == activations.keys()
                and all(len(values) == len(rates) for values in (*shifts.values(), *activations.values()))
                and all(0 <= share <= 1 for values in activations.values() for share in values)
            )
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"the calibration is not valid: {error!r}. Calibrate again.") from error
        if not sound:
            raise CheckpointError(
                "the calibration is not valid: expected images, rising rates between 0 and 1, and for the same units "
                "as many shifts and activations as rates. Calibrate again (dyntune calibrate RUN DATA)."
            )
        return cls(data["images"], rates, shifts, activations)


def _numbers(values: Any) -> tuple[float, ...]:
    if any(type(value) not in (int, float) or not abs(value) <= _LARGEST for value in values):
        raise ValueError(f"expected finite numbers, given {reprlib.repr(values)}")
    return tuple(map(float, values))


def dispatchers(backbone: Backbone) -> dict[str, LearnedGate]:
    """The learned gates of a backbone, by the path of the unit that they stand on."""
    gates = ((unit.path, unit.dispatcher) for unit in backbone.all_units())
    return {path: gate for path, gate in gates if isinstance(gate, LearnedGate)}


class Gated(Protocol):
    """A model whose gates can be shifted."""

    backbone: Backbone
    calibration: Calibration | None

    @property
    def spec(self) -> str: ...


def shift_gates(model: Gated, rate: float | None, calibration: Calibration | None) -> None:
    """Shifts the gates' thresholds to those of a calibration; 0, 1 and None need none."""
    gates = dispatchers(model.backbone)
    if rate is None:
        set_thresholds(gates, dict.fromkeys(gates, (0.0, None)))
        return
    require_gates(model, gates)
    if not isinstance(rate, Real) or not 0 <= rate <= 1:
        raise SpecError(f"rate {rate!r}: expected a share of the patches, between 0 and 1.")
    if rate in (0, 1):
        set_thresholds(gates, dict.fromkeys(gates, (math.inf if rate else -math.inf, float(rate))))
        return
    if calibration is None:
        raise SpecError(
            f"rate {rate:g}: this model is not calibrated. Give images of the kind that it will see, "
            "model.set_rate(rate, data), or calibrate it once for all rates: model.calibration = "
            "dyntune.calibrate(model, data) before saving, or dyntune calibrate RUN DATA for a run."
        )
    if not isinstance(calibration, Calibration) or calibration.shifts.keys() != gates.keys():
        raise SpecError(
            f"this calibration is not of this model's {counted(len(gates), 'gate')}: given {calibration!r:.120}. "
            "Calibrate the model itself: model.calibration = dyntune.calibrate(model, data)."
        )
    set_thresholds(gates, calibration.at(rate))


def set_thresholds(gates: dict[str, LearnedGate], settings: Mapping[str, tuple[float, float | None]]) -> None:
    """Shift and rate of every gate, those of one call in all of them, whichever threads call."""
    with _TURN:
        for unit, (shift, rate) in settings.items():
            gates[unit].set_rate(shift, rate)


def require_gates(model: Gated, gates: dict[str, LearnedGate]) -> None:
    """Refuses a model without learned gates.

    Raises:
        SpecError: there are none.
    """
    if not gates:
        raise SpecError(
            f"{model.spec} has no learned gates whose threshold could be shifted. Another rate needs a model with "
            "dispatch: dyt, or adaptformer+dispatch."
        )
