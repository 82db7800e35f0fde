"""The optimised copy of a tuned model, for inference in this process: everything folded that can be folded, exactly."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.backbones.hosts import not_tuned, wrapper_advice
from dyntune.backbones.owners import claim, release
from dyntune.backbones.units import Unit
from dyntune.core.errors import DyntuneError
from dyntune.inference.execution import Ending, Fast, Shared
from dyntune.inference.joint import joined, key
from dyntune.inference.kernels import DeviceCounts, supports
from dyntune.inference.kernels.execution import JointProducts
from dyntune.inference.packed import pack
from dyntune.model.executions import Execution
from dyntune.model.forward import run
from dyntune.model.rates import shift_gates
from dyntune.model.trial import settle_threads_for
from dyntune.model.tuned import TunedModel
from dyntune.parts.policies.base import Output, TokenPolicy
from dyntune.parts.policies.surrogate import Surrogate
from dyntune.parts.registry import resolve

Precision = Literal["fp32", "bf16"]


class OptimizedModel(nn.Module):
    """A model for inference: the logits of the tuned model that it was made from, computed with fewer operations.

    It is a copy; it is never trained, saved as an adapter, or merged.

    Args:
        tuned: a merged model, which is used up.
        masks: whether every gate decides, as in the tuned model. If not, the last MLP computes what the head reads and
            nothing else, and has no gate.

    Attributes:
        notes: what was done to make it fast, and what could not be done, for people.
        spec: of the tuned model.
        classes: names of the classes in label order, or None if not known.
        preprocessing: what the images go through.
    """

    def __init__(self, tuned: TunedModel, masks: bool) -> None:
        super().__init__()
        self.backbone: Backbone = tuned.backbone
        self.policies: tuple[TokenPolicy, ...] = tuned.policies
        self.spec = tuned.spec
        self.classes = tuned.classes
        self.preprocessing = tuned.preprocessing
        self.backbone_name = tuned.backbone_name
        self.dense_macs = tuned.dense_macs
        self.calibration = tuned.calibration
        self.notes: list[str] = []
        release(self.backbone)
        claim(self, self.backbone)
        self.backbone.fold_factors()
        ending = None if masks else _ending(self.backbone, self.policies, self.notes)
        self.joints = joined(self.backbone, self.policies, self.backbone.blocks[-1].mlp if ending else None)
        if self.joints:
            self.notes.append(f"gate, adapter and surrogate are two products in {len(self.joints)} units")
        for unit in self.backbone.all_units():
            if isinstance(unit.surrogate, Surrogate):
                unit.surrogate.unpack(next(self.backbone.parameters()).dtype)
        self.execution = Fast(self._within(), ending)
        self.requires_grad_(False)
        self.eval()

    def __repr__(self) -> str:
        backbone = self.backbone_name or type(self.backbone.host).__name__
        return f"OptimizedModel({self.spec} on {backbone}: {'; '.join(self.notes)})"

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, 3, height, width)`` to logits ``(B, classes)``."""
        return self.run(images).logits

    def run(self, images: Tensor) -> Output:
        """One forward pass with the decisions that it made: none in a last MLP that computes only what is read."""
        device = next(self.backbone.parameters()).device.type
        # Its precision is its own: autocast would lower that of the residual stream and of the gates.
        ours = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        with torch.no_grad(), ours:
            return run(self.backbone, self.policies, images, self.execution)

    def _within(self) -> Execution:
        """How units compute here: with Dyntune's kernels on a CUDA device, where they can compute every gated unit."""
        like = next(self.backbone.parameters())
        # In fp32 the kernels multiply without tensor cores, which PyTorch's products use where they are told to.
        if like.device.type != "cuda" or like.dtype is torch.float32:
            return Shared(self.joints)
        gated = [u for u in self.backbone.all_units() if any(policy.gates(u) for policy in self.policies)]
        reason = next(filter(None, map(supports, gated)), None)
        if reason is not None:
            self.notes.append(f"the number of active tokens is asked of the device, which waits for it: {reason}")
            return Shared(self.joints)
        if gated:
            self.notes.append("the number of active tokens stays on the device (kernels.capture makes a CUDA graph)")
        joints = {unit.path: cast(JointProducts, self.joints[key(unit)]) for unit in gated if key(unit) in self.joints}
        return DeviceCounts(joints)

    def set_rate(self, rate: float | None) -> None:
        """As ``TunedModel.set_rate``, with the calibration that the model came with."""
        shift_gates(self, rate, self.calibration)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OptimizedModel:
        raise DyntuneError(
            "an optimised model stays on the device and in the precision that it was made for; move the tuned model "
            "and optimize it there."
        )

    def train(self, mode: bool = True) -> OptimizedModel:
        """Refuses to be trained.

        Raises:
            DyntuneError: ``mode`` is True.
        """
        if mode:
            raise DyntuneError("an optimised model is for inference; train the tuned model and optimize it again.")
        super().train(False)
        return self


def folded_copy(model: nn.Module, *, rate: float | None = None, masks: bool = False) -> OptimizedModel:
    """A copy of a model with everything folded that can be folded; the model itself stays as it is.

    Args:
        model: a tuned model, or a plain one that ``tune`` would take.
        rate: share of the patches that gated units shall compute, for a calibrated model; None leaves it as it is set.
        masks: whether every gate shall decide and be seen, which costs what the last block's patches cost.

    Raises:
        BackboneError: the model is not supported.
        DyntuneError: ``rate`` is given and the model has no gates, or is not calibrated.
    """
    if not isinstance(model, nn.Module) or wrapper_advice(model):
        raise not_tuned(model, "optimize")
    if isinstance(model, OptimizedModel):
        raise DyntuneError("the model is optimised already. Give the one that it was made from.")
    copied = copy.deepcopy(model)
    if not isinstance(copied, TunedModel):
        copied = TunedModel(copied, resolve(["linear"]))
    if rate is not None:
        copied.set_rate(rate)
    copied.fold()
    return OptimizedModel(copied, masks)


def optimize(
    model: nn.Module, *, rate: float | None = None, masks: bool = False, precision: Precision = "fp32"
) -> OptimizedModel:
    """A fast copy of a model for inference in this process; its logits are those of the model but for rounding.

    On a CPU it also takes the number of threads of this process with which it runs quickest, by a trial of a second,
    unless OMP_NUM_THREADS or torch.set_num_threads() has set one; ``notes`` say which.

    Args:
        model: a tuned model, or a plain one that ``tune`` would take.
        rate: share of the patches that gated units shall compute, for a calibrated model; None leaves it as it is set.
        masks: whether every gate shall decide and be seen, which costs what the last block's patches cost.
        precision: of the products of the host's linear maps, on a CPU; bf16 is not exact. The residual stream, norms,
            softmax, gates, adapters and the head stay in fp32.

    Raises:
        BackboneError: the model is not supported.
        DyntuneError: ``rate`` is given and the model has no gates, or is not calibrated; or this machine does not
            compute in ``precision``.
    """
    if precision not in get_args(Precision):
        raise DyntuneError(f"precision must be one of {', '.join(get_args(Precision))}; given {precision!r}.")
    optimized = folded_copy(model, rate=rate, masks=masks)
    hosted = [linear for site in optimized.backbone.sites() for linear in site.linears]
    shared = [(joint, "read") for joint in optimized.joints.values()]
    halved = hosted if precision == "bf16" else ()
    optimized.notes.append(pack([*hosted, *shared], math.prod(optimized.backbone.grid), halved))
    taken = settle_threads_for(optimized)
    if taken:
        optimized.notes.append(taken)
    return optimized


def _ending(backbone: Backbone, policies: Sequence[TokenPolicy], notes: list[str]) -> Ending | None:
    """Makes the last block compute only what the head reads, as far as that is possible."""
    block, count = backbone.blocks[-1], backbone.read_first
    reason = None
    if count is None or backbone.bypass is not None:
        reason = "the head reads the patches"
    elif any(policy.gates(block) for policy in policies):
        reason = "a gate decides about the block as a whole"
    else:
        reason = _looks_around(block.mlp)
    if reason is not None or count is None:
        notes.append(f"the last block computes every token: {reason}")
        return None
    block.mlp.reducers.clear()  # what they decide concerns patches alone
    only = "the class token" if count == 1 else f"{count} tokens"
    if any(policy.gates(block.attn) for policy in policies):
        reason = "a gate decides which patches it sees"
    elif block.attn.opaque:
        reason = "the host computes it as a whole"
    elif not all(site.plain for site in backbone.sites("qkv") if site.block == block.index):
        reason = "its projection could not be folded into one linear map"
    else:
        reason = _looks_around(block.attn)
    if reason is None:
        queries = "" if block.attn.split_queries() else ", and queries of all tokens"
        notes.append(f"the last block computes {only} alone{queries}")
    else:
        notes.append(f"the last MLP computes {only} alone, the attention before it every token: {reason}")
    return Ending(block.attn.path, count, reason is None)


def _looks_around(unit: Unit) -> str | None:
    """Which module beside a unit needs all tokens of an image, if there is one."""
    names = (name for name, module in zip(unit.parallel, unit.beside(), strict=True) if not module.tokenwise)
    return next((f"{name} at {unit.path} looks at all tokens" for name in names), None)
