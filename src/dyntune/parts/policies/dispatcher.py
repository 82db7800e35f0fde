"""The linear gate of dispatch: how far open it starts, and the pace at which it learns."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from dyntune.core.errors import CheckpointError
from dyntune.core.precision import full_precision
from dyntune.core.processes import mean_over_processes
from dyntune.parts.policies.course import Course
from dyntune.parts.policies.gating import LearnedGate


class Dispatcher(LearnedGate):
    """A linear gate per patch: ``l = w x + b``, active where ``l > 0``.

    An elastic gate is trained towards a rate r that changes from step to step: then
    ``l = w x + b + slope (logit(r) - logit(middle))`` with a learned slope.

    In a training whose length is known the gate is paced: it learns w' and b' with
    ``w x + b = p w' (x - m) + q b'``. The factors p and q let the length of the training, and not the learning rate and
    the size of the features, decide how far a logit can move; m, the mean of the features, leaves it to b' alone how
    open the gate is, and to w' which patches it is open for. Whoever reads the gate reads w and b: ``linear``, and
    ``state_dict``, which ``load_state_dict`` takes under any pace.

    Args:
        width: channels C of a token.
        temperature: of the sigmoid; it shapes the gradient only.
        bias: b at the start.
        elastic: whether there is a slope.
        moves: how far the bias, and the weights, may move a logit in a training whose length is known, if every step
            had the peak learning rate; None lets the learning rate decide.
        spread: standard deviation that the logits of the first patches of such a training have, around b; None leaves
            the weights as they are drawn.

    Attributes:
        weight_pace: p; None while the gate is not paced, and learns w and b themselves.
        bias_pace: q.
        centre: m, ``(C,)``.
        lead: logits that the gate has been opened further by at the start of its training; None before.
        unweighed: whether a training has begun on a gate as it was made, and nobody has said what its unit is worth.
    """

    slope: nn.Parameter | None
    weight_pace: Tensor | None
    bias_pace: Tensor | None
    centre: Tensor | None
    lead: Tensor | None

    def __init__(
        self,
        width: int,
        temperature: float,
        bias: float = 0.0,
        elastic: bool = False,
        moves: tuple[float, ...] | None = None,
        spread: float | None = None,
    ) -> None:
        super().__init__(temperature)
        self.gate = nn.Linear(width, 1)
        self._course: tuple[Course | None] = (None,)  # not registered: the backbone has it among what its places share
        self.slope = nn.Parameter(torch.ones(())) if elastic else None
        for name in ("weight_pace", "bias_pace", "centre", "lead"):
            self.register_buffer(name, None, persistent=False)
        self.moves = moves
        self.spread = spread
        self.start = bias
        self.unweighed = self._unspread = False
        self._reach: tuple[float, float] | None = None
        """Pace of the bias, and that of the weights for features of size 1, until the size of the features is known."""
        nn.init.trunc_normal_(self.gate.weight, std=0.02)
        nn.init.constant_(self.gate.bias, bias)
        self.register_state_dict_post_hook(_write_map)
        self.register_load_state_dict_pre_hook(_read_map)

    @property
    def course(self) -> Course | None:
        """That of all gates of the same dispatch; a gate without one decides with whole noise."""
        return self._course[0]

    def follow(self, course: Course) -> None:
        """Decides along ``course`` from now on."""
        self._course = (course,)

    @property
    def paced(self) -> bool:
        """Whether the trained tensors are w' and b'."""
        return self.weight_pace is not None

    @property
    def noise(self) -> float:
        return 1.0 if self.course is None else self.course.noise

    @property
    def linear(self) -> nn.Linear:
        """The map ``w x + b``."""
        if not self.paced:
            return self.gate
        weight, bias = self.map()
        # Without initial values: drawing them would change what a training draws after somebody has looked at the gate.
        linear: nn.Linear = skip_init(nn.Linear, self.gate.in_features, 1, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        return linear

    def map(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """w and b, with a graph to w' and b'; computed in ``dtype``, by default that of the weights."""
        weight, bias = (tensor.to(dtype or tensor.dtype) for tensor in (self.gate.weight, self.gate.bias))
        if self.weight_pace is None or self.bias_pace is None or self.centre is None:
            return weight, bias
        weight = weight * self.weight_pace.to(weight.dtype)
        return weight, bias * self.bias_pace.to(bias.dtype) - weight @ self.centre.to(weight.dtype)

    def trained(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """w' and b' of w and b; where there is no pace, they are the same."""
        if self.weight_pace is None or self.bias_pace is None or self.centre is None:
            return weight, bias
        weight, bias = weight.to(self.gate.weight), bias.to(self.gate.bias)
        return weight / self.weight_pace, (bias + weight @ self.centre) / self.bias_pace

    @torch.no_grad()
    def _fill(self, weight: Tensor, bias: Tensor) -> None:
        """Makes w and b what is given, under the pace that there is."""
        for own, value in zip((self.gate.weight, self.gate.bias), self.trained(weight, bias), strict=True):
            own.copy_(value)

    def scores(self, patches: Tensor) -> Tensor:
        if self.training and (self._reach is not None or self._unspread):
            self._measure(patches)
        if not self.paced:
            return self.gate(patches).squeeze(-1)
        # In fp32: the mean of the features cancels out, here and in the gradient of w', and half of the digits are not
        # enough for that.
        dtype = torch.promote_types(patches.dtype, torch.float32)
        with full_precision(patches.device):
            return F.linear(patches.to(dtype), *self.map(dtype)).squeeze(-1)

    def logits_from(self, scores: Tensor) -> Tensor:
        logits = super().logits_from(scores)
        if not self.training or self.course is None or self.slope is None:
            return logits
        return logits + self.slope.float() * self.course.distance()

    def begin_course(self, travel: float | None) -> None:
        """Sets the pace, at the first step: until then the size of the features is not known."""
        self.end_course()
        start = self.gate.bias  # of another value where the gate has been trained
        fresh = not start.is_meta and bool((start == self.start).all())
        self.unweighed, self._unspread = fresh, fresh and self.spread is not None
        if self.moves is not None and travel is not None:
            bias, weight = self.moves
            self._reach = bias / travel, weight / (travel * self.gate.in_features)

    def course_state(self) -> dict[str, Tensor]:
        """The pace and the lead, where there are such."""
        return {name: getattr(self, name) for name in (*_PACE, "lead") if getattr(self, name) is not None}

    def resume_course(self, state: dict[str, Tensor]) -> None:
        """Takes up pace and lead; w' and b' must come from the same place.

        Raises:
            CheckpointError: they are not of this gate.
        """
        if not state:
            return
        shapes = {name: (self.gate.in_features,) if name == "centre" else () for name in state}
        complete = state.keys() - {"lead"} in (set(), set(_PACE))
        sound = all(bool(tensor.isfinite().all()) for tensor in state.values())
        if {name: tuple(tensor.shape) for name, tensor in state.items()} != shapes or not (complete and sound):
            raise CheckpointError(f"the pace of a gate needs finite {', '.join(_PACE)}; given {', '.join(state)}.")
        self._reach = None
        self.unweighed = self._unspread = False
        for name, tensor in state.items():
            setattr(self, name, tensor.to(self.gate.weight.device))

    def end_course(self) -> None:
        """Writes the pace into the weights."""
        self._reach = None
        self.unweighed = self._unspread = False
        own = [tensor.detach() for tensor in self.map()]
        self.weight_pace = self.bias_pace = self.centre = self.lead = None
        self._fill(*own)

    @torch.no_grad()
    def open_further(self, lead: float) -> None:
        """Adds ``lead`` to b, once."""
        weight, bias = (tensor.detach() for tensor in self.map())
        self._fill(weight, bias + lead)
        self.lead = weight.new_tensor(lead)
        self.unweighed = False

    def pace(self, weight: Tensor, bias: Tensor, centre: Tensor) -> None:
        """Begins to learn w' and b', with these p, q and m; w and b stay."""
        own = self.gate.weight.detach().clone(), self.gate.bias.detach().clone()
        self.weight_pace, self.bias_pace, self.centre = (t.to(self.gate.weight) for t in (weight, bias, centre))
        self._fill(*own)

    @torch.no_grad()
    def _measure(self, patches: Tensor) -> None:
        """Sets start and pace by mean and size of the first features that a training shows, in all its processes."""
        flat = patches.float().flatten(0, -2)
        centre, square = mean_over_processes(torch.stack([flat.mean(0), flat.square().mean(0)]))
        size = (square - centre.square()).mean().clamp_min(0).sqrt()
        # Features that are all alike, but for rounding, tell patches apart by nothing, whatever start and pace.
        differ = size > 1e-3 * square.mean().sqrt()
        if self._unspread:
            self._spread_out(flat, centre, differ)
        if self._reach is not None:
            bias, weight = self._reach
            self._reach = None
            self.pace(weight / torch.where(differ, size, 1), square.new_tensor(bias), centre)

    def _spread_out(self, patches: Tensor, centre: Tensor, differ: Tensor) -> None:
        """Gives the logits of ``patches``, ``(n, C)`` with mean ``centre``, the mean b and, where they differ, the
        wished deviation."""
        assert self.spread is not None
        self._unspread = False
        weight, bias = self.gate.weight.detach().float(), self.gate.bias.detach().float()
        size = mean_over_processes(((patches - centre) @ weight.T).square().mean()).sqrt()
        weight = weight * torch.where(differ & (size > 0), self.spread / size, 1)
        self._fill(weight, bias - weight @ centre)
        self.lead = bias.new_zeros(()) if self.lead is None else self.lead


_MAP = ("gate.weight", "gate.bias")
_PACE = ("weight_pace", "bias_pace", "centre")


@torch.no_grad()
def _write_map(gate: Dispatcher, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any]) -> None:
    """Puts w and b into a state, where w' and b' stand."""
    if gate.paced:
        state.update(zip((prefix + name for name in _MAP), gate.map(), strict=True))


@torch.no_grad()
def _read_map(gate: Dispatcher, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """Puts w' and b' in the place of w and b, before a state goes into a gate; other shapes are left to be refused."""
    names = [prefix + name for name in _MAP]
    given = [state[name] for name in names if name in state]
    if gate.paced and [tensor.shape for tensor in given] == [gate.gate.weight.shape, gate.gate.bias.shape]:
        state.update(zip(names, gate.trained(*given), strict=True))
