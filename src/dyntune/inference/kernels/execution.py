"""The execution whose counts of active tokens never leave the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyntune.backbones.units import Mlp, MlpParts, Unit
from dyntune.core.errors import DyntuneError
from dyntune.core.tokens import Tokens
from dyntune.inference.kernels import ops
from dyntune.inference.kernels.launch import DTYPES, unavailable
from dyntune.inference.kernels.ops import Products
from dyntune.model.executions import Execution
from dyntune.parts.policies.base import Gate
from dyntune.parts.policies.gating import GatingPolicy


class JointProducts(Protocol):
    """A gate, the adapter beside the same unit and its surrogate, as two products.

    Args:
        read: ``C -> H`` with a bias; row 0 gives the gate's logit, those up to ``beside`` the adapter's hidden layer,
            any others what the surrogate reads.
        write: ``(H, C)``, from the ReLU of the former and from the latter to the updates; zeros in row 0.
        beside: rows of gate and adapter.
    """

    read: nn.Linear
    write: Tensor
    beside: int


class DeviceCounts(Execution):
    """Computes a gated MLP for the active tokens only and never asks the device how many there are.

    So the host never waits, a CUDA graph captures the pass, and ``torch.compile`` sees no shape that depends on data.
    Every other gated unit, see ``supports``, is computed for every token of the batch and multiplied by the gate:
    attention among the active tokens of each image would need a shape that depends on the data, or a padded one that
    saves nothing. For inference only: the gate and the kernels have no gradient.

    Args:
        joints: gate and adapter as shared products, by the unit's path; None for what the units themselves compute.
        products: who multiplies; ``"grouped"`` is bf16 on GPUs of compute capability 9.0 and 10.0, in widths that are
            multiples of 8.

    Raises:
        DyntuneError: there are no such ``products``; later, in a pass: they do not multiply what the kernels would, a
            gated unit is in train mode, or something in it requires a gradient while gradients are recorded.
    """

    def __init__(self, joints: Mapping[str, JointProducts] | None = None, products: Products = "triton") -> None:
        if products not in get_args(Products):
            raise DyntuneError(f"products must be one of {', '.join(get_args(Products))}; given {products!r}.")
        self.joints = dict(joints or {})
        self.products = products

    def gated(self, unit: Unit, tokens: Tokens, policy: GatingPolicy) -> tuple[Tokens, Gate]:
        if unit.training:
            raise DyntuneError(
                f'{unit.path} is in train mode, which needs gradients; use eval(), or execution="masked".'
            )
        joint = self.joints.get(unit.path)
        if torch.is_grad_enabled() and _learns(unit, tokens, joint):
            raise DyntuneError(
                f"{unit.path} or its tokens require a gradient, which the kernels do not have; run under "
                'torch.no_grad(), or with execution="masked".'
            )
        out: Tensor | None = None
        if joint is None:
            gate = policy.gate(unit, tokens)
        else:
            own = slice(joint.beside)
            values, out = ops.joint(tokens.x, joint.read.weight[own], joint.read.bias[own], joint.write[own])
            gate = policy.gate_from(unit, tokens, values[:, tokens.prefix :])
        tokens = unit.with_norm(tokens)
        if out is None:
            parallel = unit.parallel_update(tokens)
            # What leaves a patch embedding is a transposed view, and the kernels need one token behind the other.
            copied = tokens.x.clone(memory_format=torch.contiguous_format)
            out = copied if parallel is None else copied.add_(parallel)
        if unit.surrogate is not None or (joint is not None and len(joint.write) > joint.beside):
            covered = tokens.cover_prefix(gate.values)
            skipped = unit.skipped_update(tokens, covered) if joint is None else _surrogate(joint, tokens.x, covered)
            out.add_(cast(Tensor, skipped))
        parts = _parts(unit)
        if supports(unit) is None and parts is not None:
            reason = supports(unit, self.products)
            if reason is not None:
                raise DyntuneError(f'{unit.path}: {reason}. Use products="triton".')
            self._add_mlp(out, tokens, gate, parts)
            return tokens.with_x(out), gate
        mask = tokens.cover_prefix(gate.values)
        update = unit.update(tokens if unit.tokenwise else _active_keys(tokens, gate))
        return tokens.with_x(out + update * mask.unsqueeze(-1)), gate

    def _add_mlp(self, out: Tensor, tokens: Tokens, gate: Gate, parts: MlpParts) -> None:
        norm, first, second = parts.norm, parts.first, parts.second
        ops.add_mlp(
            out,
            tokens.x,
            gate.values,
            tokens.prefix,
            norm.weight,
            norm.bias,
            norm.eps,
            first.weight,
            first.bias,
            second.weight,
            second.bias,
            parts.nonlinearity,
            self.products,
        )


def supports(unit: Unit, products: Products = "triton") -> str | None:
    """Why the kernels, or ``products``, do not compute the active tokens of ``unit`` alone; None if they do."""
    if not isinstance(unit, Mlp):
        return f"{unit.path} is no MLP: attention among active tokens has a shape that depends on the images"
    parts = _parts(unit)
    if parts is None:
        return (
            f"the update of {unit.path} is not LayerNorm, linear map, GELU and linear map alone. Merge methods and "
            "LayerScale into the weights first (dyntune.optimize does)"
        )
    weights: tuple[Any, ...] = (parts.first, parts.second, parts.norm)
    if any(tensor is None for module in weights for tensor in (module.weight, module.bias)):
        return f"{unit.path} has layers without a bias"
    tensors = [tensor for module in weights for tensor in (module.weight, module.bias)]
    if not all(tensor.is_contiguous() for tensor in tensors):
        return f"the weights of {unit.path} are not contiguous, and the kernels read them row by row"
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return f"the weights of {unit.path} are {', '.join(sorted(map(str, dtypes)))}, not one of bf16, fp16 and fp32"
    weight = parts.first.weight
    reason = unavailable(weight.device)
    if reason is None and products == "grouped":
        from dyntune.inference.kernels import grouped

        return grouped.refusal(weight.device, weight.dtype, *weight.shape)
    return reason


def _learns(unit: Unit, tokens: Tokens, joint: JointProducts | None) -> bool:
    """Whether a gradient is asked of anything that the kernels read."""
    read = [tokens.x, *unit.parameters()]
    parts = _parts(unit)
    if parts is not None:  # of the host, whose weights are no parameters of the unit
        read += [weight for module in (parts.norm, parts.first, parts.second) for weight in module.parameters()]
    if joint is not None:
        read += [joint.read.weight, joint.read.bias, joint.write]
    return any(tensor.requires_grad for tensor in read)


def _parts(unit: Unit) -> MlpParts | None:
    """The layers that make the unit's whole update, if they are known."""
    return unit.parts if isinstance(unit, Mlp) and not unit.sequential else None


def _surrogate(joint: JointProducts, x: Tensor, mask: Tensor) -> Tensor:
    """What the surrogate among shared products adds."""
    read = F.linear(x, joint.read.weight[joint.beside :], joint.read.bias[joint.beside :])
    return (read * (1 - mask).unsqueeze(-1)) @ joint.write[joint.beside :]


def _active_keys(tokens: Tokens, gate: Gate) -> Tokens:
    """The tokens, of which only the active ones count as keys."""
    # Finite, so that an image without any active token has no NaN; the exponential of it is exactly 0 all the same.
    closed = torch.finfo(tokens.x.dtype).min / 2
    return replace(tokens, key_bias=torch.where(gate.values > 0.5, 0.0, closed).to(tokens.x.dtype))
