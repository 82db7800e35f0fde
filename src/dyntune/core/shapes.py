"""Models of shapes alone, for what is found out about a model without its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FILLING = frozenset(
    (Tensor.add_, Tensor.clamp_, Tensor.erfinv_, Tensor.fill_, Tensor.mul_, Tensor.normal_, Tensor.uniform_)
)


class _Unfilled(TorchFunctionMode):
    """Tensors without content are not filled: PyTorch checks it in Python, for most of the time a model is built in."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _FILLING and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def shapes_only() -> Iterator[None]:
    """Modules that are made inside have parameters on the meta device: a shape and no content."""
    with torch.device("meta"), _Unfilled():
        yield
