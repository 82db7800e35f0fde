"""Models of timm: built by name, with weights from a local file or timm's hub, and described by what built them."""

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
from typing import Any, ClassVar, Self

import numpy as np
import safetensors.torch
import timm
import torch
from timm.models import (
    PretrainedCfg,
    beit,
    clean_state_dict,
    eva,
    get_pretrained_cfg,
    naflexvit,
    swin_transformer,
    swin_transformer_v2,
    vision_transformer,
    vision_transformer_relpos,
)
from torch import Tensor, nn

from dyntune.backbones import builtin as _builtin  # noqa: F401  registers the built-in backbone with timm
from dyntune.backbones import timm_blocks
from dyntune.backbones.base import Backbone
from dyntune.backbones.hosted import block_sites, fold_factors
from dyntune.backbones.hub import downloads, quickly
from dyntune.backbones.origin import OR_BUILT_IN, BackboneSource
from dyntune.backbones.sites import Site
from dyntune.backbones.timm_names import require_name
from dyntune.core.attention import bias_of
from dyntune.core.errors import BackboneError
from dyntune.core.rotation import Rotation
from dyntune.core.shapes import shapes_only
from dyntune.core.texts import listed
from dyntune.core.tokens import Tokens
from dyntune.core.words import counted
from dyntune.data.transforms import Preprocessing

PATCH_DROP = "it drops patches at random (patch_drop_rate); build it with patch_drop_rate=0"
"""Why a host is refused that does so."""


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
_HUBS = ("hf-hub:", "hf_hub:")
_ARGUMENTS = ("num_classes", "global_pool", "dynamic_img_size")

log = logging.getLogger("dyntune")


class TimmBackbone(Backbone):
    """What the families of timm's ViTs have in common: how they are built, and the names of what is in all of them."""

    host: Any
    arguments: ClassVar[tuple[str, ...]] = (*_ARGUMENTS, "in_chans", "img_size")

    @classmethod
    def create(
        cls, name: str, *, weights: str | Path | None = None, pretrained: bool = True, **arguments: Any
    ) -> nn.Module:
        return create(name, weights=weights, pretrained=pretrained, **arguments)

    def origin(self) -> BackboneSource:
        host: Any = self.host
        arguments = {key: getattr(host, key) for key in _ARGUMENTS if hasattr(host, key)}
        arguments["in_chans"] = self.image_shape[0]
        if self.built_size is not None:
            arguments["img_size"] = list(self.built_size)
        return described(host, arguments)

    @property
    def built_size(self) -> tuple[int, int] | None:
        """Height and width of the images that the host was built for, where it says so."""
        return self.host.patch_embed.img_size

    def preprocessing(self) -> Preprocessing:
        return Preprocessing.from_timm(self.host)

    def all_sites(self) -> Iterator[Site]:
        host = self.host
        yield self.patch_site
        for block in self.blocks:
            yield from block_sites(block)
        yield Site("norm", None, "norm", host, "norm")
        yield Site("norm", None, "fc_norm", host, "fc_norm")

    @property
    def patch_site(self) -> Site:
        """The map from a patch's pixels to its token."""
        return Site("patch", None, "patch_embed.proj", self.host.patch_embed, "proj")

    def fold_factors(self) -> None:
        fold_factors(self.blocks)

    def check_images(self, images: Tensor) -> None:
        """Checks that the host takes images of this shape.

        Raises:
            BackboneError: it does not.
        """
        channels, height, width = self.image_shape
        if images.ndim != 4 or images.shape[1] != channels:
            raise BackboneError(f"expected images of shape (B, {channels}, {height}, {width}); given {images.shape}.")
        if not self.any_size and images.shape[2:] != (height, width):
            raise BackboneError(
                f"the backbone was built for images of {height} x {width} pixels; given {tuple(images.shape[2:])}. "
                "Resize the images, or build the backbone with img_size=... or dynamic_img_size=True."
            )

    @property
    def any_size(self) -> bool:
        """Whether the host takes images of other sizes than the one that it was built for."""
        return getattr(self.host, "dynamic_img_size", False)

    def grid_of(self, embedded: Tensor) -> tuple[int, int]:
        """Rows and columns of patches, from what ``patch_embed`` makes of images."""
        rows, columns = embedded.shape[1:3] if self.any_size else self.host.patch_embed.grid_size
        return int(rows), int(columns)

    def finish(self, tokens: Tokens) -> Tokens:
        # The norm sees the prompts too, as in the published models, whose MACs are counted so.
        return tokens.with_x(self.host.norm(tokens.x)).without_prompts()

    def readout(self, tokens: Tokens) -> Tensor:
        host = self.host
        if not host.global_pool and tokens.provenance.owner is not None:  # the head reads every patch
            tokens = tokens.with_x(tokens.on_places())
        if tokens.provenance.weights is None or host.global_pool in ("", "token"):
            return host.forward_head(tokens.x)
        return host.head(self.pooled(tokens))

    def pooled(self, tokens: Tokens) -> Tensor:
        host, weights = self.host, tokens.provenance.weights
        if weights is None or host.global_pool in ("", "token"):
            return host.forward_head(tokens.x, pre_logits=True)
        return host.head_drop(host.fc_norm(self._pooled(tokens, weights)))

    @property
    def prefix_tokens(self) -> int:
        return int(self.host.num_prefix_tokens)

    def reset_classifier(self, classes: int) -> None:
        self.host.reset_classifier(classes)

    @property
    def poolers(self) -> tuple[nn.Module, ...]:
        own = (getattr(self.host, name, None) for name in ("fc_norm", "attn_pool"))
        return tuple(module for module in own if module is not None)

    def _pooled(self, tokens: Tokens, weights: Tensor) -> Tensor:
        """The host's pooling, ``(B, C)``, with weights ``(B, P)`` of the patches."""
        host, x = self.host, tokens.x
        weights = tokens.cover_prefix(weights)
        if not self.pools_prefix:
            x, weights = x[:, tokens.prefix :], weights[:, tokens.prefix :]
        if getattr(host, "attn_pool", None) is not None:
            return host.attn_pool(x, attn_mask=bias_of(weights, x.dtype)[:, None, None])
        weights = weights.to(x.dtype)
        mean = (x * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True)
        most = x.masked_fill(weights.unsqueeze(-1) <= 0, -torch.inf).amax(1)
        return {"avg": mean, "max": most, "avgmax": 0.5 * (mean + most)}[host.global_pool]

    @property
    def pools_prefix(self) -> bool:
        """Whether pooling reads the prefix tokens beside the patches."""
        return getattr(self.host, "pool_include_prefix", False)

    @property
    def head_reads_grid(self) -> bool:
        return not self.host.global_pool

    @property
    def class_token(self) -> bool:
        return self.host.cls_token is not None

    @property
    def heads(self) -> tuple[nn.Module, ...]:
        head = self.host.get_classifier()
        return tuple(head) if isinstance(head, tuple) else (head,)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        height, width = self.host.patch_embed.img_size or self.host.pretrained_cfg["input_size"][1:]
        return self.host.in_chans, height, width

    @property
    def grid(self) -> tuple[int, int]:
        return self.host.patch_embed.dynamic_feat_size(self.image_shape[1:])

    @property
    def gradient_checkpointing(self) -> bool:
        return self.host.grad_checkpointing and torch.is_grad_enabled()

    def switch_gradient_checkpointing(self, on: bool) -> None:
        self.host.set_grad_checkpointing(on)


class TimmRotary(TimmBackbone):
    """A family of timm's ViTs whose hosts may rotate queries and keys by where patches lie, with ``rope``."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__(host)
        self._still()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self._still()
        return self

    def _still(self) -> None:
        """Keeps positions where they are: hosts that shift them while training would give each pass others."""
        if self.host.rope is not None:
            self.host.rope.eval()


def rotation(table: Tensor | None, half: bool) -> Rotation | None:
    """What timm's ``rope`` gives, ``(P, 2 D)`` or one for each block and head, ``(T, H, P, 2 D)``, as a rotation."""
    if table is None:
        return None
    return Rotation(table[None, :, None] if table.ndim == 2 else table.transpose(1, 2), half)


def described(host: Any, arguments: dict[str, Any]) -> BackboneSource:
    """The source of a model made by ``timm.create_model`` with these arguments, read from the model itself."""
    config = getattr(host, "pretrained_cfg", None) or {}
    if not config.get("architecture"):
        return BackboneSource(None)
    if not timm.is_model(config["architecture"]):
        return BackboneSource(None)
    if config.get("source") == "hf-hub":
        name = f"hf-hub:{config['hf_hub_id']}"
    elif config.get("source") == "local-dir":
        name = f"local-dir:{Path(config['file']).resolve()}"
    else:
        name = config["architecture"] + (f".{config['tag']}" if config.get("tag") else "")
    source = BackboneSource(name, arguments)
    # Arguments that leave no trace in these (an activation, an epsilon, a patch size) would build another model.
    try:
        with shapes_only():
            rebuilt = create(name, pretrained=False, **arguments)
    except BackboneError:  # the configuration of a model on the hub is not there any more
        return BackboneSource(None)
    return source if _structure(rebuilt) == _structure(host) else BackboneSource(None)


def create(name: str, *, weights: str | Path | None = None, pretrained: bool = True, **arguments: Any) -> nn.Module:
    """A timm model with weights from a local file, from timm's hub, or random.

    Args:
        name: timm model name.
        weights: Google ``.npz``, timm/jx ``.pth`` or ``.safetensors``; a head that does not fit is left out.
        pretrained: without ``weights``, whether to download the ones that timm knows for ``name``.
        arguments: passed on to ``timm.create_model``.

    Raises:
        BackboneError: unknown name, no weights to be had, or weights that do not fit.
    """
    hub = name.startswith((*_HUBS, "local-dir:"))
    if not hub:
        require_name(name)
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    download = pretrained and weights is None
    if download and not downloads() and _elsewhere(name):
        raise BackboneError(f"the weights of {name!r} are not on this machine.")
    with quickly() if _asks_the_hub(name, download) else contextlib.nullcontext() as unreachable:
        try:
            model = timm.create_model(name, pretrained=download, **arguments)
        except Exception as error:
            # timm, huggingface_hub and the network stack each have their own error types for a download that fails.
            advice = (
                f" Without a network, give a local weight file (--weights FILE; weights=... in Python){OR_BUILT_IN}."
            )
            raise BackboneError(
                f"cannot build {name!r}{' with its pretrained weights' if download else ''}: "
                f"{unreachable or _first_line(error)}.{advice if download else ''}"
            ) from error
    if "img_size" in arguments and not hasattr(model, "patch_embed"):  # nothing else in such a model tells its size
        size = arguments["img_size"]
        height, width = size if isinstance(size, tuple) else (size, size)
        model.pretrained_cfg = model.pretrained_cfg | {"input_size": (model.in_chans, height, width)}
    if weights is not None and not next(model.parameters()).is_meta:
        load_weights(model, weights)
    return model


def _asks_the_hub(name: str, download: bool) -> bool:
    """Whether building a model asks Hugging Face's hub for a file."""
    config = _known_weights(name) if download else None
    return name.startswith(_HUBS) or (config is not None and bool(config.hf_hub_id) and not config.file)


def _elsewhere(name: str) -> bool:
    """Whether weights are of another place than the hub, and were not fetched from there yet."""
    config = _known_weights(name)
    if config is None or not config.url or config.hf_hub_id or config.file:
        return False
    return not (Path(torch.hub.get_dir()) / "checkpoints" / config.url.rpartition("/")[2]).is_file()


def _known_weights(name: str) -> PretrainedCfg | None:
    """What timm knows of the weights that a name stands for."""
    with contextlib.suppress(Exception):  # a tag that is none: whoever builds the model says so
        return get_pretrained_cfg(name)
    return None


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
            raise BackboneError(
                f"{path} does not hold a ViT that fits {_size(model)}: {_first_line(error)}."
            ) from error
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


def _structure(host: Any) -> str:
    """What a model computes, as its printed form and what that leaves out, without what matters in training only."""
    text = re.sub(r"DropPath\(.*?\)", "Identity()", re.sub(r"Dropout\(.*?\)", "Dropout()", str(host)))
    settings = {
        name: getattr(host, name, None) for name in ("no_embed_class", "num_prefix_tokens", "pool_include_prefix")
    }
    rope = getattr(host, "rope", None)
    if rope is not None:
        settings |= _plain(rope)
        settings["rotate_half"] = getattr(host.blocks[0].attn, "rotate_half", False)
    if hasattr(host, "layers"):  # stages with windows
        # That one is switched where a host is wrapped, and gives the same sum.
        sums = {"qkv_bias_separate": None}
        settings |= {name: (_plain(one), _plain(one.attn) | sums) for name, one in timm_blocks.named(host)}
    return f"{settings}{text}"


def _plain(module: nn.Module) -> dict[str, Any]:
    """The settings that a module keeps as plain values."""
    kinds = (bool, int, float, str, tuple, list)
    return {name: value for name, value in vars(module).items() if isinstance(value, kinds) and name != "training"}


def _size(model: Any) -> str:
    rows, columns = model.patch_embed.grid_size if hasattr(model, "patch_embed") else model.embeds.pos_embed_grid_size
    blocks = len(list(timm_blocks.named(model)))
    return f"the model (width {model.embed_dim}, {counted(blocks, 'block')}, {rows} x {columns} patches)"


def _reason(error: Exception, path: Path) -> str:
    # PyTorch's own words advise to load the file with weights_only=False, which would run code from it.
    if not isinstance(error, pickle.UnpicklingError):
        return _first_line(error)
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


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0].rstrip('.')}" if text else type(error).__name__
