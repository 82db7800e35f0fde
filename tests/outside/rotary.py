"""A host that timm does not have: a ViT with rotary embeddings, one query-key-value map, and biases beside it."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dyntune.backbones.base import Backbone
from dyntune.backbones.origin import BackboneSource
from dyntune.backbones.sites import Site, mapped
from dyntune.backbones.units import Attention, Block, Mlp
from dyntune.core.rotation import Rotation
from dyntune.core.tokens import Provenance, Tokens

WIDTH, HEADS, DEPTH, PATCH, GRID = 32, 4, 3, 8, (4, 4)


def rotate(x, cos, sin):
    """Features ``(..., H, D)`` rotated in pairs by angles of ``(..., 1, D)``."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class RotaryAttention(nn.Module):
    """``qkv`` has no bias of its own: queries and values have one beside it, keys none."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(WIDTH))
        self.v_bias = nn.Parameter(torch.zeros(WIDTH))
        self.proj = nn.Linear(WIDTH, WIDTH)

    def bias(self):
        if self.q_bias is None:
            return None
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def projected(self, x):
        return mapped(self.qkv, x, self.bias()).unflatten(-1, (3, HEADS, -1)).unbind(-3)

    def forward(self, x, angles):
        q, k, v = self.projected(x)
        q, k = (rotate(t, *angles).transpose(1, 2) for t in (q, k))
        return self.proj(F.scaled_dot_product_attention(q, k, v.transpose(1, 2)).transpose(1, 2).flatten(2))


class HostBlock(nn.Module):
    attention = RotaryAttention

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = self.attention()
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.5))
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def mlp(self, x):
        return self.scaled(self.fc2(F.gelu(self.fc1(x))))

    def scaled(self, x):
        return x if self.gamma is None else x * self.gamma

    def forward(self, x, *angles):
        x = x + self.attn(self.norm1(x), *angles)
        return x + self.mlp(self.norm2(x))


class RotaryViT(nn.Module):
    """A class token and 4 x 4 patches of images of 32 x 32 pixels."""

    block = HostBlock
    in_chans = 3

    def __init__(self, num_classes=5):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.patch_embed.img_size = (PATCH * GRID[0], PATCH * GRID[1])
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.blocks = nn.ModuleList(self.block() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, num_classes)
        self.grad_checkpointing = False
        half = WIDTH // HEADS // 4
        row, column = torch.meshgrid(*map(torch.arange, GRID), indexing="ij")
        turns = 10.0 ** -torch.arange(half)
        angle = torch.cat([row.reshape(-1, 1) * turns, column.reshape(-1, 1) * turns], dim=1).repeat(1, 2)
        # The row behind the last place, which -1 finds too, turns nothing.
        angle = torch.cat([angle, torch.zeros(1, angle.shape[1])])
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def set_grad_checkpointing(self, on=True):
        self.grad_checkpointing = on

    def tokens(self, images):
        x = self.patch_embed(images).flatten(2).mT
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)

    def angles(self, positions):
        """Cosines and sines ``(..., 1, D)`` of positions ``(...)``; -1 is not rotated."""
        return self.cos[positions].unsqueeze(-2), self.sin[positions].unsqueeze(-2)

    def forward(self, images):
        x = self.tokens(images)
        places = torch.arange(-1, x.shape[1] - 1, device=x.device).expand(x.shape[0], -1)
        for block in self.blocks:
            x = (
                checkpoint(block, x, self.angles(places), use_reentrant=False)
                if self.grad_checkpointing
                else block(x, self.angles(places))
            )
        return self.head(self.norm(x)[:, 0])


class HostedAttention(Attention):
    def __init__(self, index, host):
        super().__init__(f"blocks.{index}.attn", WIDTH)
        object.__setattr__(self, "host", host)
        object.__setattr__(self, "block", host.blocks[index])

    def norm(self, x):
        return self.block.norm1(x)

    drop_path_rate = attention_dropout = 0.0
    head_width = WIDTH // HEADS

    def project(self, tokens):
        return self.block.attn.projected(self.normed(tokens))

    def combine(self, attended):
        return self.block.attn.proj(attended)


class HostedMlp(Mlp):
    drop_path_rate = 0.0

    def __init__(self, index, host):
        super().__init__(f"blocks.{index}.mlp", WIDTH)
        object.__setattr__(self, "block", host.blocks[index])

    def norm(self, x):
        return self.block.norm2(x)

    def transform(self, normed):
        return self.block.mlp(normed)


class Rotary(Backbone):
    """``RotaryViT`` behind the interface; ``rotary:tiny`` builds it by name."""

    supported = "RotaryViT"
    prefix = "rotary:"
    arguments = ("num_classes",)
    model = RotaryViT
    attention = HostedAttention
    head_reads_grid, read_first, class_token, grid = False, 1, True, GRID

    def __init__(self, host):
        super().__init__(host)
        self.blocks = nn.ModuleList(
            Block(index, self.attention(index, host), HostedMlp(index, host)) for index in range(DEPTH)
        )

    @classmethod
    def knows(cls, host):
        return type(host) is cls.model

    @classmethod
    def create(cls, name, *, weights=None, pretrained=True, **arguments):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cls.model(**arguments)

    def origin(self):
        return BackboneSource(f"{self.prefix}tiny", {"num_classes": self.classes})

    def embed(self, images):
        return Tokens(self.host.tokens(images), 1, GRID, provenance=Provenance(), rotation=self.rotation())

    def rotation(self):
        tables = torch.cat([self.host.sin, self.host.cos], dim=-1)[:-1]
        return Rotation(tables[None, :, None], half=True)

    def finish(self, tokens):
        return tokens.with_x(self.host.norm(tokens.x)).without_prompts()

    def readout(self, tokens):
        return self.host.head(tokens.x[:, 0])

    @property
    def heads(self):
        return (self.host.head,)

    @property
    def image_shape(self):
        return 3, PATCH * GRID[0], PATCH * GRID[1]

    @property
    def gradient_checkpointing(self):
        return self.host.grad_checkpointing

    def switch_gradient_checkpointing(self, on):
        self.host.set_grad_checkpointing(on)

    def fold_factors(self):
        with torch.no_grad():
            for block in self.host.blocks:
                block.fc2.weight.mul_(block.gamma.unsqueeze(1))
                block.fc2.bias.mul_(block.gamma)
                block.gamma = None

    def maps(self, index, attn):
        """The sites of an attention's queries, keys and values."""
        path = f"blocks.{index}.attn.qkv"
        yield Site("qkv", index, path, attn, "qkv", biases=("q_bias", "k_bias", "v_bias"))

    def all_sites(self):
        yield Site("patch", None, "patch_embed", self.host, "patch_embed")
        for index, block in enumerate(self.host.blocks):
            path = f"blocks.{index}"
            yield Site("norm1", index, f"{path}.norm1", block, "norm1")
            yield from self.maps(index, block.attn)
            yield Site("proj", index, f"{path}.attn.proj", block.attn, "proj")
            yield Site("norm2", index, f"{path}.norm2", block, "norm2")
            yield Site("fc1", index, f"{path}.fc1", block, "fc1")
            yield Site("fc2", index, f"{path}.fc2", block, "fc2")
        yield Site("norm", None, "norm", self.host, "norm")
