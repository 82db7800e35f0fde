"""Vision towers of Hugging Face's transformers, whose modules are found by what they do: their names have changed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyntune.backbones import huggingface_models as models
from dyntune.backbones import huggingface_processor as processors
from dyntune.backbones.base import Backbone
from dyntune.backbones.hosted import block_sites, fold_factors
from dyntune.backbones.huggingface_blocks import found, has, join, read_block
from dyntune.backbones.origin import BackboneSource
from dyntune.backbones.sites import Changed, Site
from dyntune.core.attention import bias_of
from dyntune.core.errors import BackboneError
from dyntune.core.places import Places
from dyntune.core.rotation import Rotation
from dyntune.core.tokens import Provenance, Tokens
from dyntune.data.transforms import Preprocessing

_TOWERS = ("tower", "vit", "deit", "dinov2", "dinov2_with_registers", "vision_model")
"""What a module that holds the tower may call it."""
_BLOCKS = ("layers", "encoder.layer", "encoder.layers", "model.layer", "layer")
_NORMS = ("layernorm", "norm", "post_layernorm")
_BIASES: dict[str, Callable[[Any], Sequence[Site]]] = {
    "qkv_bias": lambda block: block.attn.maps,
    "query_bias": lambda block: block.attn.maps[:1],
    "key_bias": lambda block: block.attn.maps[1:2],
    "value_bias": lambda block: block.attn.maps[2:],
    "proj_bias": lambda block: [block.attn.out],
    "mlp_bias": lambda block: [*block.mlp.maps, block.mlp.out],
}
"""Options of configurations that say whether maps have a bias, and the maps of a block."""
_HEADS = ("classifier", "cls_classifier", "distillation_classifier")

_CLASSES = {
    *(name for pair in models.MODELS.values() for name in pair if name),
    models.TowerClassifier.__name__,
    "DeiTForImageClassificationWithTeacher",
    "CLIPVisionTransformer",
    "SiglipVisionTransformer",
    "Siglip2VisionTransformer",
}
"""Hosts: the last three are what two-tower models of transformers 4 call their ``vision_model``."""


class HuggingFace(Backbone):
    """A ViT, DeiT, DINOv2, DINOv3, CLIP or SigLIP vision tower of transformers, with its classifier or without.

    The tensors of its host are saved under names that say what they do, ``host.blocks.3.attn.q.weight``, so that a run
    can be read with another version of transformers than the one that it was trained with.

    Args:
        host: the model; used as it is, its parameters stay where they are.
    """

    host: Any
    supported: ClassVar[str] = (
        "of transformers, image classifiers of ViT, DeiT, Dinov2, Dinov2WithRegisters, CLIP, Siglip and Siglip2, and "
        "the vision towers of all but the first two, and of DINOv3ViT"
    )
    prefix: ClassVar[str] = models.PREFIX
    arguments: ClassVar[tuple[str, ...]] = ("num_classes", "img_size", "pool", "revision")

    def __init__(self, host: nn.Module) -> None:
        super().__init__(host)
        self._path = _tower_path(host) or ""
        self._config = self.tower.config
        self.kind = str(self._config.model_type)
        embeddings = self.tower.embeddings
        patch, _ = found(embeddings, ("patch_embeddings.projection", "patch_embeddings", "patch_embedding"))
        parent, _, name = patch.rpartition(".")
        self._patch = embeddings.get_submodule(parent), name
        self._roles = {self._path: "", **{name: name.replace("classifier", "head") for name in _HEADS}}
        self._roles[join(self._path, "embeddings", patch)] = "patch_embed.proj"
        self._roles[join(self._path, "head")] = "attn_pool"
        blocks_path, blocks = found(self.tower, _BLOCKS)
        self.blocks = nn.ModuleList(  # type: ignore[assignment]
            read_block(index, block, join(self._path, blocks_path, str(index)), self._config, self._roles)
            for index, block in enumerate(blocks)
        )
        norm = next((name for name in _NORMS if hasattr(self.tower, name)), None)
        assert norm is not None
        self._norm = norm
        self._roles[join(self._path, norm)] = "norm"
        self._layers = tuple(blocks)
        self._resizes = "interpolate_pos_encoding" in inspect.signature(type(embeddings).forward).parameters
        self._size = self._image_size()

    @property
    def tower(self) -> Any:
        """The host's module with embeddings, blocks and last norm."""
        return self.host.get_submodule(self._path)

    @classmethod
    def knows(cls, host: nn.Module) -> bool:
        if isinstance(host, models.TowerClassifier):
            return True
        return any(base.__module__.startswith("transformers.models.") for base in type(host).__mro__)

    @classmethod
    def refusal(cls, host: nn.Module) -> str | None:
        name = type(host).__name__
        if name in ("CLIPModel", "SiglipModel", "Siglip2Model"):
            return "it has a text tower too; give its vision tower (model.vision_model)"
        path = _tower_path(host)
        if path is None or getattr(host.get_submodule(path).config, "model_type", None) not in models.MODELS:
            return "it is another kind of model"
        if not _CLASSES & {base.__name__ for base in type(host).__mro__}:
            return f"{name} is no image classifier and no tower; give the ...ForImageClassification of this model"
        if name.endswith("VisionModel") and models.without_pool(host):
            return "it has no attention pool (vision_use_head=False); take add_classifier(tower, classes, pool='avg')"
        if getattr(host, "is_quantized", False) or getattr(host, "quantization_method", None):
            return "its weights are quantised"
        if any(isinstance(module, Changed) for module in host.modules()):
            return "another tuned model has changed its modules; build a backbone for each"
        return None

    @classmethod
    def create(
        cls, name: str, *, weights: str | Path | None = None, pretrained: bool = True, **arguments: Any
    ) -> nn.Module:
        return models.create(name, weights=weights, pretrained=pretrained, **arguments)

    def origin(self) -> BackboneSource:
        holder = getattr(self.host, "tower", self.host)
        place = getattr(holder, "name_or_path", "")
        if not place or not models.as_read(holder, place):
            return BackboneSource(None)
        local = Path(place).is_dir()
        arguments: dict[str, Any] = {"num_classes": self.classes}
        if hasattr(self.host, "dyntune_image_size"):
            arguments["img_size"] = list(self.host.dyntune_image_size)
        if isinstance(self.host, models.TowerClassifier):
            arguments["pool"] = self.host.pool
        revision = processors.revision_of(holder)
        if revision and not local:
            arguments["revision"] = revision
        return BackboneSource(f"{self.prefix}{Path(place).resolve() if local else place}", arguments)

    def preprocessing(self) -> Preprocessing:
        return processors.preprocessing(getattr(self.host, "tower", self.host), self.kind, self.image_shape[1:])

    @property
    def config(self) -> Any:
        return self.host.config

    @property
    def class_names(self) -> tuple[str, ...] | None:
        names = models.class_names(self.host.config)
        return names if names is not None and len(names) == self.classes else None

    def saved_name(self, name: str) -> str:
        place, _, own = name.partition(".")
        if place != "host":
            return super().saved_name(name)
        # The longest path that is known; the rest of the name is what a method or another library has put there.
        path, rest = own, ""
        while path and path not in self._roles:
            path, _, last = path.rpartition(".")
            rest = join(last, rest)
        return join(place, self._roles.get(path, ""), rest)

    def host_name(self, saved: str) -> str:
        named = {role: path for path, role in self._roles.items() if has(self.host, path)}
        role, rest = saved, ""
        while role and role not in named:
            role, _, last = role.rpartition(".")
            rest = join(last, rest)
        return join(named.get(role, ""), rest)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in super().weights():
            if ".gate_fc1." in name:
                for own, part in zip(("gate", "fc1"), tensor.chunk(2), strict=True):
                    yield name.replace("gate_fc1", own), part
            else:
                yield name, tensor

    def embed(self, images: Tensor) -> Tokens:
        channels, height, width = self.image_shape
        if images.ndim != 4 or images.shape[1] != channels:
            raise BackboneError(f"expected images of shape (B, {channels}, {height}, {width}); given {images.shape}.")
        size = tuple(images.shape[2:])
        if size != (height, width) and not self._any_size:
            raise BackboneError(
                f"the backbone takes images of {height} x {width} pixels; given {size}. Resize the images, or build "
                'the backbone for them: --img-size, or create_backbone("hf:...", img_size=...) in Python.'
            )
        rows, columns = self._grid_of(images)
        embeddings = self.tower.embeddings
        if self.kind.startswith("siglip2"):
            x = embeddings.patch_embedding(self._flattened(images)) + self._positions(rows, columns)
        elif self._resizes:
            x = embeddings(images, interpolate_pos_encoding=size != _pair(self._config.image_size))
        else:
            x = embeddings(images)
        if hasattr(self.tower, "pre_layrnorm"):
            x = self.tower.pre_layrnorm(x)
        return Tokens(
            x,
            models.prefix_tokens(self._config),
            (rows, columns),
            provenance=Provenance(),
            places=Places(),
            rotation=self._rotation(rows, columns),
        )

    def _grid_of(self, images: Tensor) -> tuple[int, int]:
        height, width = images.shape[2:]
        return int(height) // self._patch_size[0], int(width) // self._patch_size[1]

    def _positions(self, rows: int, columns: int) -> Tensor:
        """SigLIP 2's embeddings of positions ``(P, C)``, which its own forward pass resizes for each image anew."""
        embeddings = self.tower.embeddings
        side = embeddings.position_embedding_size
        table = embeddings.position_embedding.weight
        if (rows, columns) == (side, side):
            return cast(Tensor, table)
        grid = table.float().unflatten(0, (side, side)).permute(2, 0, 1)[None]
        resized = F.interpolate(grid, (rows, columns), mode="bilinear", align_corners=False, antialias=True)
        return resized[0].flatten(1).T.to(table.dtype)

    def _flattened(self, images: Tensor) -> Tensor:
        """Images as rows of patches, each flattened by row, column and channel: ``(B, P, p p 3)``."""
        patch = self._patch_size[0]
        tiles = images.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, 3, rows, columns, p, p)
        return tiles.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)

    def _rotation(self, rows: int, columns: int) -> Rotation | None:
        """By how much DINOv3 rotates each patch: by where its centre lies between -1 and 1, never at random."""
        rope = getattr(self.tower, "rope_embeddings", None)
        if rope is None:
            return None
        frequencies = rope.inv_freq.float()
        centres = [(torch.arange(n, device=frequencies.device) + 0.5) / n * 2 - 1 for n in (rows, columns)]
        places = torch.stack(torch.meshgrid(*centres, indexing="ij"), dim=-1).flatten(0, 1)  # (P, 2)
        angles = (2 * math.pi * places.unsqueeze(-1) * frequencies).flatten(1).tile(2)
        return Rotation(torch.cat([angles.sin(), angles.cos()], dim=-1)[None, :, None], half=True)

    @property
    def _pooled(self) -> str:
        """What the head reads: ``token``, ``token+avg``, ``avg``, or ``probe``, SigLIP's attention pool."""
        if isinstance(self.host, models.TowerClassifier):
            pool = str(self.host.pool)
        elif self.heads:
            mean = {"dinov2": "token+avg", "dinov2_with_registers": "token+avg"}
            pool = mean.get(self.kind, "token" if self.kind in ("vit", "deit") else "avg")
        else:
            pool = "token"
        return pool.replace("token", "probe") if self.kind.startswith("siglip") else pool

    @property
    def _distilled(self) -> bool:
        """Whether there is a classifier for the distillation token too."""
        return hasattr(self.host, "distillation_classifier")

    @property
    def _any_size(self) -> bool:
        """Whether the host itself takes images of any size."""
        return self.kind.startswith("dino")

    @property
    def _norm_behind(self) -> bool:
        """Whether the last norm sees the pooled output alone, or nothing, as CLIP's."""
        return self.kind.startswith("clip")

    def finish(self, tokens: Tokens) -> Tokens:
        if self._norm_behind:
            return tokens.without_prompts()
        # The norm sees the prompts too, as it does in the other families.
        return tokens.with_x(getattr(self.tower, self._norm)(tokens.x)).without_prompts()

    def readout(self, tokens: Tokens) -> Tensor:
        features = self.pooled(tokens)
        if self._distilled:
            return (self.host.cls_classifier(features) + self.host.distillation_classifier(tokens.x[:, 1])) / 2
        return self.host.classifier(features) if self.heads else features

    def pooled(self, tokens: Tokens) -> Tensor:
        read = []
        if "token" in self._pooled:
            token = tokens.x[:, 0]
            read.append(getattr(self.tower, self._norm)(token) if self._norm_behind else token)
        if "probe" in self._pooled:
            read.append(self._probe(tokens))
        if "avg" in self._pooled:
            weights = tokens.provenance.weights
            patches = tokens.patches
            if weights is None:
                read.append(patches.mean(1))
            else:
                weights = weights.to(patches.dtype).unsqueeze(-1)
                read.append((patches * weights).sum(1) / weights.sum(1))
        return torch.cat(read, dim=1)

    @property
    def prefix_tokens(self) -> int:
        return models.prefix_tokens(self._config)

    def reset_classifier(self, classes: int) -> None:
        names = [name for name in _HEADS if hasattr(self.host, name)]
        if not names:
            raise BackboneError(
                f"{type(self.host).__name__} has no classifier to replace. Put one on it before tune: "
                "dyntune.add_classifier(model, classes)."
            )
        for name in names:
            width = self._read_width if len(names) == 1 else self.blocks[-1].width
            setattr(self.host, name, models.new_classifier(width, classes))
        self.host.config.num_labels = classes

    @property
    def _read_width(self) -> int:
        """Channels of what ``pooled`` gives."""
        return self.blocks[-1].width * (1 + ("+" in self._pooled))

    @property
    def poolers(self) -> tuple[nn.Module, ...]:
        behind = getattr(self.tower, self._norm) if self._norm_behind and "token" in self._pooled else None
        head = self.tower.head if "probe" in self._pooled else None
        return tuple(module for module in (behind, head) if module is not None)

    def _probe(self, tokens: Tokens) -> Tensor:
        """SigLIP's attention pool, ``(B, C)``, in which tokens count by their weights."""
        head, x = self.tower.head, tokens.x
        weights, mask = tokens.provenance.weights, None
        if weights is not None:
            logs = bias_of(weights, x.dtype)
            mask = logs.repeat_interleave(head.attention.num_heads, dim=0).unsqueeze(1)
        read = head.attention(head.probe.expand(x.shape[0], -1, -1), x, x, attn_mask=mask, need_weights=False)[0]
        return (read + head.mlp(head.layernorm(read)))[:, 0]

    @property
    def passes(self) -> tuple[nn.Module, ...]:
        steps = self._path.split(".") if self._path else []
        return tuple(self.host.get_submodule(".".join(steps[:count])) for count in range(len(steps) + 1))

    def host_logits(self, images: Tensor) -> Tensor:
        inputs = {"pixel_values": images}
        if self.kind.startswith("siglip2"):
            patches = self._flattened(images)
            inputs = {
                "pixel_values": patches,
                "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long, device=images.device),
                "spatial_shapes": torch.tensor([self._grid_of(images)] * len(images)),
            }
        elif self._resizes and tuple(images.shape[2:]) != _pair(self._config.image_size):
            inputs["interpolate_pos_encoding"] = True  # type: ignore[assignment]
        output = self.host(**inputs)
        return output.logits if hasattr(output, "logits") else output.pooler_output

    def answer(self, loss: Tensor | None, logits: Tensor) -> Any:
        return models.library().modeling_outputs.ImageClassifierOutput(loss=loss, logits=logits)

    @property
    def head_reads_grid(self) -> bool:
        return False

    @property
    def read_first(self) -> int | None:
        if self._pooled != "token":
            return None
        return 2 if self._distilled else 1

    @property
    def class_token(self) -> bool:
        return not self.kind.startswith("siglip")

    @property
    def idle(self) -> tuple[nn.Parameter, ...]:
        unread: list[Any] = [getattr(self.tower.embeddings, "mask_token", None)]
        if self._norm_behind and "token" not in self._pooled:
            unread.extend(getattr(self.tower, self._norm).parameters())
        if hasattr(self.tower, "head") and "probe" not in self._pooled:
            unread.extend(self.tower.head.parameters())
        return tuple(parameter for parameter in unread if parameter is not None)

    def fold(self) -> dict[str, str]:
        stays = super().fold()
        self.describe_fold()
        return stays

    def describe_fold(self) -> None:
        # A bias that a fold has given a map is read from a file only if the configuration names it.
        for option, maps in _BIASES.items():
            if hasattr(self._config, option):
                modules = [site.module for block in self.blocks for site in maps(block)]
                setattr(self._config, option, any(getattr(module, "bias", None) is not None for module in modules))

    def fold_factors(self) -> None:
        fold_factors(self.blocks)

    def all_sites(self) -> Iterator[Site]:
        owner, name = self._patch
        yield Site("patch", None, "patch_embed.proj", owner, name)
        for block in self.blocks:
            yield from block_sites(block)
        if not self._norm_behind or "token" in self._pooled:
            yield Site("norm", None, "norm", self.tower, self._norm)

    @property
    def heads(self) -> tuple[nn.Module, ...]:
        return tuple(getattr(self.host, name) for name in _HEADS if hasattr(self.host, name))

    @property
    def _patch_size(self) -> tuple[int, int]:
        return _pair(self._config.patch_size)

    def _image_size(self) -> tuple[int, int]:
        size = getattr(self.host, "dyntune_image_size", None)
        if size is None and self._any_size:  # most of these are used at another size than that of their configuration
            size = processors.processor_size(getattr(self.host, "tower", self.host))
        if size is None and self.kind.startswith("siglip2"):
            size = (math.isqrt(self._config.num_patches) * self._patch_size[0],) * 2
        return size or _pair(self._config.image_size)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return int(self._config.num_channels), *self._size

    @property
    def grid(self) -> tuple[int, int]:
        _, height, width = self.image_shape
        return height // self._patch_size[0], width // self._patch_size[1]

    @property
    def gradient_checkpointing(self) -> bool:
        return torch.is_grad_enabled() and any(
            getattr(layer, "gradient_checkpointing", False) for layer in self._layers
        )

    def switch_gradient_checkpointing(self, on: bool) -> None:
        holder = getattr(self.host, "tower", self.host)
        word = "enable" if on else "disable"
        # The first name is that of transformers 5.24 and later.
        switch = getattr(holder, f"activation_checkpointing_{word}", None)
        (switch or getattr(holder, f"gradient_checkpointing_{word}"))()


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _tower_path(host: nn.Module) -> str | None:
    """Where the module with embeddings, blocks and last norm is, from the host; None if there is none."""
    path, module = "", host
    while not hasattr(module, "embeddings"):
        name = next((name for name in _TOWERS if hasattr(module, name)), None)
        if name is None:
            return None
        path, module = join(path, name), getattr(module, name)
    return path
