"""Joint space-time ViTs, VideoMAE's: one set of tokens for a whole clip, each of a tubelet of two frames."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from timm.layers import trunc_normal_
from timm.models.beit import Block as BeitBlock
from torch import Tensor, nn

from dyntune.backbones import timm_blocks
from dyntune.backbones.base import Backbone
from dyntune.backbones.hosted import block_sites, fold_factors
from dyntune.backbones.origin import BackboneSource
from dyntune.backbones.sites import Site
from dyntune.core.errors import BackboneError, in_one_line, unknown_name
from dyntune.core.files import load_json
from dyntune.core.places import Places
from dyntune.core.tokens import Provenance, Tokens
from dyntune.data.clips import Sampling
from dyntune.data.transforms import Preprocessing

SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16)}
"""Width, depth and heads of VideoMAE's models."""
_NAME = "videomae_{}_patch16_224"
_FOLDER = "videomae:"
MOST_TOKENS = 65536
"""Of a clip, whose positions are computed when a model is made."""
_WHOLE = {
    "frames": ("num_frames", 4096),
    "img_size": ("image_size", 4096),
    "patch_size": ("patch_size", 256),
    "tubelet": ("tubelet_size", 64),
    "width": ("hidden_size", 4096),
    "depth": ("num_hidden_layers", 64),
    "heads": ("num_attention_heads", 256),
}
"""Arguments that are whole numbers from 1: what transformers calls each, and the highest value, well above those of
published models."""
_WIDEST_MLP = 32768
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_STRIDE = 4
"""Between two frames of VideoMAE's clips of 16."""
_RENAMED = (
    (r"^videomae\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^videomae\.encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.attention\.(query|key|value)\.bias$", lambda match: f".attn.{match[1][0]}_bias"),
    (r"\.attention\.attention\.(query|key|value)\.weight$", lambda match: f".attn.{match[1][0]}.weight"),
    (r"\.attention\.attention\.([qv]_bias)$", r".attn.\1"),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^classifier\.", "head."),
)
"""Names of transformers' tensors, as those of VideoMAE's public code."""


class SpaceTimeViT(nn.Module):
    """A ViT on tubelets of a clip, as VideoMAE: fixed sine-cosine positions, mean pooling, no class token.

    Its tensors have the names of VideoMAE's public code. The embedding is a convolution over the frames of a tubelet
    side by side, which computes what one over space and time does.

    Args:
        num_classes: of the classifier; 0 for none.
        frames: T of a clip.
        img_size: height and width of frames in pixels.
        patch_size: height and width of patches.
        tubelet: frames that a token is of.
        width: channels C.
        depth: blocks.
        heads: of each attention.
        mlp_ratio: hidden channels of the MLPs over C.
        drop_path_rate: of the last block, falling to 0 towards the first.
        eps: of the norms in the blocks.
        fc_eps: of the norm behind pooling.
    """

    def __init__(
        self,
        num_classes: int = 400,
        frames: int = 16,
        img_size: int = 224,
        patch_size: int = 16,
        tubelet: int = 2,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        eps: float = 1e-6,
        fc_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        given = (frames, img_size, patch_size, tubelet, width, depth, heads)
        for (name, (_, highest)), value in zip(_WHOLE.items(), given, strict=True):
            _whole(name, value, highest)
        if width % heads:
            raise BackboneError(f"{width} channels and {heads} heads: expected heads of equal width.")
        if frames % tubelet or img_size % patch_size:
            raise BackboneError(
                f"{frames} frames of {img_size} pixels: expected whole tubelets of {tubelet} frames and patches of "
                f"{patch_size} pixels."
            )
        tokens = frames // tubelet * (img_size // patch_size) ** 2
        if tokens > MOST_TOKENS:
            raise BackboneError(
                f"{frames} frames of {img_size} pixels are {tokens} tokens; expected at most {MOST_TOKENS}. Give "
                "fewer frames, or smaller ones."
            )
        self.frames, self.tubelet, self.img_size = frames, tubelet, img_size
        self.rows = img_size // patch_size
        self.slices = frames // tubelet
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3 * tubelet, width, patch_size, patch_size)})
        positions = sine_cosine(self.slices * self.rows**2, width)
        self.register_buffer("pos_embed", positions, persistent=False)
        rates = torch.linspace(0, drop_path_rate, depth).tolist() if drop_path_rate else [0.0] * depth
        norm = partial(nn.LayerNorm, eps=eps)
        self.blocks = nn.ModuleList(
            BeitBlock(width, heads, qkv_bias=True, mlp_ratio=mlp_ratio, drop_path=rate, norm_layer=norm)
            for rate in rates
        )
        self.fc_norm = nn.LayerNorm(width, eps=fc_eps)
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def embed(self, clips: Tensor) -> Tensor:
        """Clips ``(B, T, 3, H, W)`` to tokens with their positions, ``(B, T / tubelet * rows * columns, C)``."""
        tubes = clips.unflatten(1, (self.slices, self.tubelet)).transpose(2, 3)  # (B, S, 3, tubelet, H, W)
        x = self.patch_embed["proj"](tubes.flatten(0, 1).flatten(1, 2)).flatten(2).mT
        return x.unflatten(0, (-1, self.slices)).flatten(1, 2) + self.pos_embed

    def forward(self, clips: Tensor) -> Tensor:
        """Clips ``(B, T, 3, height, width)`` to logits ``(B, classes)``."""
        x = self.embed(clips)
        for block in self.blocks:
            x = block(x)
        return self.head(self.fc_norm(x.mean(1)))


def sine_cosine(count: int, width: int) -> Tensor:
    """Fixed positions ``(1, count, width)``: sines in even channels, cosines in odd ones, of the token's number."""
    rates = 10_000 ** (-2 * torch.arange(width).div(2, rounding_mode="floor").double() / width)
    angles = torch.arange(count).double()[:, None] * rates
    return torch.where(torch.arange(width) % 2 == 0, angles.sin(), angles.cos()).float()[None]


class SpaceTime(Backbone):
    """A ``SpaceTimeViT`` as a backbone; its grid has the slices of a clip one above the other.

    Args:
        host: the model; used as it is, its parameters stay where they are.
    """

    host: SpaceTimeViT
    supported: ClassVar[str] = "SpaceTimeViT, VideoMAE's joint space-time ViT, for clips"
    prefix: ClassVar[str] = "videomae"
    arguments: ClassVar[tuple[str, ...]] = ("num_classes", "frames", "img_size")

    def __init__(self, host: nn.Module) -> None:
        super().__init__(host)
        self.blocks = nn.ModuleList(  # type: ignore[assignment]
            timm_blocks.block(index, block, self.host.fc_norm.normalized_shape[0])
            for index, block in enumerate(self.host.blocks)
        )
        self._checkpointing = False

    @classmethod
    def knows(cls, host: nn.Module) -> bool:
        return isinstance(host, SpaceTimeViT)

    @classmethod
    def create(
        cls, name: str, *, weights: str | Path | None = None, pretrained: bool = True, **arguments: Any
    ) -> nn.Module:
        """A VideoMAE by its name, with weights from a file of its public code, or from a folder of transformers."""
        if "img_size" in arguments:
            arguments["img_size"] = _side(arguments["img_size"])
        if name.startswith(_FOLDER):
            folder = Path(name.removeprefix(_FOLDER)).expanduser()
            shape = _shape(folder) | arguments
            try:
                host = SpaceTimeViT(**shape)
            except BackboneError as error:
                raise BackboneError(f"{folder}: {error}") from error
            host.__dict__["_name"] = f"{_FOLDER}{folder.resolve()}"
            host.__dict__["_pixels"] = _pixels(folder)
            weights = weights or folder
        else:
            names = {_NAME.format(size): shape for size, shape in SIZES.items()}
            if name not in names:
                raise BackboneError(
                    f"{unknown_name('joint model', name, names)} Or {_FOLDER}FOLDER, of one that transformers saved."
                )
            width, depth, heads = names[name]
            host = SpaceTimeViT(**{"width": width, "depth": depth, "heads": heads} | arguments)
            host.__dict__["_name"] = name
        if pretrained:
            if weights is None:
                raise BackboneError(
                    f"{name}: no weights to download. Give a file of VideoMAE's public code (--weights FILE.pth), or "
                    f"a folder of transformers ({_FOLDER}FOLDER)."
                )
            load_weights(host, Path(weights))
        return host

    def origin(self) -> BackboneSource:
        name = self.host.__dict__.get("_name")
        if name is None:
            return BackboneSource(None)
        own = {"num_classes": self.classes, "frames": self.host.frames, "img_size": self.host.img_size}
        return BackboneSource(name, own)

    def preprocessing(self) -> Preprocessing:
        mean, std = self.host.__dict__.get("_pixels", _IMAGENET)
        return Preprocessing(self.image_shape[1:], mean, std, "bilinear", Sampling(self.host.frames, _STRIDE))

    def all_sites(self) -> Iterator[Site]:
        yield Site("patch", None, "patch_embed.proj", self.host.patch_embed, "proj")
        for block in self.blocks:
            yield from block_sites(block)
        yield Site("norm", None, "fc_norm", self.host, "fc_norm")

    def embed(self, images: Tensor) -> Tokens:
        if tuple(images.shape[1:]) != self.input_shape:
            raise BackboneError(
                f"expected clips of shape (B, {', '.join(map(str, self.input_shape))}); given {tuple(images.shape)}."
            )
        return Tokens(self.host.embed(images), 0, self.grid, provenance=Provenance(), places=Places())

    def finish(self, tokens: Tokens) -> Tokens:
        return tokens.without_prompts()

    def readout(self, tokens: Tokens) -> Tensor:
        return self.host.head(self.pooled(tokens))

    def pooled(self, tokens: Tokens) -> Tensor:
        return self.host.fc_norm(tokens.mean)

    def reset_classifier(self, classes: int) -> None:
        head = nn.Linear(self.host.fc_norm.normalized_shape[0], classes) if classes else nn.Identity()
        if isinstance(head, nn.Linear):
            trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.host.head = head

    @property
    def head_reads_grid(self) -> bool:
        return False

    @property
    def read_first(self) -> int | None:
        return None

    @property
    def class_token(self) -> bool:
        return False

    @property
    def heads(self) -> tuple[nn.Module, ...]:
        return (self.host.head,)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 3, self.host.img_size, self.host.img_size

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.host.frames, *self.image_shape

    @property
    def grid(self) -> tuple[int, int]:
        return self.host.slices * self.host.rows, self.host.rows

    @property
    def slices(self) -> int:
        return self.host.slices

    @property
    def gradient_checkpointing(self) -> bool:
        return self._checkpointing and torch.is_grad_enabled()

    def switch_gradient_checkpointing(self, on: bool) -> None:
        self._checkpointing = on

    def fold_factors(self) -> None:
        fold_factors(self.blocks)


def load_weights(host: SpaceTimeViT, path: Path) -> None:
    """Loads a file of VideoMAE's public code, or a folder or file of transformers, in place; nothing is unpickled.

    A classifier that does not fit is left as it is, and so is a pretraining's decoder.

    Raises:
        BackboneError: it is missing or unreadable, or does not hold every tensor of the model.
    """
    file = path if path.is_file() else next(iter(sorted(path.glob("*.safetensors"))), path / "pytorch_model.bin")
    if not file.is_file():
        raise BackboneError(f"no weights at {path}. Expected a .pth or .safetensors file, or a folder of transformers.")
    try:
        if file.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
            state = next((state[key] for key in ("model", "module") if key in state), state)
        state = _public_names(state)
    except Exception as error:
        raise BackboneError(f"cannot read weights from {file}: {in_one_line(error)}.") from error
    own = host.state_dict()
    own_proj = own["patch_embed.proj.weight"]
    proj = state.get("patch_embed.proj.weight")
    if proj is not None and proj.ndim == 5:
        state["patch_embed.proj.weight"] = proj.flatten(1, 2)
    fitting = {name: tensor for name, tensor in state.items() if name in own and own[name].shape == tensor.shape}
    optional = {"fc_norm.weight", "fc_norm.bias"} if any(name.startswith("decoder.") for name in state) else set()
    missing = sorted(
        name for name in own if name not in fitting and not name.startswith("head.") and name not in optional
    )
    if missing:
        raise BackboneError(
            f"the weights in {file} do not fit the model (width {own_proj.shape[0]}, {len(host.blocks)} blocks, "
            f"tubelets of {host.tubelet}): missing or of another shape: {', '.join(missing[:5])}."
        )
    spoilt = sorted(name for name, tensor in fitting.items() if not bool(tensor.isfinite().all()))
    if spoilt:
        raise BackboneError(f"the weights in {file} are not finite in {', '.join(spoilt[:5])}. Give others.")
    host.load_state_dict(fitting, strict=False)


def _public_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the names of VideoMAE's public code; queries, keys and values in one map."""
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = re.sub(r"^(encoder|backbone)\.", "", name)
        for pattern, new in _RENAMED:
            name = re.sub(pattern, new, name)
        named[name] = tensor
    for name in [name for name in named if name.endswith(".attn.q.weight")]:
        place = name.removesuffix("q.weight")
        named[f"{place}qkv.weight"] = torch.cat([named.pop(f"{place}{part}.weight") for part in "qkv"])
    return named


def _shape(folder: Path) -> dict[str, Any]:
    """The arguments of a model that transformers has saved."""
    file = folder / "config.json"
    try:
        config = load_json(file)
        if config["model_type"] != "videomae":
            raise BackboneError(f"{folder} holds a {config['model_type']}; expected a videomae.")
        if not config.get("use_mean_pooling", True) or not config.get("qkv_bias", True):
            raise BackboneError(
                f"{folder}: a model without mean pooling, or without biases in attention, is not supported."
            )
        if config.get("hidden_act", "gelu") != "gelu":
            raise BackboneError(f"{folder}: its activation is {config['hidden_act']}; expected gelu.")
        config["image_size"] = _side(config["image_size"])
        shape = {own: _whole(f"{file}: {key}", config[key], highest) for own, (key, highest) in _WHOLE.items()}
        hidden = _whole(f"{file}: intermediate_size", config["intermediate_size"], _WIDEST_MLP)
        eps = config.get("layer_norm_eps", 1e-12)
        if not isinstance(eps, float) or not 0 < eps < 1:
            raise BackboneError(f"{file}: layer_norm_eps is {eps!r:.40}; expected a number between 0 and 1.")
        return {
            **shape,
            "num_classes": len(config["id2label"]) if config.get("id2label") else 0,
            "mlp_ratio": hidden / shape["width"],
            "eps": eps,
            "fc_eps": 1e-5,
        }
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        if isinstance(error, BackboneError):
            raise
        raise BackboneError(
            f"{folder} is no folder of a VideoMAE that transformers saved ({error!r}). Expected config.json in it."
        ) from error


def _side(size: Any) -> Any:
    """One number for two equal ones; anything else as it is."""
    return size[0] if isinstance(size, list | tuple) and len(size) == 2 and size[0] == size[1] else size


def _whole(name: str, value: Any, highest: int) -> int:
    """A value that is a whole number from 1 to ``highest``; raises BackboneError for another."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= highest:
        square = ", or two that are equal" if name.endswith(("img_size", "image_size")) else ""
        raise BackboneError(f"{name} is {value!r:.40}; expected a whole number from 1 to {highest}{square}.")
    return value


def _pixels(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation that a folder's processor gives, or those of ImageNet."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        values = load_json(folder / "preprocessor_config.json")
        return tuple(map(float, values["image_mean"])), tuple(map(float, values["image_std"]))
    return _IMAGENET
