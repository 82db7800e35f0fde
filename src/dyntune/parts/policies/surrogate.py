"""The surrogate of a gated unit: a small linear map that stands in for the unit at the tokens that skip it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyntune.core.errors import CheckpointError
from dyntune.core.precision import full_precision
from dyntune.core.processes import mean_over_processes

log = logging.getLogger("dyntune")
_TENSORS = ("down", "shift", "up", "bias")
_RIDGE = 0.1
"""Of the regression, as a share of the features' mean variance."""


class Surrogate(nn.Module):
    """``U (V x + c) + b``, the affine map of a given rank that comes closest to what skipped tokens lack.

    It is fitted to the first images of a training, by ridge regression and the principal directions of what that
    predicts (reduced-rank regression; Izenman 1975), and not trained. Before, and where nobody tells how long a
    training is, it adds nothing. Its tensors are kept in bf16, half of the space: rounding is far below what the rank
    leaves out.

    Args:
        width: channels C of a token.
        rank: rows of V, at most C.

    Attributes:
        down: V, ``(rank, C)``; where the unit is fitted, its outputs have mean 0 and variance 1.
        shift: c, ``(rank,)``.
        up: U, ``(C, rank)``.
        bias: b, ``(C,)``: the mean of what is lacking.
        unfitted: whether a training has begun, and nobody has shown what the unit does.
    """

    down: Tensor
    shift: Tensor
    up: Tensor
    bias: Tensor

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        for name, shape in zip(_TENSORS, ((rank, width), (rank,), (width, rank), (width,)), strict=True):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.bfloat16))
        self.unfitted = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Surrogate:
        kept = {name: self._buffers[name] for name in _TENSORS}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():  # whatever precision the model is given
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = moved.to(tensor.dtype) if tensor.is_meta else tensor.to(moved.device)
        return self

    def unpack(self, dtype: torch.dtype) -> None:
        """Keeps the tensors in ``dtype`` from now on, in which they are computed."""
        for name in _TENSORS:
            self._buffers[name] = getattr(self, name).to(dtype)

    def forward(self, x: Tensor, skipped: Tensor) -> Tensor:
        """What stands in for the unit's update, ``(..., C)``.

        Args:
            x: what enters the unit, ``(..., C)``.
            skipped: ``(...)``, 1 for tokens that skip it and 0 for the others, which get zeros.
        """
        down, shift, up, bias = (tensor.to(x.dtype) for tensor in (self.down, self.shift, self.up, self.bias))
        return F.linear(F.linear(x, down, shift), up, bias) * skipped.unsqueeze(-1)

    @torch.no_grad()
    def fit(self, x: Tensor, updates: Tensor) -> None:
        """Comes as close to ``updates`` as the rank allows, those of all processes that train together.

        Args:
            x: what enters the unit, ``(..., C)``.
            updates: what must be added to it, of the same shape.
        """
        self.unfitted = False
        x, updates = (tensor.float().flatten(0, -2) for tensor in (x, updates))
        centre, mean = mean_over_processes(torch.stack([x.mean(0), updates.mean(0)]))
        with full_precision(x.device):  # which would round these products
            x, updates = (x - centre) / len(x) ** 0.5, (updates - mean) / len(x) ** 0.5
            moments = mean_over_processes(torch.stack([x.T @ x, x.T @ updates]))
        # In fp64, which not every device has.
        inner, cross, centre, mean = (tensor.cpu().double() for tensor in (*moments, centre, mean))
        if not all(bool(tensor.isfinite().all()) for tensor in (inner, cross)):
            log.warning("features or updates of a unit are not finite: nothing stands in for it where patches skip it.")
            return
        variance = inner.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
        slope = torch.linalg.solve(inner + _RIDGE * variance * torch.eye(len(inner), dtype=inner.dtype), cross)
        squares, directions = torch.linalg.eigh(slope.T @ inner @ slope)  # in ascending order
        rank = len(self.down)
        size, directions = squares[-rank:].clamp_min(0).sqrt(), directions[:, -rank:]
        # Directions along which nothing is predicted, but for rounding, are left out.
        known = size > 1e-6 * mean.norm().maximum(size.max())
        self.down.copy_(torch.where(known, slope @ directions / size, 0).T)
        self.up.copy_(directions * torch.where(known, size, 0))
        # Of what has been rounded, so that the mean of the features still gives the mean of the updates.
        middle = self.down.cpu().double() @ centre
        self.shift.copy_(-middle)
        self.bias.copy_(mean - self.up.cpu().double() @ (middle + self.shift.cpu().double()))

    def begin_course(self, travel: float | None) -> None:
        """Wants to be fitted, unless it has been."""
        held = (self.up, self.bias)
        self.unfitted = not self.bias.is_meta and not any(bool(tensor.any()) for tensor in held)

    def end_course(self) -> None:
        """Stays as it is."""
        self.unfitted = False

    def course_state(self) -> dict[str, Tensor]:
        """Whether it still waits; the map is kept with the model's other tensors."""
        return {"unfitted": torch.tensor(float(self.unfitted))}

    def resume_course(self, state: dict[str, Tensor]) -> None:
        """Takes up ``course_state``; a training from before there were surrogates has none, and goes on without.

        Raises:
            CheckpointError: it is that of something else.
        """
        if state.keys() - {"unfitted"}:
            raise CheckpointError(f"the course of a surrogate knows unfitted alone; given {', '.join(state)}.")
        self.unfitted = bool(state["unfitted"]) if state else False
