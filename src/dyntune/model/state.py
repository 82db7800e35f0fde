"""The tensors of a tuned backbone: which are trained, which others have changed since, and what of them is saved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.core.digests import checksum, sample
from dyntune.core.errors import CheckpointError

_NONE = torch.empty(0, 0, device="meta")


class TunedState:
    """What of a backbone with parts on it is trained, and what else is no longer as it was when it was tuned.

    Args:
        backbone: with the parts on it, as they have just been installed.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._tuned = frozenset(name for name, p in backbone.named_parameters() if p.requires_grad)
        self._fitted = frozenset(fitted_tensors(backbone))
        self._shapes = {name: tensor.shape for name, tensor in self._held()}
        self._before = {
            name: (sample(t).cpu(), checksum(t))
            for name, t in self._held()
            if name not in self._tuned | self._fitted and not t.is_meta
        }
        """Of each tensor that the methods leave as it is, some values, and what tells any other value from before."""
        self._compared: dict[str, tuple[tuple[Any, ...], bool]] = {
            name: (mark, False) for name, t in self._held() if name in self._before and (mark := _mark(t)) is not None
        }
        """Of these, the mark of the tensor that was compared last, and whether it had other values than before."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._compared = {}  # a copy has tensors of its own

    def trained(self) -> dict[str, Tensor]:
        """The trained tensors, by name: those of the methods, and whatever else requires a gradient."""
        named = self._backbone.named_parameters()
        return {name: p for name, p in named if name in self._tuned or p.requires_grad}

    def extra(self) -> dict[str, Tensor]:
        """What has been changed, or is trained, beside the methods, by name.

        Tensors that PyTorch counts no change of since they were compared last are not read again.
        """
        held = dict(self._held())
        changed = {name: held[name] for name in self._before if name in held and self._differs(name, held[name])}
        return {name: p for name, p in self.trained().items() if name not in self._tuned} | changed

    def look_again(self) -> None:
        """Lets every tensor be compared once more, also those that PyTorch counts no change of."""
        self._compared.clear()

    def in_files(self) -> dict[str, Tensor]:
        """Every tensor of the backbone and of what is on it, by its name in files."""
        return {self._backbone.saved_name(name): tensor for name, tensor in self._held()}

    def saved_names(self) -> dict[str, str]:
        """What is saved: its names in the backbone, and in files."""
        names = self.trained() | fitted_tensors(self._backbone) | self.extra() | self._backbone.companions()
        return {name: self._backbone.saved_name(name) for name in names}

    def saved(self) -> dict[str, Tensor]:
        """What is saved, by its names in files."""
        state = self._backbone.state_dict(keep_vars=True)  # in which gates stand as they are read
        return {saved: state[name] for name, saved in self.saved_names().items()}

    def adopt(self, extra: dict[str, bool]) -> None:
        """See ``TunedModel.adopt``."""
        own = self.in_files()
        if extra.keys() - own.keys():
            raise CheckpointError(f"the model has no tensor {', '.join(sorted(extra.keys() - own.keys())[:5])}.")
        for name, trained in extra.items():
            if trained and isinstance(own[name], nn.Parameter):
                own[name].requires_grad_(True)

    def replace_head(self, before: set[str]) -> None:
        """Takes note of a new classifier, in place of that with the parameters ``before``."""
        new = self._backbone.head_parameters()
        self._tuned = self._tuned - before | new
        kept = {name: shape for name, shape in self._shapes.items() if name not in before}
        self._shapes = kept | {name: p.shape for name, p in self._held() if name in new}

    def unfit(self, model: nn.Module) -> list[str]:
        """Names of tensors that were added, removed or resized, which a file could not be read into.

        Args:
            model: that has the backbone as ``backbone``; trained tensors beside it count too.
        """
        shapes = {f"backbone.{name}": shape for name, shape in self._shapes.items()}
        trained = [name for name, p in model.named_parameters() if p.requires_grad and p.shape != shapes.get(name)]
        held = dict(self._held())
        changed = [f"backbone.{name}" for name, shape in self._shapes.items() if held.get(name, _NONE).shape != shape]
        return sorted({*trained, *changed})

    def _held(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter of the backbone, and every buffer that belongs to its state."""
        yield from self._backbone.named_parameters()
        yield from kept_buffers(self._backbone)

    def _differs(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor that the methods leave as it is has other values than before."""
        mark = _mark(tensor)
        known = self._compared.get(name)
        if mark is not None and known is not None and known[0] == mark:
            return known[1]
        found = _differs(tensor, self._before[name])
        if mark is not None:
            self._compared[name] = mark, found
        return found


def fitted_tensors(backbone: Backbone) -> dict[str, Tensor]:
    """The surrogates of units, by name: saved, though not trained."""
    surrogates = (unit.surrogate for unit in backbone.all_units() if unit.surrogate is not None)
    own = {id(buffer) for surrogate in surrogates for buffer in surrogate.buffers()}
    return {name: buffer for name, buffer in kept_buffers(backbone) if id(buffer) in own}


def kept_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that belong to a module's state, such as the statistics of a batch norm."""
    for path, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def _mark(tensor: Tensor) -> tuple[Any, ...] | None:
    """What stays the same as long as PyTorch counts no change of a tensor; None where it does not count.

    It does not where a layer keeps statistics in a buffer, as batch norm does.
    """
    if tensor.is_meta or tensor.is_inference() or not isinstance(tensor, nn.Parameter):
        return None
    return id(tensor), tensor.data_ptr(), tensor.dtype, tensor._version


def _differs(tensor: Tensor, before: tuple[Tensor, int]) -> bool:
    """Whether a tensor has other values than before, but for its precision: of another one some are compared."""
    if tensor.is_meta:
        return False
    values, bits = before
    if tensor.dtype == values.dtype:
        return checksum(tensor) != bits
    now = sample(tensor).cpu()
    return not torch.equal(now, values.to(now.dtype))
