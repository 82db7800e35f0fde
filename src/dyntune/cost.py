"""What a model costs: parameters, and the multiply-accumulates (MACs) that a run executes, counted from real shapes.

The convention is that of the published tables (fvcore's): one multiply-accumulate is 1; linear layers, convolutions,
matrix products and both products of attention count, a LayerNorm counts 5 per element, and softmax, activations,
additions, elementwise products, gathers and scatters do not. Counting happens below PyTorch's operators, so it sees
what ran, fused attention included, and a new method needs no formula of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dyntune.backbones.base import Backbone, Unit
from dyntune.forward import Compact, run
from dyntune.policies.base import Gate, TokenPolicy
from dyntune.spec import format_spec
from dyntune.tokens import Tokens

if TYPE_CHECKING:
    from dyntune.tuned import TunedModel

LAYER_NORM_MACS = 5
"""MACs per element that the convention gives an affine LayerNorm."""


def _attention_macs(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Both products of attention, from ``(B, H, N, D)`` tensors."""
    return query.shape[:-1].numel() * key.shape[-2] * (key.shape[-1] + value.shape[-1])


class MacCounter(TorchDispatchMode):
    """Counts the MACs of everything that runs inside ``with MacCounter() as counter``; the sum is ``counter.macs``."""

    def __init__(self) -> None:
        super().__init__()
        self.macs: float = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func.overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:  # an operator that only calls others, as linear does in inference mode: count those
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if formula is not None:
            self.macs += formula(*args, **kwargs, out_val=result) // 2  # PyTorch counts a multiply-add as 2
        elif func.overloadpacket is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.macs += _attention_macs(*args, **kwargs)  # PyTorch 2.8 has no formula for it
        elif func.overloadpacket is torch.ops.aten.native_layer_norm:
            self.macs += LAYER_NORM_MACS * args[0].numel()
        return result


class Planned(Compact):
    """Compact execution with the number of active tokens given instead of read from the gates: for counting.

    It runs on the meta device, where gates have no values. Where the expected number is fractional, the unit's MACs are
    interpolated between the numbers below and above it.

    Args:
        counter: counts what runs.
    """

    def __init__(self, counter: MacCounter) -> None:
        self.counter = counter
        self.active = 0

    def gated(self, unit: Unit, tokens: Tokens, gate: Gate) -> Tensor:
        expected = round(gate.policy.target_rate(unit) * gate.values.shape[1], 9)  # 0.7 * 10 is 7.000000001
        before = self.counter.macs
        costs = []
        for self.active in (math.floor(expected), math.ceil(expected)):
            self.counter.macs = 0
            out = super().gated(unit, tokens, gate)
            costs.append(self.counter.macs)
        self.counter.macs = before + costs[0] + (expected % 1) * (costs[1] - costs[0])
        return out

    def select(self, unit: Unit, tokens: Tokens, gate: Gate) -> tuple[Tensor, tuple[int, ...] | None]:
        images, count = gate.values.shape[0], tokens.prefix + self.active
        return torch.empty(images * count, dtype=torch.long, device=tokens.x.device), (count,) * images


@dataclass(frozen=True)
class Cost:
    """What a tuned model costs; ``to_dict`` is the object that ``dyntune cost --json`` prints.

    Args:
        model: name of the backbone.
        method: the tuning methods and presets, as a spec string.
        tokens: the token policies that were given beside them, as a spec string; None if there are none.
        trainable_params: trained parameters without the head.
        head_params: parameters of the head.
        total_params: all parameters, head included.
        macs: MACs per image without the head; a dispatcher counts at its target rate.
        head_macs: MACs per image of the head.
        dense_macs: MACs per image of the untouched backbone without its head.
        adapter_bytes: size of the tensors that ``save`` writes, head included.
    """

    model: str
    method: str
    tokens: str | None
    trainable_params: int
    head_params: int
    total_params: int
    macs: int
    head_macs: int
    dense_macs: int
    adapter_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def cost(model: TunedModel) -> Cost:
    """Parameters and MACs of a tuned model, without running it on data.

    Nothing is computed: shapes alone are traced, so it is quick for any size and works for a model on the meta device.
    """
    parameters = dict(model.backbone.named_parameters())
    head = model.backbone.head_parameters()
    trained = model.tuned_state()
    methods = [part for part in model.parts if not isinstance(part, TokenPolicy)]
    policies = [part for part in model.parts if isinstance(part, TokenPolicy)]

    return Cost(
        model=model.origin.name or type(model.backbone.host).__name__,
        method="+".join(map(format_spec, methods)),
        tokens="+".join(map(format_spec, policies)) or None,
        trainable_params=sum(p.numel() for name, p in trained.items() if name not in head),
        head_params=sum(parameters[name].numel() for name in head),
        total_params=sum(p.numel() for p in parameters.values()),
        macs=traced_macs(model.backbone, model.policies),
        head_macs=head_macs(model.backbone),
        dense_macs=model.dense_macs,
        adapter_bytes=sum(p.numel() * p.element_size() for p in model.saved_state().values()),
    )


def head_macs(backbone: Backbone) -> int:
    """MACs per image of the classifier."""
    return sum(head.in_features * head.out_features for head in backbone.heads if isinstance(head, nn.Linear))


def traced_macs(backbone: Backbone, policies: Sequence[TokenPolicy]) -> int:
    """MACs per image, without the head, at the activation that the policies expect; an empty sequence means dense.

    Nothing is computed: the parameters are swapped for tensors that have a shape and no content.
    """
    traced = _Traced(backbone)
    # Each module once, whatever its names: functional_call would not give a module with two names its tensors back.
    shapes = {
        f"{path}.{name}": tensor.to("meta")
        for path, module in traced.named_modules()
        for name, tensor in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    }
    images = torch.empty(1, *backbone.image_shape, device="meta", dtype=next(backbone.parameters()).dtype)
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        with MacCounter() as counter, torch.no_grad():
            torch.func.functional_call(traced, shapes, (images, policies, Planned(counter)), tie_weights=False)
    finally:
        for module, training in modes.items():
            module.training = training
    return round(counter.macs) - head_macs(backbone)


class _Traced(nn.Module):
    """``run`` in the form that ``functional_call`` takes: a module whose forward it is."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor, policies: Sequence[TokenPolicy], execution: Planned) -> Tensor:
        return run(self.backbone, policies, images, execution).logits
