"""Weight files read into models of timm: under its names or those of other libraries, wherever in a file they stand."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from timm.models import (
    beit,
    clean_state_dict,
    eva,
    naflexvit,
    swin_transformer,
    swin_transformer_v2,
    vision_transformer,
    vision_transformer_relpos,
)
from torch import Tensor, nn

from dyntune.backbones import timm_blocks
from dyntune.core.errors import BackboneError
from dyntune.core.texts import listed
from dyntune.core.words import counted

log = logging.getLogger("dyntune")


def _as_it_is(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return state


_FILTERS: dict[type[nn.Module], Callable[..., dict[str, Tensor]]] = {
    vision_transformer.VisionTransformer: vision_transformer.checkpoint_filter_fn,
    eva.Eva: eva.checkpoint_filter_fn,
    naflexvit.NaFlexVit: naflexvit.checkpoint_filter_fn,
    beit.Beit: beit.checkpoint_filter_fn,
    # timm 1.0.26 has none for these: it does not resize their tables of biases.
    vision_transformer_relpos.VisionTransformerRelPos: getattr(
        vision_transformer_relpos, "checkpoint_filter_fn", _as_it_is
    ),
    swin_transformer.SwinTransformer: swin_transformer.checkpoint_filter_fn,
    swin_transformer_v2.SwinTransformerV2: swin_transformer_v2.checkpoint_filter_fn,
}
"""What makes timm's names of those in a file, by kind of model."""
_ANCHORS = ("patch_embed.proj.weight", "blocks.0.norm1.weight", "visual.class_embedding", "cls_token", "mask_token")
"""Names that ViTs have: what stands before them is a prefix."""
_KIN = ("dist_token", "register_tokens", "storage_tokens", "norm1", "ln_pre", "rope", "rope_embed")
"""First words of tensors that ViTs of other kinds have."""
_WRAPPERS = re.compile(r"(?<![^.])(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
"""What PyTorch puts into names for modules that it wraps, anywhere in a model."""
_PLAIN: list[Any] = [
    argparse.Namespace,  # options of a script
    *(np.dtype, type(np.dtype(np.float64)), type(np.dtype(np.float32)), type(np.dtype(np.int64))),
    # The best accuracy so far, say; NumPy before 2.0 had another name for it.
    *((np.float64().__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")),
]
"""Plain values that scripts save beside tensors, and that may be read."""


def load_weights(model: Any, path: str | Path) -> None:
    """Loads a local weight file into a ViT of timm's, in place; nothing is unpickled beyond tensors.

    Google's ``.npz`` arrays are mapped by timm's own loader; ``.pth`` and ``.safetensors`` may hold timm's names
    and those that timm knows for this kind of model: jx, DINOv2 or OpenAI CLIP for a VisionTransformer, EVA,
    DINOv3, the Perception Encoder or Sapiens2 for an Eva, the authors' for a Swin. They may stand in dictionaries
    beside a student, an optimiser or options, under a prefix (``teacher.backbone.``, ``module.encoder.``), and
    among tensors of which the model has no part, such as MAE's decoder; a log message says what was taken. Position
    embeddings are resized to the model's grid. The classifier is taken when it fits and otherwise left as it is, as
    is the representation layer ``pre_logits`` of old in21k files.

    Args:
        model: filled in place.
        path: the file, or a folder that ``timm.models.save_for_hf`` has written.

    Raises:
        BackboneError: the file is missing, unreadable, or does not hold every tensor of the backbone.
    """
    path = _weight_file(Path(path))
    read = next((own for kind, own in _FILTERS.items() if isinstance(model, kind)), None)
    if read is None:
        kinds = ", ".join(kind.__name__ for kind in _FILTERS)
        raise BackboneError(f"weights can be read into timm's {kinds}; given {type(model).__name__}.")
    if path.suffix == ".npz":
        if not hasattr(model, "load_pretrained"):
            raise BackboneError(f"{path}: .npz files are of the VisionTransformer; given {type(model).__name__}.")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                blocks = {match[0] for name in arrays for match in re.finditer(r"encoderblock_\d+", name)}
            if blocks and len(blocks) != len(model.blocks):
                raise ValueError(f"the file has {counted(len(blocks), 'block')}")
            model.load_pretrained(str(path))
        except Exception as error:
            raise BackboneError(f"{path} does not hold a ViT that fits {_size(model)}: {first_line(error)}.") from error
        _require_finite(model.named_parameters(), path)
        return
    try:
        if path.suffix == ".safetensors":
            held = safetensors.torch.load_file(path)
        else:
            with torch.serialization.safe_globals(_PLAIN):
                held = torch.load(path, map_location="cpu", weights_only=True)
        found = _fitting(held, model, read)
    except Exception as error:
        raise BackboneError(
            f"cannot read weights from {path}: {_reason(error, path)}. Expected names that timm reads for this model."
        ) from error
    if found.missing or found.left_out:
        raise BackboneError(
            f"the weights in {path} do not fit {_size(model)}. "
            f"Missing or of another shape: {listed(found.missing) or 'none'}. In the file but not used: "
            f"{listed(found.left_out or found.others) or 'none'}."
        )
    _require_finite(found.tensors.items(), path)
    if found.place or found.others:
        where = f" under {found.place!r}" if found.place else ""
        others = f"; not used: {listed(found.others)}" if found.others else ""
        log.warning("%s: read the %d tensors of the backbone%s%s.", path, len(found.tensors), where, others)
    if found.resized:
        log.warning("%s: resized to fit %s: %s.", path, _size(model), listed(found.resized))
    model.load_state_dict(found.tensors, strict=False)


@dataclass(frozen=True)
class _Found:
    """What a part of a checkpoint holds of a model.

    Args:
        place: dictionaries and prefix that it stands under.
        tensors: by the model's names, of its shapes.
        missing: tensors of the model, but for its head, that are not among them.
        left_out: tensors of such a model that this one does not have, or has in another shape.
        others: tensors of other models beside it.
        resized: tensors of another shape in the file, which timm has brought to that of the model.
    """

    place: str
    tensors: dict[str, Tensor]
    missing: list[str]
    left_out: list[str]
    others: list[str]
    resized: list[str]


def _fitting(held: Any, model: Any, read: Callable[..., dict[str, Tensor]]) -> _Found:
    """The part of a checkpoint that is the model; where none is, the one that comes closest."""
    found, problem = [], None
    for place, state in _states(held, ""):
        ends = {name.removesuffix(anchor) for anchor in _ANCHORS for name in state if name.endswith(anchor)}
        starts = [start for start in ends if start.endswith(".")]
        for start in ("", *sorted(starts, key=lambda start: (_rank(start), start))):
            own = {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}
            others = sorted(name for name in state if not name.startswith(start))
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # timm prints there, where commands print JSON
                    part = _compared(f"{place}{start}", own, read(dict(own), model), model, others)
            except Exception as error:  # names that timm makes nothing of
                problem = problem or error
                continue
            if not part.missing and not part.left_out:
                return part
            found.append(part)
    if not found:
        raise problem or ValueError("it holds no tensors")
    return min(found, key=lambda part: len(part.missing) + len(part.left_out))


def _states(held: Any, place: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dictionary of tensors in a checkpoint, and where it stands, the one that is meant to be used first."""
    if not isinstance(held, Mapping):
        return
    tensors = {
        _WRAPPERS.sub("", name): tensor
        for name, tensor in held.items()
        if isinstance(name, str)
        and isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and not tensor.is_meta
    }
    if tensors:
        yield place, clean_state_dict(tensors)
    for name in sorted((name for name in held if isinstance(name, str)), key=_rank):
        if place.count("/") < 3:  # deeper ones are states of optimisers
            yield from _states(held[name], f"{place}{name}/")


def _rank(name: str) -> int:
    """Which of several copies of a model is meant: averaged weights before the teacher's, and these before others."""
    marks = ("ema", "teacher", "target", "state_dict", "model", "module")
    return next((rank for rank, mark in enumerate(marks) if mark in name), len(marks))


def _compared(place: str, raw: dict[str, Tensor], state: dict[str, Tensor], model: Any, others: list[str]) -> _Found:
    own = model.state_dict()
    head = {name for name in own if name.split(".")[0] in ("head", "head_dist")}
    fitting = {name: tensor for name, tensor in state.items() if name in own and own[name].shape == tensor.shape}
    rest = sorted(name for name in set(state) - set(fitting) if name.split(".")[0] not in ("head", "head_dist"))
    # What bears a name of the model's own parts, or of parts that such models have, is of another model of its kind.
    kin = [name for name in rest if hasattr(model, name.split(".")[0]) or name.split(".")[0] in _KIN]
    missing = sorted(set(own) - set(fitting) - head)
    # A change of the number of axes alone is one of how a map is written.
    resized = sorted(n for n, tensor in fitting.items() if n in raw and raw[n].numel() != tensor.numel())
    return _Found(place, fitting, missing, kin, sorted({*rest} - {*kin}) + others, resized)


def _weight_file(path: Path) -> Path:
    """The file itself, or the one with the weights in a folder."""
    files = [path / name for name in ("model.safetensors", "pytorch_model.bin")] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise BackboneError(
            f"no weight file at {path}. Expected a .npz, .pth or .safetensors file, or a folder with model.safetensors."
        )
    return file


def _require_finite(tensors: Iterable[tuple[str, Tensor]], path: Path) -> None:
    spoilt = [name for name, tensor in tensors if not bool(tensor.isfinite().all())]
    if spoilt:
        raise BackboneError(f"the weights in {path} are not finite in {listed(spoilt)}. Give others.")


def _size(model: Any) -> str:
    rows, columns = model.patch_embed.grid_size if hasattr(model, "patch_embed") else model.embeds.pos_embed_grid_size
    blocks = len(list(timm_blocks.named(model)))
    return f"the model (width {model.embed_dim}, {counted(blocks, 'block')}, {rows} x {columns} patches)"


def _reason(error: Exception, path: Path) -> str:
    # PyTorch's own words advise to load the file with weights_only=False, which would run code from it.
    if not isinstance(error, pickle.UnpicklingError):
        return first_line(error)
    names: list[str] = []
    with contextlib.suppress(Exception):  # it is no pickle at all
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if not names:
        return "it is no file of plain tensors"
    whole = any(name.startswith("torch.nn.modules.") for name in names)
    taken = ".state_dict()" if whole else '["state_dict"]'
    return (
        f"it is no file of plain tensors but {'a whole model' if whole else 'tensors among objects'} "
        f"({', '.join(sorted(names)[:3])}), and opening it may run code. If you trust who made it, convert it once: "
        f"torch.save(torch.load('{path.name}', weights_only=False){taken}, 'weights.pth')"
    )


def first_line(error: Exception) -> str:
    """What a library has to say at first, and the kind of its error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0].rstrip('.')}" if text else type(error).__name__
