"""Steps that several policies are compared with, in plain tensor operations on the host's weights."""

import torch

import dyntune


def attend(block, x, bias):
    """The residual stream ``(N, C)`` after attention, and the mean of the keys over heads."""
    attn = block.attn
    q, k, v = (part.unflatten(-1, (attn.num_heads, -1)) for part in attn.qkv(block.norm1(x)).chunk(3, dim=-1))
    q, k = attn.q_norm(q), attn.k_norm(k)
    heads = []
    for head in range(attn.num_heads):
        scores = q[:, head] @ k[:, head].T / q.shape[-1] ** 0.5 + bias
        heads.append(torch.softmax(scores, dim=-1) @ v[:, head])
    return x + block.ls1(attn.proj(attn.norm(torch.cat(heads, dim=-1)))), k.mean(1)


def read_out(host, x, sizes):
    """Logits of the tokens ``(N, C)`` of one image that have left the last block; in a mean they count by ``sizes``."""
    prefix, x = host.num_prefix_tokens, host.norm(x)[None]
    if host.attn_pool is not None:
        return host.head(host.fc_norm(host.attn_pool(x, attn_mask=sizes.log()[None, None, None])))[0]
    if host.global_pool == "avg":
        weights = sizes[prefix:, None] / sizes[prefix:].sum()
        return host.head(host.fc_norm((x[0, prefix:] * weights).sum(0)))
    return host.forward_head(x)[0]


def built(make_host, randomise, spec, name="plain", **changes):
    model = dyntune.tune(make_host(name, **changes), *spec.split("+"))
    return randomise(model, seed=3).eval()


def without_noise(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
