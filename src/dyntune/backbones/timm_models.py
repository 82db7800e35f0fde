"""Models of timm: built by name, with weights from a local file or timm's hub, and described by what built them."""

from __future__ import annotations

import difflib
import pickle
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import timm
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from dyntune.backbones import builtin as _builtin  # noqa: F401  registers the built-in backbone with timm
from dyntune.backbones.base import Backbone
from dyntune.backbones.origin import BackboneSource
from dyntune.core.errors import BackboneError
from dyntune.core.shapes import shapes_only
from dyntune.data.transforms import Preprocessing

_ARGUMENTS = ("num_classes", "global_pool", "dynamic_img_size")


class TimmBackbone(Backbone):
    """What the families of timm's models have in common: timm builds them, and knows how images are prepared."""

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
        if host.patch_embed.img_size is not None:
            arguments["img_size"] = list(host.patch_embed.img_size)
        return described(host, arguments)

    def preprocessing(self) -> Preprocessing:
        return Preprocessing.from_timm(self.host)


def described(host: Any, arguments: dict[str, Any]) -> BackboneSource:
    """The source of a model made by ``timm.create_model`` with these arguments, read from the model itself."""
    config = getattr(host, "pretrained_cfg", None) or {}
    if not config.get("architecture"):
        return BackboneSource(None)
    if not timm.is_model(config["architecture"]) or config.get("source") == "hf-hub":
        return BackboneSource(None)
    name = config["architecture"] + (f".{config['tag']}" if config.get("tag") else "")
    source = BackboneSource(name, arguments)
    # Arguments that leave no trace in these (an activation, an epsilon, a patch size) would build another model.
    with shapes_only():
        rebuilt = create(name, pretrained=False, **arguments)
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
    hub = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    if not hub and not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=5)
        hint = f" Did you mean {near[0]!r}? Also near: {', '.join(near[1:])}." if near else ""
        raise BackboneError(f"timm has no model {name!r}.{hint} timm.list_models('vit*') lists them.")
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    download = pretrained and weights is None
    try:
        model = timm.create_model(name, pretrained=download, **arguments)
    except Exception as error:
        # timm, huggingface_hub and the network stack each have their own error types for a download that fails.
        advice = (
            " Without a network, give a local weight file (--weights FILE; weights=... in Python), "
            "or use the built-in backbone (vit_mini_patch4_32.dyntune, what train does without --model). "
            "HF_HUB_OFFLINE=1 in the environment saves the wait."
        )
        raise BackboneError(
            f"cannot build {name!r}{' with its pretrained weights' if download else ''}: {_first_line(error)}."
            f"{advice if download else ''}"
        ) from error
    if weights is not None:
        load_weights(model, weights)
    return model


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a local weight file into a timm VisionTransformer, in place; nothing is unpickled beyond tensors.

    Google's ``.npz`` arrays are mapped by timm's own loader; ``.pth`` and ``.safetensors`` may hold timm, jx, DINOv2 or
    OpenAI CLIP names. Position embeddings are resized to the model's grid. The classifier is taken when it fits and
    otherwise left as it is, as is the representation layer ``pre_logits`` of old in21k files.

    Raises:
        BackboneError: the file is missing, unreadable, or does not hold every tensor of the backbone.
    """
    path = Path(path)
    if not path.is_file():
        raise BackboneError(f"no weight file at {path}. Expected a .npz, .pth or .safetensors file.")
    if not isinstance(model, VisionTransformer):
        raise BackboneError(f"weights can be read into timm's VisionTransformer; given {type(model).__name__}.")
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as arrays:
                blocks = {match[0] for name in arrays for match in re.finditer(r"encoderblock_\d+", name)}
            if blocks and len(blocks) != len(model.blocks):
                raise ValueError(f"the file has {len(blocks)} blocks")
            model.load_pretrained(str(path))
        except Exception as error:
            raise BackboneError(
                f"{path} does not hold a ViT that fits {_size(model)}: {_first_line(error)}."
            ) from error
        return
    try:
        state = checkpoint_filter_fn(load_state_dict(str(path), weights_only=True), model)
    except Exception as error:
        raise BackboneError(
            f"cannot read weights from {path}: {_reason(error)}. Expected timm, jx, DINOv2 or CLIP names."
        ) from error
    own = model.state_dict()
    head = {name for name in own if name.split(".")[0] in ("head", "head_dist")}
    fitting = {name: tensor for name, tensor in state.items() if name in own and own[name].shape == tensor.shape}
    missing = sorted(set(own) - set(fitting) - head)
    left_out = sorted(name for name in set(state) - set(fitting) if name.split(".")[0] not in ("head", "head_dist"))
    if missing or left_out:
        raise BackboneError(
            f"the weights in {path} do not fit {_size(model)}. "
            f"Missing or of another shape: {_some(missing)}. In the file but not used: {_some(left_out)}."
        )
    model.load_state_dict(fitting, strict=False)


def _structure(host: nn.Module) -> str:
    """What a model computes, as its printed form, without what matters in training only."""
    return re.sub(r"DropPath\(.*?\)", "Identity()", re.sub(r"Dropout\(.*?\)", "Dropout()", str(host)))


def _size(model: VisionTransformer) -> str:
    rows, columns = model.patch_embed.grid_size
    return f"the model (width {model.embed_dim}, {len(model.blocks)} blocks, {rows} x {columns} patches)"


def _some(names: list[str]) -> str:
    return (", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "none"


def _reason(error: Exception) -> str:
    # PyTorch's own words advise to load the file with weights_only=False, which would run code from it.
    return "it is no file of plain tensors" if isinstance(error, pickle.UnpicklingError) else _first_line(error)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0].rstrip('.')}" if text else type(error).__name__
