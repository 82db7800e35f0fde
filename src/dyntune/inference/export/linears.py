"""The linear layers of a backbone's blocks, which int8 is for, and how their weights are known in an exported graph."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from torch import Tensor, nn

from dyntune.inference.optimized import OptimizedModel


class BackboneLinears:
    """Tells the weights of the linear layers in the blocks from those of gates, adapters, pooling and head.

    An exporter renames, transposes and splits off weights, but it does not change their values, so those are compared.

    Args:
        model: from ``folded_copy``, with everything folded that can be folded.

    Attributes:
        smallest: elements of the smallest weight among them.
    """

    def __init__(self, model: OptimizedModel) -> None:
        own = {
            id(module.weight): (f"{own.path}.{name}".rstrip("."), module.weight)
            for site in model.backbone.sites("qkv", "proj", "fc1", "fc2")
            for own in site.each
            for name, module in own.module.named_modules()
            if isinstance(module, nn.Linear)
        }
        self.smallest = min(weight.numel() for _, weight in own.values())
        self._paths = {digest: path for path, weight in own.values() for digest in _digests(weight)}
        held = (*model.parameters(), *model.buffers())
        others = [tensor for tensor in held if tensor.ndim > 1 and id(tensor) not in own]
        self._others = {digest for parameter in others for digest in _digests(parameter)}

    def path(self, weight: np.ndarray[Any, Any]) -> str | None:
        """Which linear layer a weight, ``(in, out)`` or ``(out, in)``, belongs to; None if to none of them."""
        return self._paths.get(_digest(weight))

    def stays_float(self, weight: np.ndarray[Any, Any]) -> bool:
        """Whether a weight is one of the model's others, which are not quantised."""
        return _digest(weight) in self._others


def _digests(weight: Tensor) -> set[str]:
    """Of a weight as it is, of one with several output dimensions as a matrix, and of both transposed."""
    array = weight.detach().cpu().numpy()
    return {_digest(laid) for matrix in (array, array.reshape(len(array), -1)) for laid in (matrix, matrix.T)}


def _digest(array: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()).hexdigest()
