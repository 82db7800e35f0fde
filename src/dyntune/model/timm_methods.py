"""timm's methods on a tuned model: embeddings, and another classifier."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.core.errors import SpecError
from dyntune.core.tokens import Tokens
from dyntune.parts.policies.base import Output


class TimmMethods(nn.Module, abc.ABC):
    """What timm's models have beside ``forward``, by the same names and with the same meaning.

    ``model(images)`` is ``model.forward_head(model.forward_features(images))``, and with ``pre_logits=True`` that is
    an embedding of each image. Hosts that are not timm's have these methods too.
    """

    backbone: Backbone

    @abc.abstractmethod
    def run(self, images: Tensor, *, complete: bool = False, watch: Callable[[Tokens], None] | None = None) -> Output:
        """One forward pass with everything that it decided."""

    @abc.abstractmethod
    def replaced_head(self, before: set[str], classes: int) -> None:
        """Takes note of a new classifier.

        Args:
            before: names, as in ``Backbone.head_parameters``, of the parameters of that which is gone.
            classes: outputs of the new one.
        """

    @property
    def num_features(self) -> int:
        """Channels C of the tokens behind the last block."""
        return self.backbone.blocks[-1].width

    @property
    def num_classes(self) -> int:
        """Outputs of the classifier; 0 without one."""
        return self.backbone.classes

    def forward_features(self, images: Tensor) -> Tensor:
        """Images to the tokens behind the last norm, not pooled, as the host gives them.

        A ViT gives ``(B, N, C)``, the class token and its like in front; a Swin ``(B, rows, columns, C)``; an image
        model on the T frames of clips ``(B, T, N, C)``. Patches that were merged share the features of their token;
        where a policy drops patches, N is that of those that are left.

        Args:
            images: as for ``forward``.

        Raises:
            DyntuneError: of patches that a policy has merged another has dropped some, or the host needs each.
        """
        tokens = self.run(images).tokens
        assert tokens is not None  # run() gives them
        return self.backbone.unpooled(tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens of ``forward_features`` to logits ``(B, classes)``.

        Args:
            x: as ``forward_features`` gives them.
            pre_logits: gives what the classifier reads instead, ``(B, C)``: an embedding of each image.
        """
        tokens = self.backbone.as_finished(x)
        return self.backbone.pooled(tokens) if pre_logits else self.backbone.readout(tokens)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Features of the patches behind several blocks, of hosts with stages behind several of these.

        Args:
            images: as for ``forward``.
            indices: so many of the last ones, or which ones, from 0; None for all.
            return_prefix_tokens: gives with each a tensor ``(B, prefix, C)`` of its class token and the like.
            norm: applies the last norm to all, of hosts with stages to those of the last one.
            output_fmt: ``NCHW`` for ``(B, C, rows, columns)``, ``NLC`` for ``(B, rows * columns, C)``.
            intermediates_only: leaves out the tokens behind the last block.

        Returns:
            The tokens that ``forward_features`` gives, and a list of the features; or that list alone.

        Raises:
            SpecError: there is no such block, or the head reads a stream beside the blocks.
            DyntuneError: patches were dropped.
        """
        if self.backbone.bypass is not None:
            raise SpecError("the head reads a stream of its own beside the blocks, which have no features of it.")
        if output_fmt not in ("NCHW", "NLC"):
            raise SpecError(f"output_fmt={output_fmt!r}: expected NCHW or NLC.")
        blocks = self.backbone.blocks
        staged = any(block.before is not None for block in blocks)
        ends = [i for i in range(len(blocks)) if not staged or i + 1 == len(blocks) or blocks[i + 1].before is not None]
        if isinstance(indices, int) and not 1 <= indices <= len(ends):
            raise SpecError(
                f"indices={indices}: expected how many of the last {len(ends)} {'stages' if staged else 'blocks'}, or "
                "a list of which ones."
            )
        asked = range(-indices, 0) if isinstance(indices, int) else range(len(ends)) if indices is None else indices
        if not all(-len(ends) <= index < len(ends) for index in asked):
            raise SpecError(f"indices={indices}: expected numbers of {len(ends)} {'stages' if staged else 'blocks'}.")
        chosen = [ends[index] for index in asked]
        seen: list[Tokens] = []
        output = self.run(images, watch=seen.append)
        found = []
        for index in chosen:
            tokens = seen[index + 1]
            normed = norm and not (staged and index + 1 < len(blocks))
            tokens = self.backbone.finish(tokens) if normed else tokens.without_prompts()
            grid = tokens.on_grid()
            features = grid if output_fmt == "NCHW" else grid.flatten(2).mT
            found.append((features, tokens.x[:, : tokens.prefix]) if return_prefix_tokens else features)
        assert output.tokens is not None  # run() gives them
        return found if intermediates_only else (self.backbone.unpooled(output.tokens), found)

    def get_classifier(self) -> Any:
        """The classifier; two of them where the host was distilled with a token of its own, ``nn.Identity`` if none."""
        heads = self.backbone.heads
        return tuple(heads) if len(heads) > 1 else heads[0] if heads else nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts a new classifier in place of the present one; it is trained and saved as that was.

        An optimizer that knows the parameters of the former has to be made again. Where the number of classes changes,
        their names are gone, and are set with ``model.classes``; ``fit`` sets those of a data set that has some.

        Args:
            num_classes: its outputs; 0 leaves it out, so that ``model(images)`` are embeddings.
            global_pool: what it reads; that of the host, which methods and policies were put on with.

        Raises:
            SpecError: it shall read something else.
            BackboneError: the host has no place for another.
        """
        pool = getattr(self.backbone.host, "global_pool", None)
        if global_pool not in (None, pool):
            raise SpecError(
                f"global_pool={global_pool!r}: the tuned model's is {pool!r}, by which its methods and policies were "
                "installed. Call reset_classifier of the plain model before tune."
            )
        if num_classes < 0:
            raise SpecError(f"num_classes={num_classes}: expected 0, for no classifier, or more.")
        before, like = self.backbone.head_parameters(), next(self.backbone.parameters())
        self.backbone.reset_classifier(num_classes)
        for head in self.backbone.heads:
            head.to(device=like.device, dtype=like.dtype).requires_grad_(True)
        self.replaced_head(before, num_classes)
