"""A host whose queries, keys and values have a map each: keys without a bias, that of the values beside their map."""

import torch
import torch.nn.functional as F
from rotary import HEADS, WIDTH, HostBlock, Rotary, RotaryViT
from torch import nn

from dyntune.backbones.sites import Site, mapped


class ApartAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(WIDTH))
        self.proj = nn.Linear(WIDTH, WIDTH)

    def projected(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), mapped(self.v_proj, x, self.v_bias)
        return tuple(t.unflatten(-1, (HEADS, -1)) for t in (q, k, v))

    def forward(self, x, angles):
        q, k, v = (t.transpose(1, 2) for t in self.projected(x))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ApartBlock(HostBlock):
    attention = ApartAttention


class ApartViT(RotaryViT):
    """``RotaryViT`` with separate maps and without rotation."""

    block = ApartBlock


class Apart(Rotary):
    """``ApartViT`` behind the interface; ``apart:tiny`` builds it by name."""

    supported = "ApartViT"
    prefix = "apart:"
    model = ApartViT

    def rotation(self):
        return None

    def maps(self, index, attn):
        path = f"blocks.{index}.attn"
        yield Site("q", index, f"{path}.q_proj", attn, "q_proj")
        yield Site("k", index, f"{path}.k_proj", attn, "k_proj")
        yield Site("v", index, f"{path}.v_proj", attn, "v_proj", biases=("v_bias",))
