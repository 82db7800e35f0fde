"""Places of tokens: what is known of patches and of pairs of them, for tokens of several patches and ragged ones."""

import torch

from dyntune.core import attention
from dyntune.core.attention import attend
from dyntune.core.places import Places
from dyntune.core.rotation import Rotation
from dyntune.core.tokens import Projected, Tokens

OWNER = torch.tensor([[2, -1, 2, 0], [0, 0, -1, 1]])


def members(image, token):
    return (OWNER[image] == token).nonzero().squeeze(1)


def test_rotations_of_tokens_are_means_and_of_the_prefix_none():
    tables = torch.arange(32.0).view(1, 4, 1, 8)
    places = Places().following(OWNER, 3)
    rows = Rotation(tables, half=False).rows(0, places, 1)
    still = torch.tensor([0.0] * 4 + [1.0] * 4)
    for image in range(2):
        assert torch.equal(rows[image, 0, 0], still)
        for token in range(3):
            own = members(image, token)
            expected = tables[0, own, 0].mean(0) if len(own) else still
            assert torch.equal(rows[image, 1 + token, 0], expected)
    index = torch.tensor([0, 3, 5])
    assert torch.equal(Rotation(tables, half=False).rows(0, places.taken(index), 1), rows.flatten(0, 1)[index])


def test_rotations_of_a_batch_without_merging_are_those_of_its_patches():
    tables = torch.randn(3, 4, 2, 8)  # of three attentions, for two heads
    index = torch.tensor([1, 6, 9])  # of two images with a class token: patch 0 of both, and the second's last one
    rows = Rotation(tables, half=True).rows(2, Places().taken(index), 1)
    assert torch.equal(rows, tables[2, [0, 0, 3]])


def test_biases_of_pairs_are_means_over_both_and_zero_for_prompts():
    bias = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0))  # one token of the host's own, four patches
    pairs = Places().following(OWNER, 3).of_pairs(bias, own=1, prefix=3)
    assert pairs.shape == (2, 2, 6, 6)
    assert not pairs[:, :, 1:3].any() and not pairs[..., 1:3].any()
    for image in range(2):
        groups = [torch.tensor([0]), *(1 + members(image, token) for token in range(3))]
        for row, of in zip((0, 3, 4, 5), groups, strict=True):
            for column, to in zip((0, 3, 4, 5), groups, strict=True):
                expected = bias[:, of][:, :, to].mean((1, 2)) if len(of) and len(to) else torch.zeros(2)
                torch.testing.assert_close(pairs[image, :, row, column], expected)
    without = Places().of_pairs(bias, own=1, prefix=3)[0]
    keep = torch.tensor([0, 3, 4, 5, 6])
    assert torch.equal(without[:, keep][:, :, keep], bias)
    assert not without[:, 1:3].any() and not without[..., 1:3].any()


def test_attention_among_some_tokens_has_the_biases_of_their_pairs():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 2, 4, generator=generator)
    bias = torch.randn(2, 2, 5, 5, generator=generator)
    for kept in ([[0, 2, 3], [0, 4]], [[0, 1], [0, 3]], [[0, 1, 2, 3, 4], []]):
        index = torch.cat([5 * image + torch.tensor(own, dtype=torch.long) for image, own in enumerate(kept)])
        ragged = [t.flatten(0, 1)[index] for t in (q, k, v)]
        counts = tuple(map(len, kept))
        places = Places().taken(index)
        numbers = Tokens(torch.empty(len(index), 8), 0, (1, 5), counts=counts, places=places)
        traced = Tokens(torch.empty(len(index), 8), 0, (1, 5), counts=torch.tensor(counts), places=places)
        expected = []
        for image, own in enumerate(kept):
            logits = torch.einsum("ihd,jhd->hij", q[image, own], k[image, own]) / 2 + bias[image][:, own][:, :, own]
            expected.append(torch.einsum("hij,jhd->ihd", logits.softmax(-1), v[image, own]).flatten(1))
        for tokens in (numbers, traced):
            found = attend(Projected(*ragged, ragged[1], bias), tokens)
            torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-5)
        padded = attention._padded(*ragged, counts, attention._Between(bias, index), 0.0)  # as on a GPU
        torch.testing.assert_close(padded.flatten(1), torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_what_becomes_of_a_cell_becomes_of_its_patches():
    """4 x 4 patches, in cells of 2 x 2, then of 1 x 2 of these, of which a policy drops one and numbers the others."""
    tokens = Tokens(torch.zeros(1, 16, 3), 0, (4, 4))
    halved = torch.arange(4) // 2
    tokens = tokens.with_cells(torch.zeros(1, 4, 6), (2, 2), (2 * halved[:, None] + halved).flatten())
    tokens = tokens.with_cells(torch.zeros(1, 2, 6), (1, 2), torch.tensor([0, 1, 0, 1]))
    assert tokens.grid == (1, 2)
    patches = tokens.provenance.of_patches(torch.tensor([[5.0, 7.0]]))
    assert torch.equal(patches.view(4, 4), torch.tensor([[5.0, 5.0, 7.0, 7.0]]).expand(4, -1))
    kept = tokens.with_patches(torch.full((1, 1, 6), 9.0), torch.tensor([[-1, 0]]))
    patches = kept.provenance.of_patches(torch.tensor([[3.0]]), dropped=-1)
    assert torch.equal(patches.view(4, 4), torch.tensor([[-1.0, -1.0, 3.0, 3.0]]).expand(4, -1))
    assert tokens.with_x(torch.arange(12.0).view(1, 2, 6)).on_grid().shape == (1, 6, 1, 2)
