"""Clips on image models: each frame goes through the image model by itself, and a temporal head reads all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.backbones.hosts import create_backbone, recorded, wrap_plain
from dyntune.backbones.origin import CLIPS, BackboneSource
from dyntune.backbones.sites import Site
from dyntune.backbones.temporal import temporal_head
from dyntune.core.errors import BackboneError
from dyntune.core.tokens import Tokens
from dyntune.data.clips import Sampling
from dyntune.data.transforms import Preprocessing

_MODEL, _HEAD = "vit", "temporal"
"""Names of the two parts of the host."""


class ClipHost(nn.Module):
    """What hosts of clips have that an image model's blocks are in.

    Attributes:
        vit: the image model.
        frames: T of a clip.
        temporal: what is new beside it.
    """

    vit: nn.Module
    frames: int
    temporal: Any

    def forward(self, clips: Tensor) -> Tensor:
        """Clips ``(B, T, 3, height, width)`` to logits ``(B, classes)``."""
        backbone = self._interface()
        tokens = backbone.embed(clips)
        for block in backbone.blocks:
            tokens = block.enter(tokens)
            tokens = tokens.with_x(tokens.x + block.update(tokens))
        return backbone.readout(backbone.finish(tokens))

    def _interface(self) -> Backbone:
        """This model behind the interface, made once; a shallow copy makes its own."""
        made: Backbone | None = self.__dict__.get("_made")
        if made is None or made.host is not self:
            made = wrap_plain(self)
            object.__setattr__(self, "_made", made)  # no child, for this model is one of its
        return made


class ClipClassifier(ClipHost):
    """An image model on each frame of a clip, a temporal head over the frames, and the image model's classifier.

    Args:
        vit: the image model, of any family of hosts, with its classifier; used as it is.
        frames: T of a clip.
        temporal: the head, ``mean``, ``attentive`` or ``mixer``; see ``dyntune.backbones.temporal``.
        time: ``learned`` or ``none``, whether the head learns a vector for each place in time; by default it does
            where the head is no mean. With ``attentive`` and ``none`` it is that of DyT's public code for videos.

    Raises:
        BackboneError: the model is not supported, or its classifier does not read one vector.
    """

    def __init__(self, vit: nn.Module, frames: int = 8, temporal: str = "attentive", time: str | None = None) -> None:
        super().__init__()
        inner = wrap_plain(vit)
        linear = [head for head in inner.heads if isinstance(head, nn.Linear)]
        if len(inner.heads) > 1 or inner.head_reads_grid:
            raise BackboneError(
                f"{type(vit).__name__} has {len(inner.heads)} linear classifiers"
                f"{', which read every patch' if inner.head_reads_grid else ''}; a clip needs one that reads one "
                "vector. Build a model without distillation, with global_pool='token' or 'avg'."
            )
        own, attention = inner.blocks[-1].width, inner.blocks[0].attn
        width = linear[0].in_features if linear else own
        if temporal == "attentive" and width != own:
            raise BackboneError(
                f"the classifier of {type(vit).__name__} reads {width} channels, but its tokens have {own}, so that it "
                "cannot read an attentive head's. Give temporal=mixer."
            )
        self.vit = inner.host
        self.frames = frames
        self.temporal = temporal_head(temporal, time, frames, width, width // attention.head_width)
        like = next(vit.parameters())
        self.temporal.to(device=like.device, dtype=like.dtype)


class Frames(Backbone):
    """A ``ClipClassifier`` as a backbone: to methods and policies it is the image model, on B T images.

    The image model's tensors are saved under the names that they have without clips.

    Args:
        host: the model; used as it is, its parameters stay where they are.
    """

    host: ClipHost
    inner: Backbone
    kind: ClassVar[type[ClipHost]] = ClipClassifier
    supported: ClassVar[str] = "ClipClassifier of any other family, for clips"
    prefix: ClassVar[str] = CLIPS
    arguments: ClassVar[tuple[str, ...]] = ("frames", "temporal", "time")

    def __init__(self, host: nn.Module) -> None:
        assert isinstance(host, self.kind)
        inner = wrap_plain(host.vit)
        super().__init__(host)
        self.blocks = inner.blocks
        # Not registered: its host and blocks are.
        object.__setattr__(self, "inner", inner)

    @classmethod
    def knows(cls, host: nn.Module) -> bool:
        return isinstance(host, cls.kind)

    @classmethod
    def create(
        cls, name: str, *, weights: str | Path | None = None, pretrained: bool = True, **arguments: Any
    ) -> nn.Module:
        own = {key: arguments.pop(key) for key in cls.arguments if key in arguments}
        name = name.removeprefix(cls.prefix)
        return cls.kind(create_backbone(name, weights=weights, pretrained=pretrained, **arguments), **own)

    @classmethod
    def recorded(cls, name: str) -> tuple[str, ...]:
        return *cls.arguments, *recorded(name.removeprefix(cls.prefix))

    def origin(self) -> BackboneSource:
        source, head = self.inner.origin(), self.host.temporal
        if source.name is None:
            return source
        time = "none" if head.time is None else "learned"
        own = {"frames": self.host.frames, "temporal": type(head).__name__.lower(), "time": time}
        return BackboneSource(f"{self.prefix}{source.name}", own | source.arguments, source.weights)

    def preprocessing(self) -> Preprocessing:
        return replace(self.inner.preprocessing(), clip=Sampling(self.host.frames))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.inner.train(mode)  # behind it: what the family keeps in eval mode stays so
        return self

    def all_sites(self) -> Iterator[Site]:
        return self.inner.all_sites()

    def embed(self, images: Tensor) -> Tokens:
        self.check_clips(images)
        return self.inner.embed(images.flatten(0, 1))

    def check_clips(self, images: Tensor) -> None:
        """Checks that there are as many frames as the host takes.

        Raises:
            BackboneError: there are not.
        """
        if images.ndim != 5 or images.shape[1] != self.host.frames:
            frames, channels, height, width = self.input_shape
            raise BackboneError(
                f"expected clips of shape (B, {frames}, {channels}, {height}, {width}); given {tuple(images.shape)}."
            )

    def finish(self, tokens: Tokens) -> Tokens:
        return self.inner.finish(tokens)

    def readout(self, tokens: Tokens) -> Tensor:
        features = self.pooled(tokens)
        return self.heads[0](features) if self.heads else features

    def pooled(self, tokens: Tokens) -> Tensor:
        head, clips = self.host.temporal, (-1, self.host.frames)
        if not head.reads_tokens:
            return head(self.inner.pooled(tokens).unflatten(0, clips))
        weights = tokens.provenance.weights
        if weights is not None:
            weights = tokens.cover_prefix(weights).unflatten(0, clips)
        return head(tokens.x.unflatten(0, clips), weights)

    @property
    def prefix_tokens(self) -> int:
        return self.inner.prefix_tokens

    def unpooled(self, tokens: Tokens) -> Tensor:
        return self.inner.unpooled(tokens).unflatten(0, (-1, self.host.frames))

    def as_finished(self, x: Tensor) -> Tokens:
        if x.ndim < 4 or x.shape[1] != self.host.frames:
            raise BackboneError(
                f"expected tokens of each frame, (B, {self.host.frames}, N, C), as forward_features gives them; given "
                f"{tuple(x.shape)}."
            )
        return self.inner.as_finished(x.flatten(0, 1))

    def reset_classifier(self, classes: int) -> None:
        self.inner.reset_classifier(classes)

    @property
    def passes(self) -> tuple[nn.Module, ...]:
        return self.host, *self.inner.passes

    @property
    def head_reads_grid(self) -> bool:
        return False

    @property
    def read_first(self) -> int | None:
        return None if self.host.temporal.reads_tokens else self.inner.read_first

    @property
    def class_token(self) -> bool:
        return self.inner.class_token

    @property
    def heads(self) -> tuple[nn.Module, ...]:
        return self.inner.heads

    @property
    def necks(self) -> tuple[nn.Module, ...]:
        return (self.host.temporal,)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.inner.image_shape

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.host.frames, *self.image_shape

    @property
    def grid(self) -> tuple[int, int]:
        return self.inner.grid

    @property
    def gradient_checkpointing(self) -> bool:
        return self.inner.gradient_checkpointing

    def switch_gradient_checkpointing(self, on: bool) -> None:
        self.inner.switch_gradient_checkpointing(on)

    @property
    def idle(self) -> tuple[nn.Parameter, ...]:
        unread = self.inner.poolers if self.host.temporal.reads_tokens else ()
        return *self.inner.idle, *(parameter for module in unread for parameter in module.parameters())

    def saved_name(self, name: str) -> str:
        place, _, own = name.partition(".")
        part, _, rest = own.partition(".")
        return self.inner.saved_name(f"host.{rest}" if place == "host" and part == _MODEL else name)

    def host_name(self, saved: str) -> str:
        if saved.partition(".")[0] == _HEAD:
            return saved
        return f"{_MODEL}.{self.inner.host_name(saved)}"

    def published_name(self, name: str) -> str:
        """As DyT's public code for videos calls its head."""
        own = name.removeprefix("attentive_blocks.").removeprefix("cross_attn.")
        return f"{_HEAD}.{own}" if own != name or name == "query_token" else self.inner.published_name(name)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.inner.weights()
        yield from ((f"host.{_HEAD}.{name}", p) for name, p in self.host.temporal.named_parameters())

    def fold_factors(self) -> None:
        self.inner.fold_factors()
