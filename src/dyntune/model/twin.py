"""A second model on the same tensors."""

import copy
from collections.abc import Collection, Iterator
from itertools import chain
from typing import Protocol, TypeVar

from torch import Tensor, nn


class _Module(Protocol):
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def buffers(self) -> Iterator[Tensor]: ...


M = TypeVar("M", bound=_Module)


def twin(module: M, own: Collection[Tensor] = ()) -> M:
    """The same module with modes and attributes of its own, for what must not disturb a thread that runs it.

    Args:
        module: what is copied; all of its tensors are shared.
        own: those of its tensors that are not.
    """
    apart = set(map(id, own))
    shared = (tensor for tensor in chain(module.parameters(), module.buffers()) if id(tensor) not in apart)
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})
