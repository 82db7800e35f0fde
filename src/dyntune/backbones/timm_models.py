"""Models of timm: built by name, with weights from a local file or timm's hub, and described by what built them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import Tensor, nn

from dyntune.backbones import builtin as _builtin  # noqa: F401  registers the built-in backbone with timm
from dyntune.backbones import timm_blocks
from dyntune.backbones.base import Backbone
from dyntune.backbones.hosted import block_sites, fold_factors
from dyntune.backbones.hub import downloads, quickly
from dyntune.backbones.origin import OR_BUILT_IN, BackboneSource
from dyntune.backbones.sites import Site
from dyntune.backbones.timm_names import require_name
from dyntune.backbones.timm_weights import first_line, load_weights
from dyntune.backbones.units import Block
from dyntune.core.attention import bias_of
from dyntune.core.errors import BackboneError
from dyntune.core.rotation import Rotation
from dyntune.core.shapes import shapes_only
from dyntune.core.tokens import Tokens
from dyntune.data.transforms import Preprocessing

PATCH_DROP = "it drops patches at random (patch_drop_rate); build it with patch_drop_rate=0"
"""Why a host is refused that does so."""
_HUBS = ("hf-hub:", "hf_hub:")
_ARGUMENTS = ("num_classes", "global_pool", "dynamic_img_size")


class TimmBackbone(Backbone):
    """What the families of timm's ViTs have in common: how they are built, and the names of what is in all of them."""

    host: Any
    arguments: ClassVar[tuple[str, ...]] = (*_ARGUMENTS, "in_chans", "img_size")

    def __init__(self, host: nn.Module) -> None:
        super().__init__(host)
        self.blocks = nn.ModuleList(self.read_blocks())  # type: ignore[assignment]

    def read_blocks(self) -> Iterator[Block]:
        """The host's blocks behind the interface, from the first to the last."""
        for index, one in enumerate(self.host.blocks):
            yield timm_blocks.block(index, one, self.host.embed_dim)

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
                f"{unreachable or first_line(error)}.{advice if download else ''}"
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
