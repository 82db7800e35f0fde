"""Sites: the host's own linear maps, convolutions and norms, and the changes that methods put on their outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from dyntune.core.errors import BackboneError

SiteKind = Literal["patch", "norm1", "qkv", "q", "k", "v", "proj", "norm2", "fc1", "fc2", "norm"]
"""Patch embedding; in each block the norms, the map to queries, keys and values, the output map and the MLP's two maps;
norms outside the blocks, such as the last one. A gated MLP has two sites ``fc1``. Where queries, keys and values have a
map in common, each is a part of it; where each has a map of its own, there are three sites instead of ``qkv``, or one
``JointSite``."""


class Change(nn.Module):
    """A change of a site's output that a method puts there: maps the site's input and output to another output."""

    rows: tuple[int, int] | None = None
    """First and last (exclusive) output channel of the map that it changes, and sees; None for all of them."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def fold(self, site: Site) -> None:
        """Writes the change into ``site.weight`` and the site's bias; the map alone computes the same then."""
        raise NotImplementedError


class Changed(nn.Module):
    """A module of the host with changes on its output, in its place: ``y = base(x)``, then each change in turn.

    Attributes that it does not have are those of ``base`` (``weight``, ``in_features``, ...).

    Args:
        base: the host's module.
        bias: gives a bias that the host keeps beside the module; it is added before the changes see the output.
        host_adds: whether the host adds that bias to what comes out, too; it is taken off again for that.
    """

    def __init__(
        self, base: nn.Module, bias: Callable[[], Tensor | None] | None = None, host_adds: bool = False
    ) -> None:
        super().__init__()
        self.base = base
        self.bias_beside = bias
        self.host_adds = host_adds
        self.changes = nn.ModuleDict()

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        bias = None if self.bias_beside is None else self.bias_beside()
        if bias is None:
            return _changed(self.changes, x, y)
        y = _changed(self.changes, x, y + bias)
        return y - bias if self.host_adds else y

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class Joined(nn.Module):
    """Changes of several maps of one input, which see their outputs side by side, as those of one map."""

    def __init__(self) -> None:
        super().__init__()
        self.changes = nn.ModuleDict()

    def forward(self, x: Tensor, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        y = _changed(self.changes, x, torch.cat([*outputs], dim=-1))
        return y.split([output.shape[-1] for output in outputs], dim=-1)


def _changed(changes: nn.ModuleDict, x: Tensor, y: Tensor) -> Tensor:
    """What changes make of a map's output ``y``, each in turn."""
    for change in changes.values():
        rows = cast(Change, change).rows
        if rows is None:
            y = change(x, y)
        else:
            before, own, behind = y.tensor_split(rows, dim=-1)
            y = torch.cat([before, change(x, own), behind], dim=-1)
    return y


def mapped(module: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """What a linear map of the host makes of ``x``, with a bias that the host keeps beside it.

    A ``Changed`` map adds that bias itself, in front of its changes.
    """
    y = module(x)
    return y if bias is None or isinstance(module, Changed) else y + bias


class QueriesApart(nn.Module):
    """The fused projection to queries, keys and values as two linear maps."""

    def __init__(self, qkv: nn.Linear) -> None:
        super().__init__()
        width = qkv.out_features // 3
        biased = qkv.bias is not None
        # Without initial values, which would be drawn from the caller's random numbers.
        self.queries = skip_init(nn.Linear, qkv.in_features, width, biased)
        self.keys_values = skip_init(nn.Linear, qkv.in_features, 2 * width, biased)
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


@dataclass(frozen=True)
class Site:
    """One linear map, convolution or norm of the host, or some output channels of a linear map.

    Args:
        kind: what it is.
        block: index of its block; None outside the blocks.
        path: its name in the host, for instance ``blocks.3.attn.qkv``.
        owner: the host's module that holds it.
        attribute: under which name.
        rows: first and last (exclusive) output channel, where it is a part of a map; None for the whole module.
        biases: names of the parameters of ``owner`` that are the map's bias, in the order of its output channels, where
            they stand beside it; one that is None, or missing, is zero.
        sizes: output channels of queries, keys and values in a map to all of them, where they are not thirds.
        host_adds: whether the host adds these biases itself to what the map gives, as it does where an attention is
            computed as a whole; nobody calls the site then.
    """

    kind: SiteKind
    block: int | None
    path: str
    owner: nn.Module
    attribute: str
    rows: tuple[int, int] | None = None
    biases: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    host_adds: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """What the host's module makes of ``x``, with whatever is put on it and the bias that stands beside it."""
        return mapped(getattr(self.owner, self.attribute), x, self._beside() if self.biases else None)

    @property
    def module(self) -> nn.Module:
        """The host's own module, whatever is put on it."""
        module = getattr(self.owner, self.attribute)
        return module.base if isinstance(module, Changed) else module

    @property
    def each(self) -> tuple[Site, ...]:
        """The sites of the host's own maps that it consists of."""
        return (self,)

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
    def weight(self) -> Tensor:
        """The weight, of a part its rows, as a view to be written to under ``torch.no_grad``."""
        return cast(Tensor, self.module.weight)[slice(*self.rows or (None,))]

    @property
    def bias(self) -> Tensor | None:
        """The bias, of a part its channels; a view, or where it stands beside the map, a copy. None without one."""
        own = cast("Tensor | None", self.module.bias)
        whole = self._beside() if own is None else own
        return None if whole is None else whole[slice(*self.rows or (None,))]

    @torch.no_grad()
    def set_bias(self, bias: Tensor) -> None:
        """Gives the site's channels this bias, ``(channels,)``, in the map itself, whether it had one or not."""
        module, own = self.module, slice(*self.rows or (None,))
        if module.bias is not None:
            cast(Tensor, module.bias)[own] = bias
            return
        weight = cast(Tensor, module.weight)
        whole = self._beside()
        whole = weight.new_zeros(len(weight)) if whole is None else whole.detach().clone()
        whole[own] = bias
        module.bias = nn.Parameter(whole, requires_grad=False)
        for name in self.biases:
            setattr(self.owner, name, None)

    def _beside(self) -> Tensor | None:
        """The bias of the whole map that its owner keeps, ``(outputs,)``."""
        parts = [getattr(self.owner, name, None) for name in self.biases]
        if all(part is None for part in parts):
            return None
        size = len(cast(Tensor, self.module.weight)) // len(parts)
        like = next(part for part in parts if part is not None)
        return torch.cat([like.new_zeros(size) if part is None else part for part in parts])

    @property
    def parts(self) -> tuple[str, ...]:
        """The maps to queries, keys and values that it holds, by name; else the name of its one map."""
        if self.kind == "qkv":
            return "q", "k", "v"
        return (self.kind if self.kind in ("q", "k", "v") else self.path.rpartition(".")[2],)

    def part(self, kind: SiteKind) -> Site:
        """The queries', keys' or values' part of a map to all of them.

        Raises:
            BackboneError: the map is not made of three equal parts, and the host does not say of which.
        """
        outputs = len(self.weight)
        sizes = self.sizes or (outputs // 3,) * 3
        if sum(sizes) != outputs:
            raise BackboneError(
                f"{self.path} gives {outputs} channels, which are not {sizes} for q, k and v. Change the map as a "
                "whole (targets=qkv); its family may say the sizes (Site(sizes=...))."
            )
        place = self.parts.index(kind)
        return replace(self, kind=kind, rows=(sum(sizes[:place]), sum(sizes[: place + 1])))

    @property
    def channels(self) -> int:
        """Channels of the output."""
        return len(self.weight)

    @property
    def inputs(self) -> int:
        """Channels of the input of a linear map."""
        return self.weight.shape[1]

    def slots(self, width: int) -> tuple[int, int]:
        """A linear map as whole slots of ``width`` x ``width``: how many stand side by side in its input and output.

        Raises:
            BackboneError: its weights are not made of such slots.
        """
        rows, columns = self.weight.shape
        outputs, inputs = rows // width, columns // width
        expected = {"qkv": (3, 1), "fc1": (outputs, 1), "fc2": (1, inputs)}.get(self.kind, (1, 1))
        if (rows, columns) != (expected[0] * width, expected[1] * width):
            raise BackboneError(
                f"{self.path} is {rows} x {columns}, which is not made of whole slots of {width} x {width}, as "
                "the factors of FacT need (gated MLPs seldom are). Use a method that takes any size, such as lora."
            )
        return inputs, outputs

    def add(self, name: str, change: Change) -> None:
        """Puts a change on this site, after those that are there; on a part of a map as ``name_q``, ``name_k``, ...

        Raises:
            BackboneError: a change of that name is there already.
        """
        module = self._changing()
        if self.rows is not None:
            name = f"{name}_{self.kind}"
            change.rows = self.rows
        if name in module.changes:
            raise BackboneError(f"{name} is already installed at {self.path}; give each tuning method once per place.")
        like = next(self.module.parameters())
        module.changes[name] = change.to(device=like.device, dtype=like.dtype)

    def _changing(self) -> Changed | Joined:
        """What holds the changes, put there if it is not."""
        module = getattr(self.owner, self.attribute)
        if not isinstance(module, Changed):
            module = Changed(module, self._beside if self.biases else None, self.host_adds)
            setattr(self.owner, self.attribute, module)
        return module

    def fold(self) -> None:
        """Writes all changes of the map into the host's module and puts that back in its place."""
        for change in self.changes.values():
            change.fold(replace(self, rows=change.rows))
        self.restore()

    def restore(self) -> None:
        """Puts the host's module back in its place, without the changes."""
        setattr(self.owner, self.attribute, self.module)


@dataclass(frozen=True)
class JointSite(Site):
    """The maps to queries, keys and values of a host that has one for each, as the one map that others have.

    Changes lie in a module that ``owner`` gets as ``attribute`` as long as there are some; whoever computes the
    attention asks ``outputs``.

    Args:
        maps: sites of the three maps.
    """

    maps: tuple[Site, ...] = ()

    @classmethod
    def of(cls, maps: Sequence[Site]) -> JointSite:
        """That of the maps to queries, keys and values of one attention."""
        first = maps[0]
        path = f"{first.path.rpartition('.')[0]}.qkv"
        sizes = tuple(site.channels for site in maps)
        return cls("qkv", first.block, path, first.owner, "joined", sizes=sizes, maps=tuple(maps))

    def outputs(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the maps make of their inputs, with everything that is put on them.

        Args:
            inputs: of each map, ``(..., C)``; one and the same as long as there are changes.
        """
        outputs = tuple(site(x) for site, x in zip(self.maps, inputs, strict=True))
        joined = self._joined
        return outputs if joined is None else joined(inputs[0], outputs)

    @property
    def _joined(self) -> Joined | None:
        return getattr(self.owner, self.attribute, None)

    @property
    def module(self) -> nn.Module:
        """The first of the host's maps."""
        return self.maps[0].module

    @property
    def each(self) -> tuple[Site, ...]:
        return self.maps

    @property
    def plain(self) -> bool:
        return self._joined is None and all(site.plain for site in self.maps)

    @property
    def linears(self) -> tuple[tuple[nn.Module, str], ...]:
        return tuple(linear for site in self.maps for linear in site.linears) if self._joined is None else ()

    @property
    def changes(self) -> dict[str, Change]:
        joined = self._joined
        return {} if joined is None else cast("dict[str, Change]", dict(joined.changes.items()))

    @property
    def weight(self) -> Tensor:
        """The weights of the maps, of a part its rows; a copy."""
        return torch.cat([site.weight for site in self.maps])[slice(*self.rows or (None,))]

    @property
    def bias(self) -> Tensor | None:
        biases = [site.bias for site in self.maps]
        if all(bias is None for bias in biases):
            return None
        filled = (
            site.weight.new_zeros(site.channels) if bias is None else bias
            for site, bias in zip(self.maps, biases, strict=True)
        )
        return torch.cat([*filled])[slice(*self.rows or (None,))]

    def _changing(self) -> Changed | Joined:
        if self._joined is None:
            setattr(self.owner, self.attribute, Joined())
        return cast(Joined, self._joined)

    @torch.no_grad()
    def fold(self) -> None:
        """Writes all changes into the host's maps, by way of one map with the weights of all."""
        if not self.changes:
            return
        weight, bias = self.weight, self.bias
        whole = nn.Linear(weight.shape[1], len(weight), bias is not None).to(weight).requires_grad_(False)
        whole.weight.copy_(weight)
        if bias is not None:
            whole.bias.copy_(bias)
        holder = nn.Module()
        holder.qkv = whole
        site = Site(self.kind, self.block, self.path, holder, "qkv", sizes=self.sizes)
        for change in self.changes.values():
            change.fold(replace(site, rows=change.rows))
        self.restore()
        biases = (None,) * len(self.maps) if site.bias is None else site.bias.split(self.sizes)
        for own, part, added in zip(self.maps, site.weight.split(self.sizes), biases, strict=True):
            own.weight.copy_(part)
            if added is not None and (own.bias is not None or bool(added.any())):
                own.set_bias(added.clone())

    def restore(self) -> None:
        if self._joined is not None:
            delattr(self.owner, self.attribute)
        for site in self.maps:
            site.restore()
