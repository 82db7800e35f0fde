"""Reduction figures: merged, dropped, skipped and kept patches are drawn where they are, as they are in each block."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image

from dyntune import DyntuneError, tune
from dyntune.core.tokens import Provenance
from dyntune.parts.policies.base import Gate, Output, Reduction, TokenPolicy
from dyntune.studies.pictures import reduction_figure, save_figure
from dyntune.studies.pictures.page import GONE, VEIL, VEIL_SHARE

GRID = (2, 3)
MERGED = [0, 0, 1, 0, 2, 2]
"""Two tokens of several patches: the left three, and the right two of the second row."""


def sources(*owners: Sequence[int], present: Sequence[float] | None = None) -> Provenance:
    return Provenance(torch.tensor(owners), present=None if present is None else torch.tensor([present]))


def reduction(unit: str, *owners: Sequence[int], present: Sequence[float] | None = None) -> Reduction:
    return Reduction(unit, TokenPolicy(), sources(*owners, present=present), 0)


def output(*reductions: Reduction, gates: Sequence[Gate] = (), grid: tuple[int, int] = GRID) -> Output:
    return Output(torch.zeros(1), tuple(gates), grid, reductions)


def picture(seed: int = 0, scale: int = 1, grid: tuple[int, int] = GRID) -> Image.Image:
    """An image of one random colour per patch, ``scale`` pixels wide."""
    colours = np.random.default_rng(seed).integers(0, 256, (*grid, 3), dtype=np.uint8)
    return Image.fromarray(colours.repeat(scale, 0).repeat(scale, 1))


def plain(seed: int = 0) -> np.ndarray:
    return np.asarray(picture(seed)) / 255


def panels(figure: Figure) -> dict[str, AxesImage]:
    return {image.get_gid(): image for image in figure.axes[0].images}


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def colours(figure: Figure, gid: str) -> np.ndarray:
    """The median colour, rendered, of each patch of a panel: ``(rows, columns, 3)``, between 0 and 1."""
    assert isinstance(figure.canvas, FigureCanvasAgg)
    figure.canvas.draw()
    page = np.asarray(figure.canvas.buffer_rgba())[..., :3] / 255
    left, right, bottom, top = (round(edge) for edge in panels(figure)[gid].get_extent())
    panel = page[top:bottom, left:right]
    height, width = panel.shape[0] // GRID[0], panel.shape[1] // GRID[1]
    return np.median(panel.reshape(GRID[0], height, GRID[1], width, 3).swapaxes(1, 2), axis=(2, 3))


def borders(figure: Figure, gid: str) -> set[tuple[tuple[float, float], tuple[float, float]]]:
    """The lines drawn in a panel, their ends as ``(column, row)`` of the grid."""
    left, right, bottom, top = panels(figure)[gid].get_extent()
    found = set()
    for collection in figure.axes[0].collections:
        if collection.get_gid() == f"{gid} borders":
            for (x0, y0), (x1, y1) in collection.get_segments():
                across, down = GRID[1] / (right - left), GRID[0] / (bottom - top)
                start = (round((x0 - left) * across, 6), round((y0 - top) * down, 6))
                found.add((start, (round((x1 - left) * across, 6), round((y1 - top) * down, 6))))
    return found


@pytest.mark.parametrize("scale", [1, 40, 400])
def test_merged_patches_share_their_mean_colour_and_the_others_stay(scale: int) -> None:
    figure = reduction_figure([picture(scale=scale)], output(reduction("blocks.0.mlp", MERGED)))
    expected = plain()
    for token in (0, 2):
        members = np.array(MERGED).reshape(GRID) == token
        expected[members] = expected[members].mean(0)
    assert np.abs(colours(figure, "image 0 block 0") - expected).max() < 0.01
    assert "image 0 block 0 dropped" not in panels(figure)


def test_the_mean_is_over_all_pixels_of_a_patch() -> None:
    fine = np.random.default_rng(0).integers(0, 256, (8, 30, 3), dtype=np.uint8)
    figure = reduction_figure([Image.fromarray(fine)], output(reduction("blocks.0.mlp", MERGED)))
    left = [fine[:4, :10], fine[:4, 10:20], fine[4:, :10]]
    expected = np.mean([patch.reshape(-1, 3).mean(0) for patch in left], axis=0) / 255
    shown = colours(figure, "image 0 block 0")
    assert np.abs(np.stack([shown[0, 0], shown[0, 1], shown[1, 0]]) - expected).max() < 0.01


def test_borders_enclose_the_patches_of_a_token() -> None:
    figure = reduction_figure([picture()], output(reduction("blocks.0.mlp", MERGED)))
    assert borders(figure, "image 0 block 0") == {
        ((2, 0), (2, 1)),  # the first token ends before the single patch at the right,
        ((1, 1), (2, 1)),  # and above the second token,
        ((1, 1), (1, 2)),  # which lies right of it,
        ((2, 1), (3, 1)),  # and under the single patch
    }


def test_single_patches_have_no_borders() -> None:
    order = [3, 1, 0, 2, 5, 4]
    figure = reduction_figure([picture()], output(reduction("blocks.0", order)))
    assert not borders(figure, "image 0 block 0")
    assert np.abs(colours(figure, "image 0 block 0") - plain()).max() < 0.01
    assert "6 tokens" in texts(figure)


def test_dropped_patches_are_dark_and_counted_as_gone() -> None:
    figure = reduction_figure([picture(scale=20)], output(reduction("blocks.0.mlp", [-1, 0, 1, -1, 1, 2])))
    shown = colours(figure, "image 0 block 0")
    assert np.abs(shown[:, 0] - GONE).max() < 0.01
    assert np.abs(shown[:, 1][0] - plain()[0, 1]).max() < 0.01
    assert np.abs(shown[0, 2] - plain()[[0, 1], [2, 1]].mean(0)).max() < 0.01
    assert "3 tokens" in texts(figure)


def test_dropped_patches_are_hatched() -> None:
    figure = reduction_figure([picture()], output(reduction("blocks.0.mlp", [-1, 0, 1, 2, 3, 4])))
    left, right, bottom, top = panels(figure)["image 0 block 0"].get_extent()
    diagonals = [
        segment
        for collection in figure.axes[0].collections
        for segment in collection.get_segments()
        if segment[0][0] != segment[1][0] and segment[0][1] != segment[1][1] and segment[0][0] == left
    ]
    corner = [[left, (top + bottom) / 2], [left + (right - left) / 3, top]]
    assert np.allclose([segment for segment in diagonals if segment[0][1] < bottom], [corner])


def test_a_gate_veils_the_tokens_that_it_skips_and_says_how_many_it_computed() -> None:
    state = sources([0, 0, 1, 2, 2, -1])
    gate = Gate("blocks.0.mlp", torch.tensor([[1.0, 1.0, 0.0]]), TokenPolicy(), provenance=state)
    reduced = Reduction("blocks.0.mlp", TokenPolicy(), state, 4)
    figure = reduction_figure([picture()], output(reduced, gates=[gate]))
    expected = plain()
    expected[0, :2] = expected[0, :2].mean(0)
    expected[1, :2] = (1 - VEIL_SHARE) * expected[1, :2].mean(0) + VEIL_SHARE * np.array(VEIL)
    expected[1, 2] = GONE
    assert np.abs(colours(figure, "image 0 block 0") - expected).max() < 0.02
    assert {"3 tokens", "67 % active"} <= set(texts(figure))


def test_a_panel_per_block_that_decides_something_in_its_latest_state() -> None:
    gates = [Gate(f"blocks.{block}.mlp", torch.ones(1, 6), TokenPolicy()) for block in (0, 1)]
    reductions = [reduction("blocks.2", [0, 1, 2, 3, 4, 4]), reduction("blocks.5.mlp", [0, 1, 2, 2, -1, -1])]
    figure = reduction_figure([picture()], output(*reductions, gates=gates))
    written = texts(figure)
    assert [words for words in written if words.startswith("block ")] == [f"block {block}" for block in (0, 1, 2, 5)]
    assert [words for words in written if words.endswith("tokens")] == ["6 tokens", "6 tokens", "5 tokens", "3 tokens"]


def test_of_attention_and_mlp_the_gates_of_the_mlp_are_shown() -> None:
    gates = [
        Gate(f"blocks.0.{kind}", torch.tensor([values]), TokenPolicy())
        for kind, values in (("attn", [0.0] * 6), ("mlp", [1.0] * 6))
    ]
    figure = reduction_figure([picture()], output(reduction("blocks.0", range(6)), gates=gates))
    assert "100 % active" in texts(figure)
    assert "gate of the MLP" in " ".join(texts(figure))


def test_each_image_has_its_own_tokens_and_title() -> None:
    both = output(reduction("blocks.0.mlp", [0, 1, 2, 3, 4, 4], [0, 0, 0, 0, 0, 0]))
    figure = reduction_figure([picture(1), picture(2)], both, ["a $x^2$ cat", "a dog"])
    assert {"5 tokens", "1 token", "a $x^2$ cat", "a dog"} <= set(texts(figure))
    assert np.abs(colours(figure, "image 1 block 0") - plain(2).reshape(-1, 3).mean(0)).max() < 0.01
    assert np.abs(colours(figure, "image 0 block 0")[0] - plain(1)[0]).max() < 0.01


def test_tokens_that_training_hides_count_as_dropped() -> None:
    first = Reduction("blocks.0", TokenPolicy(), Provenance(present=torch.tensor([[1.0, 0, 1, 1, 1, 1]])), 6)
    figure = reduction_figure([picture()], output(first, reduction("blocks.1", MERGED, present=[0.0, 1.0, 1.0])))
    assert np.abs(colours(figure, "image 0 block 0")[0, 1] - GONE).max() < 0.01
    assert np.abs(colours(figure, "image 0 block 1")[:, 0] - GONE).max() < 0.01
    assert {"5 tokens", "2 tokens"} <= set(texts(figure))


@pytest.mark.parametrize(
    ("owner", "present"),
    [([0, 1, 2, 3, 4, 5], []), (MERGED, ["merged"]), ([0, 1, -1, -1, -1, -1], ["dropped"])],
)
def test_the_legend_names_what_occurs(owner: list[int], present: list[str]) -> None:
    figure = reduction_figure([picture()], output(reduction("blocks.0.mlp", owner)))
    entries = [gid.removeprefix("legend ").split(":")[0] for gid in panels(figure) if gid.startswith("legend")]
    entries = list(dict.fromkeys(entries))
    assert entries == ["kept", *present]


@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (16, 16), (10, 20)])
@pytest.mark.parametrize(("blocks", "columns"), [(3, 3), (12, 6), (24, 12)])
def test_at_most_two_lines_of_about_1600_pixels_in_which_nothing_overlaps(
    grid: tuple[int, int], blocks: int, columns: int
) -> None:
    reductions = [reduction(f"blocks.{block}.mlp", [0] * (grid[0] * grid[1])) for block in range(blocks)]
    figure = reduction_figure([picture(grid=grid)], output(*reductions, grid=grid), ["title"])
    width, height = figure.get_size_inches() * figure.dpi
    assert 800 <= width <= 1750
    assert blocks < 12 or width >= 1400
    boxes = [image.get_extent() for gid, image in panels(figure).items() if not gid.endswith("merged")]
    tops = [box[3] for box in boxes[1 : 1 + blocks]]
    assert len(set(tops)) <= 2 and tops.count(tops[0]) == columns
    for number, (left, right, bottom, top) in enumerate(boxes):
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        for other in boxes[number + 1 :]:
            assert right <= other[0] or other[1] <= left or bottom <= other[3] or other[2] <= top


@pytest.mark.parametrize("grid", [(8, 8), (16, 8)])
def test_every_word_is_on_the_page(grid: tuple[int, int]) -> None:
    patches = grid[0] * grid[1]
    state = sources([0, 0, -1, *range(1, patches - 2)])
    gate = Gate("blocks.0", torch.zeros(1, patches - 2), TokenPolicy(), provenance=state)
    ran = output(Reduction("blocks.0", TokenPolicy(), state, 0), gates=[gate], grid=grid)
    figure = reduction_figure([picture(grid=grid)], ran)
    width, height = figure.get_size_inches() * figure.dpi
    for text in figure.axes[0].texts:
        place = text.get_window_extent()
        assert place.x0 >= 0 and place.x1 <= width and place.y0 >= 0 and place.y1 <= height, text.get_text()


def test_columns_can_be_chosen() -> None:
    reductions = [reduction(f"blocks.{block}.mlp", MERGED) for block in range(5)]
    shown = panels(reduction_figure([picture()], output(*reductions), columns=2))
    assert shown["image 0 block 0"].get_extent()[0] == shown["image 0 block 4"].get_extent()[0]


def test_a_tuned_model_that_merges_and_gates(tmp_path: Path, make_host, images_for, randomise) -> None:
    model = tune(make_host("oblong"), "dispatch:where=mlp", "tome:r=2").eval()
    randomise(model)
    with torch.no_grad():
        ran = model.run(images_for(model.backbone.host, 2))
    figure = reduction_figure([picture(grid=(3, 5))] * 2, ran)
    for words in ("13 tokens", "11 tokens", "9 tokens"):
        assert texts(figure).count(words) == 2
    assert {f"image {image} block {block} merged" for image in (0, 1) for block in range(3)} <= set(panels(figure))
    assert save_figure(figure, tmp_path / "reductions.svg").read_text().count("<image") >= 2 * 7


def test_nothing_reduced_is_an_error_that_says_what_to_do() -> None:
    gates = [Gate("blocks.0.mlp", torch.ones(1, 6), TokenPolicy())]
    with pytest.raises(DyntuneError, match=r"neither merges nor drops.*tome.*token_figure"):
        reduction_figure([picture()], output(gates=gates))


@pytest.mark.parametrize(
    ("images", "titles", "columns", "message"),
    [
        (2, None, None, r"the reduction at blocks\.0\.mlp has shape \(1, 6\): expected .* \(2, 6\)"),
        (1, ["a", "b"], None, "2 titles for 1 image:"),
        (0, None, None, "0 images"),
        (1, None, 0, "0 columns"),
    ],
)
def test_numbers_that_do_not_fit(images: int, titles: list[str], columns: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reduction_figure([picture()] * images, output(reduction("blocks.0.mlp", MERGED)), titles, columns=columns)
