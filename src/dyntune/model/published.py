"""Checkpoints of the methods' public code: read under their tensor names into a tuned model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dyntune.core.errors import CheckpointError
from dyntune.model.state import fitted_tensors
from dyntune.model.tuned import TunedModel
from dyntune.parts.registry import expand

_NAMES = {
    r"^(?:enc\.)?transformer\.embeddings\.patch_embeddings\.": "patch_embed.proj.",
    r"^(?:enc\.)?transformer\.embeddings\.position_embeddings$": "pos_embed",
    r"^(?:enc\.)?transformer\.embeddings\.cls_token$": "cls_token",
    r"^(?:enc\.)?transformer\.encoder\.encoder_norm\.": "norm.",
    r"^(?:enc\.)?transformer\.encoder\.layer\.": "blocks.",
    r"^(blocks\.\d+)\.attention_norm\.": r"\1.norm1.",
    r"^(blocks\.\d+)\.ffn_norm\.": r"\1.norm2.",
    r"^(blocks\.\d+)\.ffn\.": r"\1.mlp.",
    r"^(blocks\.\d+)\.(fc[12])\.": r"\1.mlp.\2.",
    r"^(blocks\.\d+)\.attn\.out\.": r"\1.attn.proj.",
    r"^(blocks\.\d+)\.attn\.(?:q_proj|query)\.(weight|bias)$": r"\1.attn.qkv.\2/0",
    r"^(blocks\.\d+)\.attn\.(?:k_proj|key)\.(weight|bias)$": r"\1.attn.qkv.\2/1",
    r"^(blocks\.\d+)\.attn\.(?:v_proj|value)\.(weight|bias)$": r"\1.attn.qkv.\2/2",
    r"^head\.last_layer\.": "head.",
}
"""Names of the backbone in the code of VPT and AdaptFormer -> timm's, one after the other; ``/0`` is a third of it."""
_WRAPPERS = ("module", "model", "net", "_orig_mod", "_fsdp_wrapped_module")
"""What names of a whole checkpoint begin with where a module around the model was saved."""
_HEAD_EPS = 1e-6
"""Of the norm that AdaptFormer's code puts in front of the head."""


def load_published(model: TunedModel, state: Mapping[str, Any]) -> None:
    """Fills a tuned model, backbone included, from a state dict of the public code of its methods.

    Each method and policy knows the names of its public code (``published``); the backbone's are timm's, or those of
    the code of VPT or AdaptFormer. The norm without parameters that the latter has in front of its head is folded into
    the head. Read the file with ``torch.load(path, weights_only=True)``.

    Args:
        model: with the same methods and sizes as the checkpoint; filled in place.
        state: tensors by their public names, the whole model or the tuned part of it; also as the entry ``model`` or
            ``state_dict`` of a checkpoint, or in a wrapper such as DistributedDataParallel.

    Raises:
        CheckpointError: a tensor has no place in the model or another shape, is not finite, or a tuned tensor is
            missing.
    """
    state = next((state[name] for name in ("model", "state_dict") if isinstance(state.get(name), Mapping)), state)
    state = _unwrapped({name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)})
    if not state:
        raise CheckpointError("the checkpoint holds no tensors. Give its state dict: tensors by their names.")
    own: dict[str, Tensor] = dict(model.backbone.named_parameters()) | fitted_tensors(model.backbone)
    # A module that is changed by a method, or wrapped by PEFT, stands deeper than in the plain host.
    plain = {model.backbone.saved_name(name.replace(".base.", ".")): name for name in own if name.startswith("host.")}
    saved = {model.backbone.saved_name(name): name for name in own}
    parts = expand(model.parts)
    found: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for name, tensor in _folded_head(state, plain).items():
        mine = (ours for part in parts if (ours := part.from_published(name, tensor)) is not None)
        placed = _placed(model.backbone.published_name(name), plain, saved)
        for own_name, value in next(mine, {placed: tensor}).items():
            whole, third, number = own_name.partition("/")
            if whole not in own:
                raise CheckpointError(
                    f"{name!r} of the checkpoint has no place in {model.spec}; are the methods the same?"
                )
            shape = own[whole].chunk(3)[int(number)].shape if third else own[whole].shape
            if value.shape != shape and not value.numel() == shape.numel() == 1:  # one number is one, however written
                raise CheckpointError(
                    f"{name!r} of the checkpoint is {tuple(value.shape)}, but {model.spec} needs "
                    f"{tuple(shape)}; are the sizes the same?"
                )
            if not bool(value.isfinite().all()):
                raise CheckpointError(f"{name!r} of the checkpoint is not finite.")
            if third:
                thirds.setdefault(whole, {})[int(number)] = value
            else:
                found[whole] = value.reshape(shape)
    found |= {name: torch.cat([pieces[i] for i in range(3)]) for name, pieces in thirds.items() if len(pieces) == 3}
    missing = sorted((model.tuned_state().keys() | thirds.keys()) - found.keys())
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {', '.join(missing[:5])}{' and more' if len(missing) > 5 else ''}. Add what is "
            "missing to the state dict under these names without the leading host., for instance head.weight."
        )
    with torch.no_grad():
        for name, tensor in found.items():
            own[name].copy_(tensor)


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state without what all of its names begin with, if that is of a wrapper, such as DistributedDataParallel."""
    first = next(iter(state), "").partition(".")[0]
    if first not in _WRAPPERS or not all(name.startswith(f"{first}.") for name in state):
        return state
    return _unwrapped({name.removeprefix(f"{first}."): tensor for name, tensor in state.items()})


def _placed(name: str, plain: Mapping[str, str], saved: Mapping[str, str]) -> str:
    """Our name of a tensor of the backbone, with the number of the third of it that it is, if it is one."""
    known = plain.get(f"host.{name}", saved.get(name))
    if known is not None:
        return known
    ours = name
    for pattern, replacement in _NAMES.items():
        ours = re.sub(pattern, replacement, ours)
    ours, third, number = ours.partition("/")
    return plain.get(f"host.{ours}", name) + third + number


def _folded_head(state: Mapping[str, Tensor], plain: Mapping[str, str]) -> Mapping[str, Tensor]:
    """The state with a norm in front of its head folded into the head, where the model's head has none."""
    names = {f"head.{name}" for name in ("0.running_mean", "0.running_var", "1.weight", "1.bias")}
    if not names <= state.keys() or "host.head.weight" not in plain:
        return state
    weight = state["head.1.weight"] / (state["head.0.running_var"] + _HEAD_EPS).sqrt()
    bias = state["head.1.bias"] - weight @ state["head.0.running_mean"]
    left = {name: tensor for name, tensor in state.items() if not re.match(r"head\.[01]\.", name)}
    return left | {"head.weight": weight, "head.bias": bias}
