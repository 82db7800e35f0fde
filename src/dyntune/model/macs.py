"""Multiply-accumulates (MACs) that a run executes, counted from real shapes.

The convention is that of the published tables (fvcore's): one multiply-accumulate is 1; linear layers, convolutions,
matrix products and both products of attention count, a LayerNorm counts 5 per element, and softmax, activations,
additions, elementwise products, gathers, scatters and sorts do not. Counting happens below PyTorch's operators, so it
sees what ran, fused attention included, and a new method needs no formula of its own.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dyntune.backbones.base import Backbone
from dyntune.backbones.units import Unit
from dyntune.core.errors import BackboneError
from dyntune.core.modes import evaluating
from dyntune.core.tokens import Tokens
from dyntune.model.executions import Compact
from dyntune.model.forward import run
from dyntune.parts.policies.base import Gate, TokenPolicy
from dyntune.parts.policies.gating import GatingPolicy

LAYER_NORM_MACS = 5
"""MACs per element that the convention gives an affine LayerNorm."""


def _attention_macs(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Both products of attention, from ``(B, H, N, D)`` tensors."""
    return query.shape[:-1].numel() * key.shape[-2] * (key.shape[-1] + value.shape[-1])


class MacCounter(TorchDispatchMode):
    """Counts the MACs of everything that runs inside ``with MacCounter() as counter``; the sum is ``counter.macs``.

    Attributes:
        macs: of everything.
        head_macs: the share of them that runs in a classifier, inside ``with counter.watching(backbone)``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs: float = 0
        self.head_macs: float = 0

    @contextmanager
    def watching(self, backbone: Backbone) -> Iterator[None]:
        """Tells the classifier's MACs from the others, whatever it is made of and however many tokens it reads."""
        began: list[float] = []
        own = threading.get_ident()  # others may run the same model meanwhile, and counters are of one thread

        def enter(*_: Any) -> None:
            if threading.get_ident() == own:
                began.append(self.macs)

        def leave(*_: Any) -> None:
            if threading.get_ident() != own:
                return
            start = began.pop()
            if not began:  # a head may be part of another
                self.head_macs += self.macs - start

        hooks = [
            hook
            for head in dict.fromkeys(backbone.heads)
            for hook in (head.register_forward_pre_hook(enter), head.register_forward_hook(leave))
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

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
        result = self.called(func, args, kwargs)
        if formula is not None:
            self.macs += formula(*args, **kwargs, out_val=result) // 2  # PyTorch counts a multiply-add as 2
        elif func.overloadpacket is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.macs += _attention_macs(*args, **kwargs)  # PyTorch 2.8 has no formula for it
        elif func.overloadpacket is torch.ops.mkldnn._linear_pointwise:
            self.macs += result.numel() * args[0].shape[-1]
        elif func.overloadpacket is torch.ops.aten.native_layer_norm:
            self.macs += LAYER_NORM_MACS * args[0].numel()
        return result

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operator that is counted as a whole returns."""
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Activation:
    """A tensor that a forward pass makes.

    Args:
        bytes: its size.
        shape: its shape.
        piece: where it was made: "embedding", a block's path, or "norm".
    """

    bytes: int = 0
    shape: tuple[int, ...] = ()
    piece: str = ""


def _empty_like(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(x)


def _empty_product(added: Tensor, left: Tensor, right: Tensor, **_: Any) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


def _empty_norm(x: Tensor, shape: Sequence[int], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    statistic = x.new_empty(*x.shape[: -len(shape)], *(1 for _ in shape))
    return x.new_empty(x.shape), statistic, statistic


_EMPTY: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.addmm.default: _empty_product,
    torch.ops.aten.gelu.default: _empty_like,
    torch.ops.aten.native_layer_norm.default: _empty_norm,
}
"""What the operators return on the meta device that a ViT calls most: PyTorch finds out in Python, 50 times slower."""


class Watch(MacCounter):
    """Notes, beside the MACs, the largest tensor that an operator returns; views and in-place results are none.

    It is for the meta device alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.piece = "embedding"
        self.largest = Activation()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if not any(returned.alias_info for returned in func._schema.returns):
            self.note(result)
        return result

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _EMPTY.get(func, func)(*args, **kwargs)

    def note(self, result: Any) -> None:
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.nbytes > self.largest.bytes:
                self.largest = Activation(tensor.nbytes, tuple(tensor.shape), self.piece)


class FusedAttention(TorchFunctionMode):
    """Makes of attention its output alone: a fused kernel has no matrix of queries by keys, the meta device would."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attended(*args, **(kwargs or {}))

    def _attended(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, enable_gqa: bool = False, **__: Any
    ) -> Tensor:
        batch = query.shape[:-2]
        if not enable_gqa:  # else several heads of queries share one of keys
            batch = torch.broadcast_shapes(batch, key.shape[:-2], value.shape[:-2])
        self.watch.macs += _attention_macs(query.expand(*batch, -1, -1), key, value)
        return query.new_empty(*batch, query.shape[-2], value.shape[-1])


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

    def computed(self, unit: Unit, tokens: Tokens, gate: Gate, out: Tensor | None = None) -> Tensor:
        rate = cast(GatingPolicy, gate.policy).target_rate(unit)
        expected = round(rate * gate.values.shape[1], 9)  # 0.7 * 10 is 7.000000001
        before = self.counter.macs
        # As it is computed: where every token goes through, nothing stands in for any.
        self.takes_all = expected == gate.values.shape[1]
        costs = []
        for self.active in (math.floor(expected), math.ceil(expected)):
            self.counter.macs = 0
            stream = super().computed(unit, tokens, gate, out)
            costs.append(self.counter.macs)
        self.counter.macs = before + costs[0] + (expected % 1) * (costs[1] - costs[0])
        return stream

    def select(self, unit: Unit, tokens: Tokens, gate: Gate) -> tuple[Tensor, tuple[int, ...] | None]:
        images, count = gate.values.shape[0], tokens.prefix + self.active
        return torch.empty(images * count, dtype=torch.long, device=tokens.x.device), (count,) * images


@dataclass(frozen=True)
class Trace:
    """What one forward pass of one image computes, in inference.

    Args:
        embedding_macs: MACs in front of the blocks.
        block_macs: MACs of each block.
        norm_macs: MACs behind the blocks, without the head.
        head_macs: MACs of the head.
        attention_tokens: tokens in the attention of each block.
        mlp_tokens: tokens in the MLP of each block.
        gates: the gates of the pass; their values mean nothing.
        largest: the largest tensor.
        logits: shape of the logits.
    """

    embedding_macs: int
    block_macs: tuple[int, ...]
    norm_macs: int
    head_macs: int
    attention_tokens: tuple[int, ...]
    mlp_tokens: tuple[int, ...]
    gates: tuple[Gate, ...]
    largest: Activation
    logits: tuple[int, ...]

    @property
    def macs(self) -> int:
        """MACs without the head."""
        return self.embedding_macs + sum(self.block_macs) + self.norm_macs


def trace(backbone: Backbone, policies: Sequence[TokenPolicy], called: set[nn.Module] | None = None) -> Trace:
    """Traces one image at the activation that the policies expect; an empty sequence means dense.

    Nothing is computed: while it runs, the parameters are swapped for tensors that have a shape and no content, so that
    nobody else must run the modules.

    Args:
        backbone: what is traced.
        policies: of it.
        called: the modules of the host whose ``forward`` runs are added to it.
    """
    traced = _Traced(backbone)
    # Each module once, whatever its names: functional_call would not give a module with two names its tensors back.
    shapes = {
        f"{path}.{name}": tensor.to("meta")
        for path, module in traced.named_modules()
        for name, tensor in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    }
    images = torch.empty(1, *backbone.input_shape, device="meta", dtype=next(backbone.parameters()).dtype)
    with ExitStack() as stack:
        stack.enter_context(evaluating(backbone))
        stack.enter_context(torch.no_grad())
        if called is not None:
            for module in backbone.host.modules():
                stack.enter_context(module.register_forward_pre_hook(lambda module, given: called.add(module)))
        return torch.func.functional_call(traced, shapes, (images, policies), tie_weights=False)


def traced_macs(backbone: Backbone, policies: Sequence[TokenPolicy]) -> int:
    """MACs per image, without the head, as ``trace`` counts them."""
    return trace(backbone, policies).macs


class _Traced(nn.Module):
    """``trace`` in the form that ``functional_call`` takes: a module whose forward it is."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor, policies: Sequence[TokenPolicy]) -> Trace:
        blocks = self.backbone.blocks
        pieces = [*(block.path for block in blocks), "norm"]
        tokens: list[Tokens] = []
        marks: list[float] = []
        with Watch() as watch, FusedAttention(watch), watch.watching(self.backbone):

            def passed(leaving: Tokens) -> None:
                tokens.append(leaving)
                marks.append(watch.macs)
                watch.piece = pieces[len(marks) - 1]

            output = run(self.backbone, policies, images, Planned(watch), passed)
            if not isinstance(output.logits, Tensor):
                raise BackboneError(
                    f"the model's head gives a {type(output.logits).__name__}. Expected one tensor, of logits."
                )
            marks.append(watch.macs - watch.head_macs)
        entered = {block.path: block.enter(before).x.shape[1] for block, before in zip(blocks, tokens, strict=False)}
        entered |= {reduction.unit: reduction.count for reduction in output.reductions if reduction.unit in entered}
        # Rounded at the marks, not between them: so the parts make the whole where a gate's count is a fraction.
        whole = [round(mark) for mark in marks]
        first, *inner, last = (whole[0], *(after - before for before, after in pairwise(whole)))
        return Trace(
            first,
            tuple(inner),
            last,
            round(watch.head_macs),
            tuple(entered.values()),
            tuple(leaving.x.shape[1] for leaving in tokens[1:]),
            output.gates,
            watch.largest,
            tuple(output.logits.shape),
        )
