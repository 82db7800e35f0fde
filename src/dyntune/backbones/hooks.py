"""Hooks that users have put on a host, and that a tuned model passes by."""

import logging
from collections.abc import Collection

from torch import nn

from dyntune.backbones.owners import HostPass
from dyntune.core.texts import listed

log = logging.getLogger("dyntune")


def warn_of_unheard(host: nn.Module, called: Collection[nn.Module]) -> None:
    """Says which modules have hooks, or a forward of the user's own, that do not run: units compute blocks themselves.

    Args:
        host: a plain one.
        called: its modules whose ``forward`` runs.
    """
    unheard = [
        name or type(host).__name__ for name, module in host.named_modules() if module not in called and _marked(module)
    ]
    if unheard:
        log.warning(
            "%s: hooks there, or a forward of your own, do not run in the tuned model, which computes itself what is "
            "inside. Put them on modules further in (blocks.0.mlp, blocks.0.attn.qkv), or give model.run(images, "
            "watch=...), which is told of the tokens behind each block.",
            listed(unheard),
        )


def _marked(module: nn.Module) -> bool:
    """Whether a module has hooks, or a forward of its own that is neither a ``HostPass`` nor accelerate's."""
    own = vars(module).get("forward")
    theirs = own is not None and not isinstance(own, HostPass) and not hasattr(module, "_hf_hook")
    return theirs or bool(module._forward_hooks or module._forward_pre_hooks)
