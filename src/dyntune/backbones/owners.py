"""Which tuned model a host belongs to: while there is one, the host's own forward pass, which skips it, refuses."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any, Protocol

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from dyntune.backbones.base import Backbone
from dyntune.core.errors import BackboneError

_PASSES = {
    "forward": "model(images)",
    "forward_features": "model.forward_features(images)",
    "forward_intermediates": "model.forward_intermediates(images)",
    "get_intermediate_layers": "model.forward_intermediates(images, n, intermediates_only=True)",
}
"""Methods of hosts that run their blocks, and what to call on the tuned model instead."""
_OWNERS = WeakIdKeyDictionary()
"""The tuned model that each parameter of a host belongs to, as long as there is one."""


class Owner(Protocol):
    """What is told of a tuned model to whoever reaches for its host."""

    @property
    def spec(self) -> str:
        """The parts as one spec string."""
        ...


class HostPass:
    """Stands before a method of a host that runs its blocks, and refuses it while the host belongs to a tuned model.

    A host by itself, such as a copy, runs as ever.

    Args:
        host: whose method it is.
        name: of the method.
    """

    def __init__(self, host: nn.Module, name: str) -> None:
        self._host, self._name = host, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        host = self._host
        owner = next(filter(None, map(_owner, host.parameters())), None)
        if owner is not None:
            raise BackboneError(
                f"{type(host).__name__}.{self._name} runs without what is put on it ({owner.spec}), so that its "
                f"results are not those of the tuned model. Call the tuned model: {_PASSES[self._name]}. A host to "
                "compare with is copy.deepcopy(host), made before it is tuned."
            )
        return getattr(type(host), self._name)(host, *args, **kwargs)


def claim(owner: Owner, backbone: Backbone) -> None:
    """Notes that a host belongs to a tuned model, and puts a ``HostPass`` before what would run it without."""
    reference = weakref.ref(owner)
    for parameter in backbone.host.parameters():
        if _owner(parameter) is None:  # a copy may share the tensors of the model that it is of
            _OWNERS[parameter] = reference
    for module in backbone.passes:
        for name in _PASSES:
            own = vars(module).get(name)
            # Whoever has put a function of their own there, as accelerate's hooks are, has it called.
            if hasattr(type(module), name) and (own is None or isinstance(own, HostPass)):
                module.__dict__[name] = HostPass(module, name)
    # A host and its passes hold each other. Without them it goes with its tuned model, not when garbage is looked for.
    weakref.finalize(owner, _left, [weakref.ref(module) for module in backbone.passes]).atexit = False


def release(backbone: Backbone) -> None:
    """Gives a host back: it runs by itself, and may be tuned again."""
    for parameter in backbone.host.parameters():
        _OWNERS.pop(parameter, None)
    for module in backbone.passes:
        open_passes(module)


def open_passes(module: nn.Module) -> None:
    """Takes what ``claim`` has put before the methods of a module, or of one that it is a shallow copy of, away."""
    for name in _PASSES:
        if isinstance(vars(module).get(name), HostPass):
            del module.__dict__[name]


def require_free(host: nn.Module) -> None:
    """Raises BackboneError where a host, or a part of it, belongs to a tuned model that is still there."""
    if any(_owner(parameter) for parameter in host.parameters()):
        gc.collect()  # one that was let go may wait for this
    owner = next(filter(None, map(_owner, host.parameters())), None)
    if owner is not None:
        raise BackboneError(
            f"the backbone belongs to another tuned model already ({owner.spec}), and two on one backbone would change "
            "each other's answers. Give each a backbone of its own: build it again, or copy.deepcopy(backbone) before "
            "the first is tuned."
        )


def _left(modules: Iterable[weakref.ref[nn.Module]]) -> None:
    """Takes the passes of a host away whose tuned model is gone, unless it belongs to another by now."""
    for module in filter(None, (reference() for reference in modules)):
        if not any(_owner(parameter) for parameter in module.parameters()):
            open_passes(module)


def _owner(parameter: nn.Parameter) -> Owner | None:
    reference = _OWNERS.get(parameter)
    return None if reference is None else reference()
