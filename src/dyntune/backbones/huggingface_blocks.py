"""Blocks of transformers' towers, read as hosted sub-layers: their modules have other names in each of its files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.layers import QuickGELU
from torch import nn

from dyntune.backbones.hosted import HostedAttention, HostedMlp, Ref
from dyntune.backbones.sites import Site, SiteKind
from dyntune.backbones.units import Block
from dyntune.core.errors import BackboneError

_NORM1 = ("layernorm_before", "norm1", "layer_norm1")
_NORM2 = ("layernorm_after", "norm2", "layer_norm2")
_ATTENTION = ("attention", "self_attn")
_MAPS: tuple[tuple[SiteKind, tuple[str, ...]], ...] = (
    ("q", ("q_proj", "attention.query")),
    ("k", ("k_proj", "attention.key")),
    ("v", ("v_proj", "attention.value")),
    ("proj", ("o_proj", "out_proj", "output.dense")),
)
"""Within the attention, the maps to queries, keys and values, and the one behind it."""
_MLPS = (
    (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    (("mlp.weights_in",), "mlp.weights_out"),
    (("mlp.fc1",), "mlp.fc2"),
    (("mlp.up_proj",), "mlp.down_proj"),
    (("intermediate.dense",), "output.dense"),
)
"""Within a block, an MLP's maps to the hidden layer, the gate first, and the one from it."""
_ACTIVATIONS = nn.ModuleDict(
    {"gelu": nn.GELU(), "gelu_pytorch_tanh": nn.GELU(approximate="tanh"), "quick_gelu": QuickGELU(), "silu": nn.SiLU()}
)
"""Activations by ``hidden_act``; transformers has classes of its own for some, which other versions call otherwise."""


def read_block(index: int, block: Any, path: str, config: Any, roles: dict[str, str]) -> Block:
    """A block of a tower, as two sub-layers between their norms and what their updates go through.

    Args:
        index: its number.
        block: transformers' block.
        path: of the block in its model.
        config: of the tower.
        roles: what modules do, by their paths in the model; the block's are put there.
    """
    role = f"blocks.{index}"
    roles[path] = role

    def site(kind: SiteKind, name: str, called: str) -> Site:
        roles[join(path, name)] = f"{role}.{called}"
        parent, _, attribute = name.rpartition(".")
        return Site(kind, index, f"{role}.{called}", block.get_submodule(parent), attribute)

    norms = site("norm1", found(block, _NORM1)[0], "norm1"), site("norm2", found(block, _NORM2)[0], "norm2")
    behind: list[list[Ref]] = [[], []]
    for number, links in enumerate(behind):
        for dropout in ("dropout", ("attention.output.dropout", "output.dropout")[number]):
            links.extend(_refs(block, dropout))
        scale = f"layer_scale{number + 1}"
        links.extend((*_refs(block, scale, "lambda1"), *_refs(block, "drop_path")))
        roles[join(path, scale)] = f"{role}.scale{number + 1}"
    attention, attn = found(block, _ATTENTION)
    roles[join(path, attention)] = f"{role}.attn"
    maps = [site(kind, join(attention, found(attn, names)[0]), f"attn.{kind}") for kind, names in _MAPS]
    inner = getattr(attn, "attention", attn)
    roles[join(path, attention, "attention" if inner is not attn else "", "joined")] = f"{role}.attn.qkv"
    dropout = next(name for name in ("attention_dropout", "dropout_prob", "dropout") if hasattr(inner, name))
    width = int(config.hidden_size)
    hosted = HostedAttention(
        f"{role}.attn",
        width,
        head_width=width // int(config.num_attention_heads),
        norm=norms[0],
        maps=maps[:3],
        chain=(maps[3], *behind[0]),
        out=maps[3],
        dropout=Ref(inner, dropout),
    )
    if hasattr(block, "mlp"):
        roles[join(path, "mlp")] = f"{role}.mlp"
    return Block(index, hosted, _mlp(block, config, role, site, norms[1], behind[1]))


def _mlp(block: Any, config: Any, role: str, site: Callable[..., Site], norm: Site, behind: list[Ref]) -> HostedMlp:
    first, second = next(names for names in _MLPS if all(has(block, name) for name in (*names[0], names[1])))
    # DINOv2's gate and what it multiplies were one map, and have become two.
    called = ("gate", "fc1") if len(first) == 2 else ("gate_fc1" if first[0] == "mlp.weights_in" else "fc1",)
    gated = called != ("fc1",)
    maps = [site("fc1", name, f"mlp.{word}") for name, word in zip(first, called, strict=True)]
    out = site("fc2", second, "mlp.fc2")
    if gated:
        inside: tuple[Site | Ref, ...] = (Ref(block, "mlp"),)
    else:
        inside = (maps[0], _activation(block, config), out)
    return HostedMlp(f"{role}.mlp", int(config.hidden_size), norm=norm, maps=maps, chain=(*inside, *behind), out=out)


def _activation(block: Any, config: Any) -> Ref:
    if config.hidden_act in _ACTIVATIONS:
        return Ref(_ACTIVATIONS, config.hidden_act)
    for owner in (getattr(block, "mlp", None), getattr(block, "intermediate", None)):
        for name in ("activation_fn", "activation", "act_fn", "intermediate_act_fn"):
            if hasattr(owner, name):
                return Ref(owner, name)  # type: ignore[arg-type]
    raise BackboneError(f"{type(block).__name__} has no activation that is known.")


def join(*names: str) -> str:
    """One path of several, of which some may be empty."""
    return ".".join(filter(None, names))


def has(module: nn.Module, path: str) -> bool:
    """Whether there is something at a path from a module."""
    for name in filter(None, path.split(".")):
        if not hasattr(module, name):
            return False
        module = getattr(module, name)
    return True


def found(module: nn.Module, paths: Any) -> tuple[str, Any]:
    """The first of these paths that the module has, and what is there."""
    path = next(path for path in paths if has(module, path))
    return path, module.get_submodule(path)


def _refs(block: nn.Module, path: str, vector: str = "") -> list[Ref]:
    parent, _, name = path.rpartition(".")
    return [Ref(block.get_submodule(parent), name, vector)] if has(block, path) else []
