"""Sites: the host's own linear maps, convolutions and norms, and the changes that methods put on their outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from dyntune.core.errors import BackboneError

SiteKind = Literal["patch", "norm1", "qkv", "proj", "norm2", "fc1", "fc2", "norm"]
"""Patch embedding; in each block the norms, the fused query-key-value map, the output map and the MLP's two maps; the
last norm. A gated MLP has two sites ``fc1``."""


class Changed(nn.Module):
    """A module of the host with changes on its output, in its place: ``y = base(x)``, then each change in turn.

    Attributes that it does not have are those of ``base`` (``weight``, ``in_features``, ...).

    Args:
        base: the host's module.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.changes = nn.ModuleDict()

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for change in self.changes.values():
            y = change(x, y)
        return y

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class QueriesApart(nn.Module):
    """The fused projection to queries, keys and values as two linear maps."""

    def __init__(self, qkv: nn.Linear) -> None:
        super().__init__()
        width = qkv.out_features // 3
        biased = qkv.bias is not None
        self.queries = nn.Linear(qkv.in_features, width, biased)
        self.keys_values = nn.Linear(qkv.in_features, 2 * width, biased)
        self.to(qkv.weight)
        with torch.no_grad():
            for own, whole in zip(self._tensors(), (qkv.weight, qkv.bias), strict=True):
                if whole is not None:
                    own[0].copy_(whole[:width])
                    own[1].copy_(whole[width:])

    def _tensors(self) -> tuple[tuple[Any, Any], ...]:
        maps = (self.queries, self.keys_values)
        return (maps[0].weight, maps[1].weight), (maps[0].bias, maps[1].bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.queries(x), self.keys_values(x)], dim=-1)


class Change(nn.Module):
    """A change of a site's output that a method puts there: maps the site's input and output to another output."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def fold(self, base: nn.Module) -> None:
        """Writes the change into the weights of ``base``, a Linear, Conv2d or norm; it alone computes the same then."""
        raise NotImplementedError


@dataclass(frozen=True)
class Site:
    """One linear map, convolution or norm of the host.

    Args:
        kind: what it is.
        block: index of its block; None outside the blocks.
        path: its name in the host, for instance ``blocks.3.attn.qkv``.
        owner: the host's module that holds it.
        attribute: under which name.
    """

    kind: SiteKind
    block: int | None
    path: str
    owner: nn.Module
    attribute: str

    @property
    def module(self) -> nn.Module:
        """The host's own module, whatever is put on it."""
        module = getattr(self.owner, self.attribute)
        return module.base if isinstance(module, Changed) else module

    @property
    def plain(self) -> bool:
        """Whether it is a linear map with nothing put on it."""
        return type(getattr(self.owner, self.attribute)) is nn.Linear

    @property
    def linears(self) -> tuple[tuple[nn.Module, str], ...]:
        """Holder and name of the linear maps that it consists of; none where something is put on it."""
        module = getattr(self.owner, self.attribute)
        if isinstance(module, QueriesApart):
            return (module, "queries"), (module, "keys_values")
        return ((self.owner, self.attribute),) if self.plain else ()

    @property
    def changes(self) -> dict[str, Change]:
        """The changes that are installed, by name."""
        module = getattr(self.owner, self.attribute)
        return cast("dict[str, Change]", dict(module.changes.items())) if isinstance(module, Changed) else {}

    @property
    def channel_dim(self) -> int:
        """The dimension of the output's channels: 1 behind a convolution, the last one elsewhere."""
        return 1 if isinstance(self.module, nn.Conv2d) else -1

    @property
    def channels(self) -> int:
        """Channels of the output."""
        return int(self.module.weight.shape[0])  # type: ignore[index]

    def slots(self, width: int) -> tuple[int, int]:
        """A linear map as whole slots of ``width`` x ``width``: how many stand side by side in its input and output.

        Raises:
            BackboneError: its weights are not made of such slots.
        """
        rows, columns = self.module.weight.shape  # type: ignore[misc]
        outputs, inputs = rows // width, columns // width
        expected = {"qkv": (3, 1), "proj": (1, 1), "fc1": (outputs, 1), "fc2": (1, inputs)}[self.kind]
        if (rows, columns) != (expected[0] * width, expected[1] * width):
            raise BackboneError(
                f"{self.path} is {rows} x {columns}, which is not made of whole slots of {width} x {width}, as "
                "the factors of FacT need (gated MLPs seldom are). Use a method that takes any size, such as lora."
            )
        return inputs, outputs

    def add(self, name: str, change: nn.Module) -> None:
        """Puts a change on this site, after those that are there.

        Raises:
            BackboneError: a change of that name is there already.
        """
        module = getattr(self.owner, self.attribute)
        if not isinstance(module, Changed):
            module = Changed(module)
            setattr(self.owner, self.attribute, module)
        if name in module.changes:
            raise BackboneError(f"{name} is already installed at {self.path}; give each tuning method once per place.")
        like = next(module.base.parameters())
        module.changes[name] = change.to(device=like.device, dtype=like.dtype)

    def fold(self) -> None:
        """Writes all changes into the host's module and puts that back in its place."""
        for change in self.changes.values():
            change.fold(self.module)
        self.restore()

    def restore(self) -> None:
        """Puts the host's module back in its place, without the changes."""
        setattr(self.owner, self.attribute, self.module)
