"""Backbones: the interface that methods are written against, and the host families that implement it."""

from torch import nn

from dyntune.backbones import builtin as _builtin  # noqa: F401  registers the built-in backbone with timm
from dyntune.backbones.base import Backbone
from dyntune.backbones.families.timm_vit import TimmViT


def wrap(host: nn.Module) -> Backbone:
    """The host model behind the backbone interface.

    Raises:
        BackboneError: no family of hosts fits; says what is supported.
    """
    # Whoever has such a model has imported PEFT, which is slow to import and need not be installed otherwise.
    if any(type(module).__module__.partition(".")[0] == "peft" for module in host.modules()):
        from dyntune.backbones.peft import PeftViT

        return PeftViT(host)
    return TimmViT(host)
