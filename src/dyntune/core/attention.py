"""Softmax attention over the tokens that take part, in each layout that tokens can have."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dyntune.core.tokens import Projected, Tokens

_EPSILON = 1e-6
"""Of DynamicViT's masked softmax."""
_FEWEST = 2
"""Rows of the shortest sequence that a traced attention is for."""
_LEAST = 2.0**-64
"""Weight of a key that counts for nothing: below the rounding of the others, and with a gradient that is finite."""


def attend(projected: Projected, tokens: Tokens, dropout: float = 0.0) -> Tensor:
    """Multi-head scaled dot-product attention among the tokens of each image.

    Args:
        projected: queries, keys and values, ``(B, N, H, D)`` for dense tokens, ``(M, H, D)`` for ragged ones; D is the
            width of a head.
        tokens: whose layout, whose ``keys`` where only some tokens may be attended to, whose ``key_bias`` where some
            count for more, and whose ``provenance.present`` where training hides tokens.
        dropout: probability of dropping an attention weight.

    Returns:
        ``(B, N, H * D)`` or ``(M, H * D)``.
    """
    q, k, v, _, bias = projected
    if tokens.counts is not None:
        between = None if bias is None else _Between(bias, tokens.places.index)
        if isinstance(tokens.counts, Tensor):
            attended = _traced(q, k, v, tokens.counts, tokens.prefix, between, dropout)
        else:
            attended = _ragged(q, k, v, tokens.counts, between, dropout)
    else:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        present = None if tokens.provenance.present is None else tokens.cover_prefix(tokens.provenance.present)
        if tokens.keys is not None:
            keys = tokens.keys if present is None else tokens.keys * present
            attended = _gated(q, k, v, keys, bias, dropout).transpose(1, 2)
        elif present is not None:
            attended = _hidden(q, k, v, present, bias).transpose(1, 2)
        else:
            mask = None if bias is None else bias.to(q.dtype)
            if tokens.key_bias is not None:
                of_keys = F.pad(tokens.key_bias, (tokens.prefix, 0))[:, None, None].to(q.dtype)
                mask = of_keys if mask is None else mask + of_keys
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2)
    return attended.flatten(-2)


def bias_of(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to a key's logits so that it counts for ``weights`` keys, ``log w``, in ``dtype``.

    Where w is 0 the logarithm is that of the least weight. In softmax its gradient is that of the weight itself,
    ``E_j (v_j - y) / Z`` with E_j the exponential and Z their sum: a hidden key learns what it would bring.

    Args:
        weights: of keys, at least 0, of any shape.
        dtype: of the logits.
    """
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    return (weights + _LEAST * (1 - weights)).log().to(dtype)


class _Between:
    """A bias of the pairs of dense tokens, for those of them that are in a ragged batch.

    Args:
        bias: ``(1 or B, H, N, N)``.
        index: ``(M,)``, the tokens as numbers in the flattened dense batch.
    """

    def __init__(self, bias: Tensor, index: Tensor | None) -> None:
        assert index is not None  # ragged tokens have one
        self.bias = bias
        self.number = F.pad(index % bias.shape[-1], (0, 1))  # within the image; one more, for a batch without tokens

    def image(self, image: int, tokens: slice) -> Tensor:
        """``(1, H, n, n)``, among the ``tokens`` of the ragged batch, all of ``image``."""
        number = self.number[tokens]
        return self.bias[image % len(self.bias)][:, number][:, :, number][None]

    def rows(self, rows: Tensor) -> Tensor:
        """``(B, H, longest, longest)``, among the tokens that are ``rows``, ``(B, longest)``, of the ragged batch."""
        number = self.number[rows]
        images, longest = number.shape
        heads, count = self.bias.shape[1:3]
        among = self.bias.expand(images, -1, -1, -1)
        among = among.gather(2, number[:, None, :, None].expand(-1, heads, -1, count))
        return among.gather(3, number[:, None, None].expand(-1, heads, longest, -1))


def _ragged(
    q: Tensor, k: Tensor, v: Tensor, counts: tuple[int, ...], between: _Between | None, dropout: float
) -> Tensor:
    """Attention inside each image; on a CPU image by image, elsewhere in one padded call."""
    if not any(counts):
        return torch.empty_like(v)
    if len(set(counts)) == 1:
        q, k, v = (t.unflatten(0, (len(counts), -1)).transpose(1, 2) for t in (q, k, v))
        mask = None
        if between is not None:
            mask = between.rows(torch.arange(q.shape[0] * q.shape[2], device=q.device).view(q.shape[0], -1)).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2).flatten(0, 1)
    compute = _one_by_one if q.device.type == "cpu" else _padded
    return compute(q, k, v, counts, between, dropout)


def _one_by_one(
    q: Tensor, k: Tensor, v: Tensor, counts: tuple[int, ...], between: _Between | None, dropout: float
) -> Tensor:
    out = torch.empty_like(v)
    start = 0
    for number, count in enumerate(counts):
        image = slice(start, start + count)
        start += count
        if count:
            one_q, one_k, one_v = (t[image].transpose(0, 1)[None] for t in (q, k, v))
            mask = None if between is None else between.image(number, image).to(q.dtype)
            attended = F.scaled_dot_product_attention(one_q, one_k, one_v, attn_mask=mask, dropout_p=dropout)
            out[image] = attended[0].transpose(0, 1)
    return out


def _padded(
    q: Tensor, k: Tensor, v: Tensor, counts: tuple[int, ...], between: _Between | None, dropout: float
) -> Tensor:
    lengths = torch.tensor(counts, device=q.device)
    present = torch.arange(max(counts), device=q.device) < lengths[:, None]  # (B, longest)
    padded = []
    for t in (q, k, v):
        whole = t.new_zeros(*present.shape, *t.shape[1:])
        whole[present] = t
        padded.append(whole.transpose(1, 2))
    # A query of an image without tokens would see no key and give NaN; nobody reads it, but it must not be made.
    visible = present | (lengths == 0)[:, None]
    q, k, v = padded
    mask = visible[:, None, None]
    if between is not None:
        first = lengths.cumsum(0) - lengths
        rows = (first[:, None] + torch.arange(max(counts), device=q.device)).clamp_max(sum(counts) - 1)
        bias = between.rows(rows).to(q.dtype)
        mask = bias.masked_fill(~mask, -torch.inf)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return out.transpose(1, 2)[present]


def _traced(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, prefix: int, between: _Between | None, dropout: float
) -> Tensor:
    """As ``_padded``, with nothing that a graph for other runtimes cannot hold: rows are gathered, none is assigned."""
    longest = counts.max().item()
    torch._check(longest >= prefix)  # prefix tokens are always active, and a batch has an image
    # PyTorch 2.13 and 2.14 cannot trace an attention that may have one row, whose mask could then be broadcast, and
    # some runtimes compute none among no tokens. So a graph is for two rows or more; spare ones are masked, not read.
    spare = max(_FEWEST - prefix, 0)
    if spare:
        q, k, v = (F.pad(t, (0, 0, 0, 0, 0, spare)) for t in (q, k, v))
        longest = longest + spare
    place = torch.arange(longest, device=q.device)
    present = place < counts[:, None]  # (B, longest)
    first = counts.cumsum(0) - counts
    rows = torch.where(present, first[:, None] + place, 0).flatten()
    q, k, v = (t.index_select(0, rows).unflatten(0, present.shape).transpose(1, 2) for t in (q, k, v))
    # Not -inf: a row of an image without tokens would be NaN.
    mask = torch.where(present, 0.0, torch.finfo(q.dtype).min).to(q.dtype)[:, None, None]
    if between is not None:
        bias = between.rows(rows.view(present.shape)).to(q.dtype)
        mask = torch.where(present[:, None, None], bias, mask)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, present.flatten().nonzero().squeeze(1))


def _gated(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """Attention to the keys whose gate is 1, with a gradient for the gates.

    ``P_ij = E_ij g_j / sum_k E_ik g_k`` with ``E_ij = exp(min(L_ij - max of L_i over open gates, 0))``. Forward, with
    gates in {0, 1}, this is exactly the softmax over the open keys. Backward, a closed key j gets the gradient of being
    opened, ``E_ij (v_j - y_i)``; the minimum keeps a closed key from counting for more than the strongest open one,
    which without it would make the exponential, and the gradient, arbitrarily large.
    """
    logits = _logits(q, k, bias)
    gate = keys[:, None, None, :].to(logits.dtype)
    strongest = logits.detach().masked_fill(gate.detach() < 0.5, -torch.inf).amax(-1, keepdim=True)
    strongest = strongest.masked_fill(strongest == -torch.inf, 0.0)  # an image with every key closed
    # Not clamp(max=0): its gradient is 0 at the bound, where the strongest open key always is.
    distance = logits - strongest
    weights = torch.where(distance > 0, torch.zeros_like(distance), distance).exp() * gate
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return F.dropout(weights.to(v.dtype), dropout) @ v


def _hidden(q: Tensor, k: Tensor, v: Tensor, present: Tensor, bias: Tensor | None) -> Tensor:
    """Attention in which every token sees itself and the tokens that are present (DynamicViT, equation 11).

    ``P_ij = (E_ij M_ij + eps / N) / (sum_k E_ik M_ik + eps)`` with ``E = exp(L - max of the row over all keys)``, M_ij
    the presence of j, M_ii = 1 and eps = 1e-6. Dropout is left out, as in the published code.

    With eps the row's maximum does not cancel, the less the more a hidden key holds it, so it has a gradient.
    """
    logits = _logits(q, k, bias)
    count = logits.shape[-1]
    seen = present[:, None, None, :].to(logits.dtype)
    seen = seen + (1 - seen) * torch.eye(count, dtype=logits.dtype, device=logits.device)
    weights = (logits - logits.amax(-1, keepdim=True)).exp() * seen
    weights = (weights + _EPSILON / count) / (weights.sum(-1, keepdim=True) + _EPSILON)
    return weights.to(v.dtype) @ v


def _logits(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """``(B, H, N, N)``, at least in fp32."""
    products = q @ k.transpose(-2, -1)
    logits = products.to(torch.promote_types(products.dtype, torch.float32)) * q.shape[-1] ** -0.5
    return logits if bias is None else logits + bias
