"""What a model's head reads of an image: by it two passes of a model are compared."""

import torch
from torch import Tensor

from dyntune.backbones.base import Backbone
from dyntune.core.errors import BackboneError
from dyntune.parts.policies.base import Output


def features(backbone: Backbone, output: Output) -> Tensor:
    """The pooled features, ``(B, C)``; on hosts whose head is of another kind every place's, ``(B, N, C)``.

    Of tokens that were merged or dropped, every place has the features of its token, or zeros.
    """
    tokens = output.tokens
    assert tokens is not None  # run() gives them
    if not backbone.head_reads_grid:
        try:
            return backbone.pooled(tokens)
        except BackboneError:  # a head of another kind, such as one of its own for the class token
            pass
    return torch.cat([tokens.x[:, : tokens.prefix], tokens.provenance.of_places(tokens.patches)], dim=1)
