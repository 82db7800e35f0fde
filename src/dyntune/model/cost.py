"""What a tuned model costs: trained parameters, MACs per image and block, the largest activation, the saved bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, cast

from dyntune.model.macs import Trace, trace
from dyntune.model.tuned import TunedModel, require_tuned
from dyntune.model.twin import twin
from dyntune.parts.policies.base import TokenPolicy
from dyntune.parts.policies.gating import GatingPolicy
from dyntune.parts.spec import format_spec


@dataclass(frozen=True)
class BlockCost:
    """What one block computes for an image.

    Args:
        block: its path, for instance ``blocks.3``.
        attention_tokens: tokens in its attention, prefix tokens included.
        mlp_tokens: tokens in its MLP; fewer where a policy merges or drops some between the two.
        attention_active: how many of them attention is expected to compute: its gate, if any, at the target rate.
        mlp_active: the same of the MLP.
        macs: MACs of everything in the block, adapters, gates and what decides about tokens included.
        dense_macs: MACs of the same block of the untouched backbone.
    """

    block: str
    attention_tokens: int
    mlp_tokens: int
    attention_active: float
    mlp_active: float
    macs: int
    dense_macs: int


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
        embedding_macs: the share of ``macs`` in front of the blocks.
        blocks: every block; together with ``embedding_macs`` and ``norm_macs`` they make ``macs``.
        norm_macs: the share of ``macs`` behind the blocks: the last norms, and attention pooling.
        largest_activation_bytes: size of the largest tensor that inference on one image makes, in the precision of the
            weights (fp32 unless the model was converted), with attention by a fused kernel, which makes no matrix of
            queries by keys. It grows with the number of images.
        largest_activation_shape: its shape.
        largest_activation_at: where the first of that size is made: "embedding", a block's path, or "norm".
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
    embedding_macs: int
    blocks: tuple[BlockCost, ...] = field(repr=False)
    norm_macs: int
    largest_activation_bytes: int
    largest_activation_shape: tuple[int, ...]
    largest_activation_at: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        lists = {"blocks": list(map(asdict, self.blocks)), "largest_activation_shape": [*self.largest_activation_shape]}
        return asdict(self) | lists


def cost(model: TunedModel) -> Cost:
    """Parameters and MACs of a tuned model at inference, without running it on data.

    Nothing is computed: shapes alone are traced, so it is quick for any size and works for a model on the meta device.
    """
    require_tuned(model, "cost")
    parameters = dict(model.backbone.named_parameters())
    head = model.backbone.head_parameters()
    trained = model.tuned_state()
    methods = [part for part in model.parts if not isinstance(part, TokenPolicy)]
    policies = [part for part in model.parts if isinstance(part, TokenPolicy)]
    traced = trace(twin(model.backbone), model.policies)

    return Cost(
        model=model.backbone_name or type(model.backbone.host).__name__,
        method="+".join(map(format_spec, methods)),
        tokens="+".join(map(format_spec, policies)) or None,
        trainable_params=sum(p.numel() for name, p in trained.items() if name not in head),
        head_params=sum(parameters[name].numel() for name in head),
        total_params=sum(p.numel() for p in parameters.values()),
        macs=traced.macs,
        head_macs=traced.head_macs,
        dense_macs=model.dense_macs,
        adapter_bytes=sum(p.numel() * p.element_size() for p in model.saved_state().values()),
        embedding_macs=traced.embedding_macs,
        blocks=_block_costs(model, traced),
        norm_macs=traced.norm_macs,
        largest_activation_bytes=traced.largest.bytes,
        largest_activation_shape=traced.largest.shape,
        largest_activation_at=traced.largest.piece,
    )


def _block_costs(model: TunedModel, traced: Trace) -> tuple[BlockCost, ...]:
    units = {unit.path: unit for unit in model.backbone.all_units()}
    skipped = {
        gate.unit: gate.values.shape[1] * (1 - cast(GatingPolicy, gate.policy).target_rate(units[gate.unit]))
        for gate in traced.gates
    }
    return tuple(
        BlockCost(
            block.path,
            attention_tokens,
            mlp_tokens,
            round(attention_tokens - skipped.get(block.path, 0) - skipped.get(block.attn.path, 0), 9),
            round(mlp_tokens - skipped.get(block.path, 0) - skipped.get(block.mlp.path, 0), 9),
            macs,
            dense,
        )
        for block, attention_tokens, mlp_tokens, macs, dense in zip(
            model.backbone.blocks,
            traced.attention_tokens,
            traced.mlp_tokens,
            traced.block_macs,
            model.dense_block_macs,
            strict=True,
        )
    )
