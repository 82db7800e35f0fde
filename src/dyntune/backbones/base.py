"""The narrow interface between a backbone and everything that is put on it.

A host model shows itself as blocks of two residual sub-layers. Methods and policies see these units, never the host's
own attribute names, so another family of hosts is one more file in ``families/``.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from dyntune.backbones.origin import BackboneSource
from dyntune.backbones.sites import Site, SiteKind
from dyntune.backbones.training import Training
from dyntune.backbones.units import Block, Unit, Where
from dyntune.core.errors import BackboneError, DataError
from dyntune.core.places import Places
from dyntune.core.tokens import Provenance, Tokens
from dyntune.data.transforms import Preprocessing


class Bypass(nn.Module, abc.ABC):
    """A stream of its own beside the frozen blocks that the head reads instead of theirs; no gradient enters them."""

    @abc.abstractmethod
    def begin(self, x: Tensor) -> Tensor:
        """The stream at its beginning, from what enters the first block, ``(B, N, C)``."""

    @abc.abstractmethod
    def step(self, block: int, stream: Tensor, x: Tensor) -> Tensor:
        """The stream after block number ``block``, from itself and what left that block, both ``(B, N, C)``."""


class Backbone(Training, abc.ABC):
    """A pretrained host model behind the interface that methods and policies are written against."""

    host: nn.Module
    blocks: Sequence[Block]
    supported: ClassVar[str] = ""
    """The models that the family takes, in words."""
    prefix: ClassVar[str] = ""
    """What the names of models begin with that ``create`` builds, such as ``hf:``; empty for timm's names."""
    outputs: int = 0
    """Of the classifier, as they were seen to be when the host was tuned."""
    arguments: ClassVar[tuple[str, ...]] = ()
    """Names of the keyword arguments that ``origin`` records for ``create``: numbers, texts, lists of numbers."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        # Behind what is shared: the state of an unfinished run knows tensors by their order.
        self.host = host
        self.bypass: Bypass | None = None
        """What the head reads instead of the blocks' output, if anything."""
        self.adopted: tuple[nn.Parameter, ...] = ()
        """Parameters of the host that are not frozen, because another library has put them there to be trained."""

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``; batch norms in front of the classifier's keep their pretrained statistics."""
        super().train(mode)
        own = {*(m for head in (*self.heads, getattr(self.host, "fc_norm", None)) if head for m in head.modules())}
        for module in self.host.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module not in own:
                module.eval()
        return self

    @classmethod
    @abc.abstractmethod
    def knows(cls, host: nn.Module) -> bool:
        """Whether ``host`` is one of this family, be it supported or not."""

    @classmethod
    def refusal(cls, host: nn.Module) -> str | None:
        """Why a host of this family cannot be run through the interface; None if it can."""
        return None

    @classmethod
    def create(
        cls, name: str, *, weights: str | Path | None = None, pretrained: bool = True, **arguments: Any
    ) -> nn.Module:
        """A host model by name; see ``dyntune.backbones.hosts.create_backbone``."""
        raise BackboneError(f"no model can be built from the name {name!r}; build it yourself, and give the model.")

    @classmethod
    def recorded(cls, name: str) -> tuple[str, ...]:
        """Names of the arguments that ``origin`` records for a model of this name."""
        return cls.arguments

    def origin(self) -> BackboneSource:
        """What builds this host again, where a name does."""
        return BackboneSource(None)

    @property
    def config(self) -> Any:
        """The configuration object of a model of transformers, as its Trainer reads it; None for other hosts."""
        return None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes that the host's classifier knows, in label order; None if it knows none."""
        return None

    def preprocessing(self) -> Preprocessing:
        """What images go through before the host takes them; by default scaled from -1 to 1."""
        return Preprocessing(self.image_shape[1:], (0.5,) * 3, (0.5,) * 3, "bicubic")

    @abc.abstractmethod
    def all_sites(self) -> Iterator[Site]:
        """The host's linear maps, convolutions and norms, each once, in the order of a forward pass.

        What stands between stages, or in front of the first block, need not be among them.
        """

    def sites(self, *kinds: SiteKind) -> Iterator[Site]:
        """The sites of these kinds, or all, in the order of a forward pass.

        ``qkv`` gives the map to queries, keys and values; where each has a map of its own, the family may join them to
        one (``JointSite``), or it gives the three of them. ``q``, ``k`` and ``v`` give these, or their part of the one.
        """
        for site in self.all_sites():
            if isinstance(site.module, nn.Identity):
                continue
            if not kinds or site.kind in kinds or (site.kind in ("q", "k", "v") and "qkv" in kinds):
                yield site
            elif site.kind == "qkv":
                yield from (site.part(kind) for kind in ("q", "k", "v") if kind in kinds)

    def in_its_precision(self, images: Tensor) -> Tensor:
        """Images in the precision of the host's weights, such as bf16.

        Raises:
            DataError: they are no tensor of floating point, such as preprocessing makes.
        """
        if not isinstance(images, Tensor) or not images.is_floating_point():
            given = str(images.dtype) if isinstance(images, Tensor) else type(images).__name__
            raise DataError(
                f"given {given}: expected a tensor of preprocessed images, (B, 3, height, width) in floating point. "
                "From a PIL image: dyntune.data.build_transform(model.preprocessing)(image)[None]."
            )
        dtype = next(self.host.parameters()).dtype
        return images.to(dtype) if dtype.is_floating_point else images

    @abc.abstractmethod
    def embed(self, images: Tensor) -> Tokens:
        """Images ``(B, 3, height, width)`` to the tokens that enter the first block."""

    @abc.abstractmethod
    def finish(self, tokens: Tokens) -> Tokens:
        """The tokens that left the last block behind the last norm, without prompts."""

    @abc.abstractmethod
    def readout(self, tokens: Tokens) -> Tensor:
        """Finished tokens to logits ``(B, classes)``; in a mean, tokens count by ``tokens.provenance.weights``."""

    def pooled(self, tokens: Tokens) -> Tensor:
        """Finished tokens to what the classifier reads, ``(B, C)``, of hosts with one linear classifier.

        Raises:
            BackboneError: the family does not tell.
        """
        raise BackboneError(f"{type(self.host).__name__} does not tell pooled features from its classifier.")

    @property
    def prefix_tokens(self) -> int:
        """How many tokens of its own the host puts in front of the patches."""
        return 1 if self.class_token else 0

    def unpooled(self, tokens: Tokens) -> Tensor:
        """Finished tokens in the layout in which the host itself gives them, by default ``(B, N, C)``.

        Merged patches share the features of their token, so that a mean over them is the same. Where patches were
        dropped and those left count alike, N is the number of those.
        """
        provenance = tokens.provenance
        if provenance.owner is None or (provenance.sizes is None and not self.head_reads_grid):
            return tokens.x
        return tokens.on_places()

    def as_finished(self, x: Tensor) -> Tokens:
        """What ``unpooled`` gives as tokens that ``readout`` and ``pooled`` take."""
        if x.ndim != 3:
            raise BackboneError(f"expected tokens (B, N, C), as forward_features gives them; given {tuple(x.shape)}.")
        return Tokens(x, self.prefix_tokens, self.grid, provenance=Provenance(), places=Places())

    def reset_classifier(self, classes: int) -> None:
        """Puts a new classifier in place of the host's; none, ``nn.Identity``, for 0 classes.

        Raises:
            BackboneError: there is no place for one.
        """
        raise BackboneError(
            f"the classifier of {type(self.host).__name__} cannot be replaced once it is tuned. Replace it before tune."
        )

    @property
    def poolers(self) -> tuple[nn.Module, ...]:
        """The host's own modules between its last norm and its classifier."""
        return ()

    @property
    def passes(self) -> tuple[nn.Module, ...]:
        """The modules whose own methods run all of the host's blocks, without what is put on them: the host itself."""
        return (self.host,)

    def host_logits(self, images: Tensor) -> Tensor:
        """What the host's own forward pass makes of images ``(B, 3, height, width)``: ``(B, classes)``."""
        return self.host(images)

    def answer(self, loss: Tensor | None, logits: Tensor) -> Any:
        """A loss, if there is one, and logits as users of the host's library expect them."""
        return {"loss": loss, "logits": logits}

    @property
    @abc.abstractmethod
    def head_reads_grid(self) -> bool:
        """Whether the head reads every patch by itself, as heads of dense tasks do, instead of a token or a mean."""

    @property
    @abc.abstractmethod
    def read_first(self) -> int | None:
        """How many leading tokens the head reads, where it reads no others; None where it reads patches."""

    @property
    @abc.abstractmethod
    def class_token(self) -> bool:
        """Whether the first token of every image is a class token."""

    @property
    @abc.abstractmethod
    def heads(self) -> tuple[nn.Module, ...]:
        """The classifier's modules: always trained, always saved, never counted among a method's parameters."""

    @property
    def necks(self) -> tuple[nn.Module, ...]:
        """Modules in front of the classifier that are as new as it is: trained, saved and left out of counts with it.

        Their MACs are the model's, not the head's.
        """
        return ()

    @property
    def classes(self) -> int:
        """Outputs of the classifier, those of its last linear map or convolution; 0 where it has none.

        Of a classifier without such, ``outputs``, where that is known.
        """
        for head in self.heads:
            for module in reversed([*head.modules()]):
                if isinstance(module, nn.Linear):
                    return module.out_features
                if isinstance(module, nn.modules.conv._ConvNd):
                    return module.out_channels
        return self.outputs

    @property
    @abc.abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that the backbone was built for."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input: of an image, or frames, channels, height and width of a clip."""
        return self.image_shape

    @property
    @abc.abstractmethod
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in those images."""

    @property
    def slices(self) -> int:
        """How many grids of moments in time lie one above the other in ``grid``; 1 where it is an image's."""
        return 1

    @property
    @abc.abstractmethod
    def gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward pass to save memory."""

    @abc.abstractmethod
    def switch_gradient_checkpointing(self, on: bool) -> None:
        """Lets blocks be recomputed in the backward pass, or be remembered."""

    def units(self, where: Where) -> Iterator[Unit]:
        """The units that ``where`` names, from the first block to the last."""
        for block in self.blocks:
            if where in ("attn", "attn-mlp"):
                yield block.attn
            if where in ("mlp", "attn-mlp"):
                yield block.mlp
            if where == "layer":
                yield block

    def one_width(self, part: str) -> int:
        """Channels C of every token, for a part that has something in common to all blocks.

        Args:
            part: its name.

        Raises:
            BackboneError: the backbone has stages of different widths.
        """
        widths = sorted({block.width for block in self.blocks})
        if len(widths) > 1:
            raise BackboneError(
                f"{part} has tensors in common to all blocks, but this backbone has stages whose tokens have "
                f"{', '.join(map(str, widths[:-1]))} and {widths[-1]} channels. Use a method that puts its own tensors "
                "on each block, such as adaptformer or lora."
            )
        return widths[0]

    def plain(self) -> Backbone:
        """The host as it was before other libraries put anything on it, with the same parameters."""
        return self

    @property
    def idle(self) -> tuple[nn.Parameter, ...]:
        """Parameters of the host that take no part in its forward pass, so that they are never trained."""
        return ()

    def companions(self) -> dict[str, Tensor]:
        """Tensors that another library has put on the host and does not train: saved too, by name in the backbone."""
        return {}

    def saved_name(self, name: str) -> str:
        """The name under which a tensor of the backbone is saved."""
        return file_name(name)

    def names_of_all(self) -> set[str]:
        """The names in files of all parameters that take part, which a save of the whole model holds."""
        idle = {id(parameter) for parameter in self.plain().idle}
        return {self.saved_name(name) for name, p in self.named_parameters() if id(p) not in idle}

    def host_name(self, saved: str) -> str:
        """What the host calls the module that is called ``saved`` in files, both without ``host.`` in front."""
        return saved

    def published_name(self, name: str) -> str:
        """What a tensor of a public checkpoint of this kind of model is called in the plain host."""
        return name

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The host's parameters that take part, under names and in pieces that no other version of its library changes.

        Two sets of weights are told apart by them.
        """
        unread = {id(parameter) for parameter in self.idle}
        for name, parameter in self.named_parameters():
            if id(parameter) not in unread:
                yield self.saved_name(name), parameter

    def recipe(self) -> dict[str, Any] | None:
        """What another library needs to put its layers on a plain host again, as JSON values; None without layers."""
        return None

    def fold(self) -> dict[str, str]:
        """Writes the changes of all sites, and what other libraries have put on the host, into the host's weights.

        Returns:
            What could not be folded, by name, with the reason.
        """
        for site in self.sites():
            site.fold()
        return {}

    def describe_fold(self) -> None:
        """Tells the host's own description, which its library reads it back by, of tensors that a fold has added."""

    @abc.abstractmethod
    def fold_factors(self) -> None:
        """Writes fixed factors on the host's updates, such as LayerScale, into the weights before them, for inference.

        Call it after ``fold``.
        """

    def all_units(self) -> Iterator[Unit]:
        """Every block and its sub-layers, from the first block to the last."""
        for block in self.blocks:
            yield from (block, block.attn, block.mlp)

    def head_parameters(self) -> set[str]:
        """Names, as in ``named_parameters``, of the head's parameters, those of ``necks`` included."""
        ids = {id(p) for head in (*self.heads, *self.necks) for p in head.parameters()}
        return {name for name, p in self.named_parameters() if id(p) in ids}


def file_name(name: str) -> str:
    """The name of a tensor in files, where the places on units are called as in the first format."""
    words = {"parallel": "beside", "sequential": "after", "prompts": "entries"}
    return re.sub(
        r"^(blocks\.\d+(?:\.attn|\.mlp)?)\.(parallel|sequential|prompts)\.", lambda m: f"{m[1]}.{words[m[2]]}.", name
    )
