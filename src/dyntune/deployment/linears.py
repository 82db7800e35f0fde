"""The backbone's linear layers, which int8 is for, and how their weights are recognised in an exported graph."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from torch import Tensor, nn

from dyntune.backbones.sites import Changed
from dyntune.deployment.prepared import DeployedModel


class BackboneLinears:
    """Tells the weights of a backbone's linear layers from those of gates, adapters and head.

    An exporter renames, transposes and splits off weights, but it does not change their values, so those are compared.

    Args:
        model: from ``prepare``, with everything folded that can be folded.

    Attributes:
        smallest: elements of the smallest weight among them.
    """

    def __init__(self, model: DeployedModel) -> None:
        heads = {module for head in model.backbone.heads for module in head.modules()}
        hosted = _own_linears(model.backbone.host)
        own = {id(linear.weight): (name, linear.weight) for name, linear in hosted.items() if linear not in heads}
        self.smallest = min(weight.numel() for _, weight in own.values())
        self._paths = {digest: path for path, weight in own.values() for digest in _digests(weight)}
        others = [parameter for parameter in model.parameters() if parameter.ndim > 1 and id(parameter) not in own]
        self._others = {digest for parameter in others for digest in _digests(parameter)}

    def path(self, weight: np.ndarray[Any, Any]) -> str | None:
        """Which linear layer a weight, ``(in, out)`` or ``(out, in)``, belongs to; None if to none of them."""
        return self._paths.get(_digest(weight))

    def stays_float(self, weight: np.ndarray[Any, Any]) -> bool:
        """Whether a weight is one of the model's that is not quantised: of a gate, an adapter or the head."""
        return _digest(weight) in self._others


def _own_linears(host: nn.Module) -> dict[str, nn.Linear]:
    """The host's linear layers, by name, without what methods have put on them."""
    added = {
        inner
        for module in host.modules()
        if isinstance(module, Changed)
        for change in module.changes.values()
        for inner in change.modules()
    }
    return {n: m for n, m in host.named_modules() if isinstance(m, nn.Linear) and m not in added}


def _digests(weight: Tensor) -> set[str]:
    """Of a weight as it is, of one with several output dimensions as a matrix, and of both transposed."""
    array = weight.detach().cpu().numpy()
    return {_digest(laid) for matrix in (array, array.reshape(len(array), -1)) for laid in (matrix, matrix.T)}


def _digest(array: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()).hexdigest()
