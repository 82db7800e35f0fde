"""DynamicViT: small predictors in front of a few blocks score the patches, and the lowest ones are dropped."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.core.errors import BackboneError
from dyntune.core.losses import distillation_loss, gumbel_difference
from dyntune.core.matching import taken
from dyntune.core.tokens import Projected, Tokens
from dyntune.core.words import counted
from dyntune.parts.policies.base import Output
from dyntune.parts.policies.reducing import Reducer, ReducingPolicy

TokenLoss = Literal["mse", "kl"]


class Marking(Reducer):
    """While training, marks every patch as present, so that all blocks compute the masked softmax."""

    def forward(self, tokens: Tokens, projected: Projected | None) -> Callable[[Tokens], Tokens] | None:
        if not self.training:
            return None
        present = torch.ones_like(tokens.patches[..., 0], dtype=torch.float32)
        return lambda tokens: tokens.with_present(present)


class Stage(Reducer):
    """Scores the patches; drops the lowest in evaluation, and hides those that a noisy choice drops while training.

    Args:
        width: channels C of a token.
        keep: share of the image's patches that stay in evaluation.
        temperature: of the noisy choice; it shapes the gradient only.
    """

    def __init__(self, width: int, keep: float, temperature: float) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.score = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
        )
        self.keep = keep
        self.temperature = temperature
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def logits(self, tokens: Tokens) -> Tensor:
        """The logits ``(B, P)`` of keeping each patch rather than dropping it, in fp32."""
        local, shared = self.embed(tokens.patches).chunk(2, dim=-1)
        present = tokens.provenance.present
        if present is None:
            mean = shared.mean(1, keepdim=True)
        else:
            present = present.unsqueeze(-1)
            # At least 1: an image that has dropped every patch has no mean.
            mean = (shared * present).sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp_min(1)
        keep, drop = self.score(torch.cat([local, mean.to(local.dtype).expand_as(local)], dim=-1)).float().unbind(-1)
        return keep - drop

    def forward(self, tokens: Tokens, projected: Projected | None) -> Callable[[Tokens], Tokens] | None:
        return self.hiding(tokens) if self.training else self.dropping(tokens)

    def hiding(self, tokens: Tokens) -> Callable[[Tokens], Tokens]:
        """The straight-through choice of training; what was hidden before stays so."""
        logits = self.logits(tokens)
        noisy = logits + gumbel_difference(logits)
        soft = (noisy / self.temperature).sigmoid()
        present = (noisy >= 0).to(soft.dtype) + (soft - soft.detach())
        if tokens.provenance.present is not None:
            present = present * tokens.provenance.present
        return lambda tokens: tokens.with_present(present)

    def dropping(self, tokens: Tokens) -> Callable[[Tokens], Tokens] | None:
        """Keeps the highest logits, sorted by falling logit; at least one patch stays."""
        images, patches, _ = tokens.patches.shape
        count = max(1, int(self.keep * tokens.grid[0] * tokens.grid[1]))
        if count >= patches:
            return None
        kept = self.logits(tokens).argsort(dim=-1, descending=True, stable=True)[:, :count]
        moved = torch.full((images, patches), -1, device=kept.device)
        moved.scatter_(1, kept, torch.arange(count, device=kept.device).expand(images, -1))

        def drop(tokens: Tokens) -> Tokens:
            return tokens.with_patches(taken(tokens.patches, kept), moved)

        return drop


@dataclass(frozen=True)
class DynamicViT(ReducingPolicy):
    """Learned token pruning: in front of a few blocks a predictor scores the patches, and only the best go on.

    With h = gelu(W LN(x) + b), cut into halves u and v, a patch's two logits are ``MLP([u, mean of v])``, the mean
    taken over the patches that are there; the MLP has widths C, C/2, C/4 and 2. In evaluation the ``int(keep * patches
    of the image)`` patches with the highest probability of being kept go on, sorted by it.

    While training no token is removed. Each patch is kept or hidden by a hard Gumbel-softmax choice with the gradient
    of the soft one; a hidden patch stays hidden, still computes, and is seen by nobody but itself: every block computes
    ``P_ij = (E_ij M_ij + eps / N) / (sum_k E_ik M_ik + eps)`` with M_ij the presence of j and M_ii = 1.
    Where a gate decides about attention too, hidden tokens are closed keys of the gated softmax instead.

    The loss has ``ratio_weight * mean over stages and images of (kept share - keep)^2`` and, where a teacher is given,
    ``distill_weight * KL(teacher || student)`` on class probabilities, and ``token_weight`` times the distance of the
    patches that are still there, behind the last norm, from the teacher's.

    Each stage adds ``13 C^2 / 8 + 17 C / 4 + 2`` parameters and ``13 C^2 / 8 + C / 2 + 5 C`` MACs per patch that
    reaches it.

    Args:
        keep: for each stage, the share of the image's patches that stay, between 0 and 1; they must not rise.
        layers: blocks in front of which the stages stand, counted from 0; as many as ``keep`` has numbers.
        temperature: of the Gumbel-softmax; it shapes the gradient only.
        ratio_weight: coefficient of the ratio loss; the published training of DeiT-B has 5.
        distill_weight: coefficient of the distillation of class probabilities from a teacher.
        token_weight: coefficient of the distillation of token features from a teacher.
        token_loss: mse is the mean squared difference of the features, kl the divergence of their softmax over
            channels.
    """

    source: ClassVar[str] = "Rao et al., NeurIPS 2021, arXiv 2106.02034"

    keep: tuple[float, ...] = (0.9, 0.7, 0.5)
    layers: tuple[int, ...] = (3, 6, 9)
    temperature: float = 1.0
    ratio_weight: float = 2.0
    distill_weight: float = 0.5
    token_weight: float = 0.5
    token_loss: TokenLoss = "mse"

    def check(self) -> None:
        self.require(
            len(self.keep) == len(self.layers) > 0,
            "as many numbers in keep as in layers, for instance keep=0.9/0.7/0.5,layers=3/6/9 (a single number does "
            "not stand for its powers)",
        )
        self.require(
            all(0 < share <= 1 for share in self.keep) and list(self.keep) == sorted(self.keep, reverse=True),
            "keep above 0, at most 1, and never rising",
        )
        self.require(
            self.layers[0] >= 0 and list(self.layers) == sorted(set(self.layers)),
            "layers of at least 0, each above the one before",
        )
        self.require(self.temperature > 0, "temperature above 0")
        weights = (self.ratio_weight, self.distill_weight, self.token_weight)
        self.require(min(weights) >= 0, "loss weights of at least 0")

    def install(self, backbone: Backbone) -> None:
        depth = len(backbone.blocks)
        self.require(self.layers[-1] < depth, f"layers below {depth}, for the backbone has {counted(depth, 'block')}")
        for layer, keep in zip(self.layers, self.keep, strict=True):
            block = backbone.blocks[layer]
            block.add_reducer(self.name(), Stage(block.width, keep, self.temperature))
        if self.layers[0] > 0:
            backbone.blocks[0].add_reducer(self.name(), Marking())

    def from_published(self, name: str, tensor: Tensor) -> dict[str, Tensor] | None:
        match = re.fullmatch(r"score_predictor\.(\d+)\.(in|out)_conv\.(.+)", name)
        if match is None or int(match[1]) >= len(self.layers):
            return None
        part = {"in": "embed", "out": "score"}[match[2]]
        return {f"blocks.{self.layers[int(match[1])]}.reducers.{self.name()}.{part}.{match[3]}": tensor}

    def distills(self) -> bool:
        return self.distill_weight > 0 or self.token_weight > 0

    def check_teacher(self, backbone: Backbone, teacher: Backbone) -> None:
        own, taught = (_features(one) for one in (backbone, teacher))
        if self.token_weight and own != taught:
            raise BackboneError(
                f"the teacher's patch features are {taught}, the model's {own}, so that dynamicvit cannot compare "
                "them. Give a teacher with the same patches and width, or token_weight=0."
            )

    @property
    def drops(self) -> bool:
        return True

    def loss_terms(self, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        stages = {f"blocks.{layer}" for layer in self.layers}
        decisions = [
            record.provenance.present
            for record in output.reductions
            if record.policy is self and record.unit in stages and record.provenance.present is not None
        ]
        if not decisions:  # in eval mode, where the shares are met exactly
            return {}
        terms = {}
        if self.ratio_weight:
            shares = torch.stack([decision.mean(1) for decision in decisions])  # (stages, B)
            distance = shares - shares.new_tensor(self.keep).unsqueeze(1)
            terms["ratio"] = self.ratio_weight * distance.square().mean()
        if teacher is None:
            return terms
        assert output.tokens is not None and teacher.tokens is not None  # run() gives them
        if self.distill_weight:
            _require_shape("logits", output.logits, teacher.logits)
            terms["teacher"] = self.distill_weight * distillation_loss(output.logits, teacher.logits)
        if self.token_weight:
            features, taught = output.tokens.patches, teacher.tokens.patches
            _require_shape("patch features", features, taught)
            distance = _token_distance(features, taught, self.token_loss)
            there = (decisions[-1] > 0.5).to(distance.dtype)
            terms["teacher_tokens"] = self.token_weight * (distance * there).sum() / there.sum().clamp_min(1)
        return terms


def _features(backbone: Backbone) -> str:
    rows, columns = backbone.grid
    return f"{rows} x {columns} x {backbone.blocks[0].width}"


def _require_shape(what: str, own: Tensor, taught: Tensor) -> None:
    if own.shape != taught.shape:
        raise BackboneError(
            f"the teacher gives {what} of shape {tuple(taught.shape)}; expected the student's, {tuple(own.shape)}. "
            "Give a dense teacher of the same classes, and for token_weight above 0 with the same width and patches."
        )


def _token_distance(own: Tensor, taught: Tensor, kind: TokenLoss) -> Tensor:
    """The distance of each patch's features from the teacher's, ``(B, P)``, in fp32."""
    own, taught = own.float(), taught.detach().float()
    if kind == "mse":
        return (own - taught).square().mean(-1)
    taught = taught.log_softmax(-1)
    return F.kl_div(own.log_softmax(-1), taught, reduction="none", log_target=True).sum(-1)
