"""Names of timm's ViTs: whether there is such a one, and which is meant where there is none."""

from __future__ import annotations

import difflib
import re

import timm
from timm.models import get_pretrained_cfg

from dyntune.core.errors import BackboneError

FILES = (
    "vision_transformer",
    "deit",
    "vision_transformer_hybrid",
    "vitamin",
    "eva",
    "naflexvit",
    "beit",
    "vision_transformer_relpos",
    "swin_transformer",
    "swin_transformer_v2",
)
"""timm's files whose models are of a family that there is."""
_OURS = "builtin"
_PLAIN = re.compile(r"[a-z0-9]+_(tiny|small|base|large|huge|giant)_patch\d+(_window\d+)?_\d+")
"""Names of a family's own models, without what a variant adds."""
_NEAR = 5


def require_name(name: str) -> None:
    """Raises BackboneError where timm has no such model, or no such weights of it; the nearest names are said."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = nearest(architecture)
        also = f" Also near: {', '.join(near[1:])}." if near[1:] else ""
        hint = f" Did you mean {near[0]!r}?{also}" if near else ""
        raise BackboneError(f"timm has no model {name!r}.{hint} timm.list_models('vit*') lists them.")
    try:
        get_pretrained_cfg(name)
    except RuntimeError:
        known = [full.partition(".")[2] for full in timm.list_models(f"{architecture}.*", pretrained=True)]
        begins = [other for other in known if other.startswith(tag)]
        near = begins or difflib.get_close_matches(tag, known, n=1)
        hint = f" Did you mean {f'{architecture}.{near[0]}'!r}?" if near else ""
        raise BackboneError(
            f"timm has no weights {tag!r} of {architecture}.{hint} It has {', '.join(known) or 'none'}."
        ) from None


def nearest(architecture: str) -> list[str]:
    """Names that begin as the one given does, else those that contain it, else those that are written alike.

    Args:
        architecture: a name, or a part of one, without a tag.
    """
    architecture = architecture.lower().replace("-", "_").replace("/", "_")
    known = [name for name in timm.list_models(module=(*FILES, _OURS)) if "_xp_" not in name]  # of parallel blocks
    found = [name for name in known if name.startswith(architecture)]
    found = found or [name for name in known if architecture in name]
    if not found:
        return difflib.get_close_matches(architecture, known, n=_NEAR)
    return sorted(found, key=lambda n: (not _PLAIN.fullmatch(n), "patch16_224" not in n, len(n), n))[:_NEAR]
