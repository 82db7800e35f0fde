"""A host whose attention nobody can take apart: inside windows of 2 x 2 patches, with a bias for relative positions."""

import torch
import torch.nn.functional as F
from rotary import GRID, HEADS, WIDTH, HostBlock, HostedMlp, Rotary, RotaryAttention, RotaryViT
from torch import nn

from dyntune.backbones.units import Block, OpaqueAttention
from dyntune.core.tokens import Provenance, Tokens


class WindowAttention(RotaryAttention):
    def __init__(self):
        super().__init__()
        self.relative = nn.Parameter(torch.zeros(HEADS, 4, 4))

    def forward(self, x):
        images = x.shape[0]
        x = x.unflatten(1, (GRID[0] // 2, 2, GRID[1] // 2, 2)).transpose(2, 3).reshape(-1, 4, WIDTH)
        q, k, v = (t.transpose(1, 2) for t in self.projected(x))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.relative.to(q.dtype)).transpose(1, 2).flatten(2)
        x = x.view(images, GRID[0] // 2, GRID[1] // 2, 2, 2, WIDTH).transpose(2, 3).reshape(images, -1, WIDTH)
        return self.proj(x)


class WindowBlock(HostBlock):
    attention = WindowAttention


class WindowViT(RotaryViT):
    """4 x 4 patches and no class token; the head reads their mean."""

    block = WindowBlock

    def __init__(self, num_classes=5):
        super().__init__(num_classes)
        del self.cls_token

    def tokens(self, images):
        return self.patch_embed(images).flatten(2).mT

    def forward(self, images):
        x = self.tokens(images)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class HostedWindows(OpaqueAttention):
    drop_path_rate = 0.0

    def __init__(self, index, host):
        super().__init__(f"blocks.{index}.attn", WIDTH)
        object.__setattr__(self, "block", host.blocks[index])

    def norm(self, x):
        return self.block.norm1(x)

    def attended(self, normed, grid):
        return self.block.attn(normed)


class Windows(Rotary):
    """``WindowViT`` behind the interface; ``windows:tiny`` builds it by name."""

    supported = "WindowViT"
    prefix = "windows:"
    model = WindowViT
    read_first, class_token = None, False

    def __init__(self, host):
        super(Rotary, self).__init__(host)
        self.blocks = nn.ModuleList(
            Block(index, HostedWindows(index, host), HostedMlp(index, host)) for index in range(len(host.blocks))
        )

    def embed(self, images):
        return Tokens(self.host.tokens(images), 0, GRID, provenance=Provenance())

    def readout(self, tokens):
        return self.host.head(tokens.mean)
