"""MoE-adapter: an adapter whose weights are mixed per image from several experts."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.backbones.units import Parallel, Where
from dyntune.core.tokens import Tokens
from dyntune.parts.methods.base import TuningMethod

Normalise = Literal["softmax", "sigmoid", "none"]
Mix = Literal["weights", "outputs"]


class MixedAdapter(Parallel):
    """``s * (W_up* drop(relu(W_down* x + b_down*)) + b_up*)`` with ``W* = sum_e alpha_e W_e``, one alpha per image.

    ``alpha = normalise(W_r mean_n(x_n))``, the mean taken over all tokens of the image. With ``mix="outputs"`` the
    experts' outputs are summed with the weights alpha instead of their weights; that is another function, because of
    the ReLU and of the products ``alpha_i alpha_j``.

    Args:
        width: channels C of a token.
        bottleneck: channels d of each expert's hidden layer.
        experts: number E of experts.
        scale: the factor s, or "learnable" for a trained scalar that starts at 1.
        dropout: probability of dropping a hidden value while training.
        normalise: what turns the router's outputs into alpha.
        mix: what alpha weighs.
    """

    tokenwise = False

    def __init__(
        self,
        width: int,
        bottleneck: int,
        experts: int,
        scale: float | Literal["learnable"],
        dropout: float,
        normalise: Normalise,
        mix: Mix,
    ) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.down_weight = nn.Parameter(torch.empty(experts, bottleneck, width))
        self.down_bias = nn.Parameter(torch.zeros(experts, bottleneck))
        self.up_weight = nn.Parameter(torch.zeros(experts, width, bottleneck))
        self.up_bias = nn.Parameter(torch.zeros(experts, width))
        self.dropout = nn.Dropout(dropout)
        self.scale = nn.Parameter(torch.ones(())) if scale == "learnable" else scale
        self.normalise = normalise
        self.mix = mix
        nn.init.trunc_normal_(self.router.weight, std=0.02)
        for expert in self.down_weight.unbind():
            nn.init.kaiming_uniform_(expert, a=math.sqrt(5))

    def route(self, tokens: Tokens) -> Tensor:
        """The experts' shares for each image, ``(B, E)``."""
        scores = self.router(tokens.mean)
        if self.normalise == "softmax":
            return scores.softmax(-1)
        return scores.sigmoid() if self.normalise == "sigmoid" else scores

    def forward(self, tokens: Tokens) -> Tensor:
        """The update for every token, ``(B, N, C)``."""
        x = tokens.x
        alpha = self.route(tokens)
        if self.mix == "outputs":
            hidden = torch.einsum("bnc,edc->bend", x, self.down_weight) + self.down_bias[:, None]
            update = torch.einsum("bend,ecd->benc", self.dropout(F.relu(hidden)), self.up_weight)
            return torch.einsum("be,benc->bnc", alpha, update + self.up_bias[:, None]) * self.scale
        down = (alpha @ self.down_weight.flatten(1)).unflatten(1, self.down_weight.shape[1:])  # (B, d, C)
        up = (alpha @ self.up_weight.flatten(1)).unflatten(1, self.up_weight.shape[1:])  # (B, C, d)
        hidden = x @ down.transpose(1, 2) + self._mixed(alpha, self.down_bias)
        return (self.dropout(F.relu(hidden)) @ up.transpose(1, 2) + self._mixed(alpha, self.up_bias)) * self.scale

    def fold_scale(self) -> None:
        """Multiplies the scale into the experts' up-projections; the adapter computes the same."""
        with torch.no_grad():
            self.up_weight.mul_(self.scale)
            self.up_bias.mul_(self.scale)
        del self.scale
        self.scale = 1.0

    @staticmethod
    def _mixed(alpha: Tensor, bias: Tensor) -> Tensor:
        return (alpha.unsqueeze(-1) * bias).sum(1, keepdim=True)  # (B, 1, channels)


@dataclass(frozen=True)
class MoeAdapter(TuningMethod):
    """Puts an adapter beside each MLP whose weights are mixed per image from several experts (DyT, equation 7).

    L blocks of width D add ``L * (E (2 D d + d + D) + D E)`` parameters; mixing costs ``E (2 D d) + D E`` MACs per
    image and block beside the adapter's ``2 D d`` per token. Routing without a bias, its normalisation and the mixing
    of biases are our choice; the paper leaves them open.

    Args:
        experts: number E of experts.
        bottleneck: channels d of each expert's hidden layer.
        scale: factor on the adapter's output; "learnable" trains one scalar per adapter.
        dropout: probability of dropping a hidden value while training.
        normalise: what turns the router's outputs into the experts' shares.
        mix: mix the experts' weights (the paper's equation) or their outputs (its description; another function).
        where: the units that get an adapter beside them.
    """

    source: ClassVar[str] = "Zhao et al., NeurIPS 2024, arXiv 2403.11808, section 3.4"
    stays: ClassVar[str | None] = "its weights are mixed for each image; its scale is folded into the up-projections"

    experts: int = 4
    bottleneck: int = 8
    scale: float | Literal["learnable"] = 0.1
    dropout: float = 0.1
    normalise: Normalise = "softmax"
    mix: Mix = "weights"
    where: Where = "mlp"

    def check(self) -> None:
        self.require(self.experts >= 2, "at least 2 experts (one expert is adaptformer)")
        self.require(self.bottleneck >= 1, "bottleneck of at least 1")
        self.require(0 <= self.dropout < 1, "dropout in [0, 1)")

    def install(self, backbone: Backbone) -> None:
        for unit in backbone.units(self.where):
            adapter = MixedAdapter(
                unit.width, self.bottleneck, self.experts, self.scale, self.dropout, self.normalise, self.mix
            )
            unit.add_parallel("moe_adapter", adapter)
