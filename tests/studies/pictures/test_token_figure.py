"""Token figures: skipped patches are veiled exactly where they are, and the numbers that are written are right."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image

from dyntune import DyntuneError
from dyntune.core.tokens import Provenance
from dyntune.parts.policies.base import Gate, TokenPolicy
from dyntune.studies.pictures import save_figure, token_figure
from dyntune.studies.pictures.page import GONE, VEIL, VEIL_SHARE
from dyntune.studies.pictures.patches import split_path

GRID = (3, 5)
PATCHES = GRID[0] * GRID[1]


def gate(unit: str, values: Sequence[Sequence[float]] | torch.Tensor) -> Gate:
    return Gate(unit, torch.as_tensor(values, dtype=torch.float32), TokenPolicy())


def picture(seed: int = 0, scale: int = 1) -> Image.Image:
    """An image of one random colour per patch, ``scale`` pixels wide."""
    colours = np.random.default_rng(seed).integers(0, 256, (*GRID, 3), dtype=np.uint8)
    return Image.fromarray(colours.repeat(scale, 0).repeat(scale, 1))


def panels(figure: Figure) -> dict[str, AxesImage]:
    return {image.get_gid(): image for image in figure.axes[0].images}


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def rendered_patches(figure: Figure, gid: str) -> np.ndarray:
    """Every pixel of a panel as rendered but for a frame of one, as (rows, columns, pixels, 3), between 0 and 1."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    page = np.asarray(canvas.buffer_rgba())[..., :3] / 255
    left, right, bottom, top = (round(edge) for edge in panels(figure)[gid].get_extent())
    panel = page[top:bottom, left:right]
    height, width = panel.shape[0] // GRID[0], panel.shape[1] // GRID[1]
    assert panel.shape[:2] == (height * GRID[0], width * GRID[1])
    split = panel.reshape(GRID[0], height, GRID[1], width, 3).swapaxes(1, 2)
    return split[:, :, 1:-1, 1:-1].reshape(*GRID, -1, 3)


def test_a_large_photograph_is_drawn_from_as_many_pixels_as_its_panels_show() -> None:
    gates = [gate(f"blocks.{block}.mlp", [[1.0] * PATCHES]) for block in range(3)]
    large = panels(token_figure([picture(scale=700)], gates, GRID))
    small = panels(token_figure([picture(scale=40)], gates, GRID))
    for gid, panel in large.items():
        if panel.get_array().ndim == 3:
            assert panel.get_array().size < 3500 * 2100 * 3 / 8, gid
            assert small[gid].get_array().shape == (120, 200, 3)


@pytest.mark.parametrize("scale", [1, 4, 40])
def test_skipped_patches_are_veiled_and_active_ones_untouched(scale: int) -> None:
    image = picture(scale=scale)
    active = np.random.default_rng(1).random(PATCHES) < 0.5
    figure = token_figure([image], [gate("blocks.0.mlp", active[None])], GRID)
    drawn = rendered_patches(figure, "image 0 block 0 mlp")
    plain = np.asarray(picture()) / 255
    veiled = (1 - VEIL_SHARE) * plain + VEIL_SHARE * np.array(VEIL)
    expected = np.where(active.reshape(*GRID, 1), plain, veiled)
    assert np.abs(drawn - expected[:, :, None]).max() < 0.02
    # Thin lines rule the image itself, so the middle value of each patch is what counts.
    assert np.abs(np.median(rendered_patches(figure, "image 0"), axis=2) - plain).max() < 0.01


def test_patches_are_counted_row_by_row() -> None:
    only_second_row_first_column = np.arange(PATCHES) == GRID[1]
    black = Image.new("RGB", (50, 30))
    figure = token_figure([black], [gate("blocks.0", only_second_row_first_column[None])], GRID)
    dark = rendered_patches(figure, "image 0 block 0 layer").max((2, 3)) < 0.01
    assert np.argwhere(dark).tolist() == [[1, 0]]


def test_each_image_gets_its_own_row_of_the_batch() -> None:
    values = torch.zeros(2, PATCHES)
    values[1] = 1
    figure = token_figure([picture(1), picture(2)], [gate("blocks.0.mlp", values)], GRID)
    assert "image 0 block 0 mlp skipped" in panels(figure)
    assert "image 1 block 0 mlp skipped" not in panels(figure)
    drawn = rendered_patches(figure, "image 1 block 0 mlp")
    assert np.abs(drawn - (np.asarray(picture(2)) / 255)[:, :, None]).max() < 0.01
    assert texts(figure).count("0 %") == texts(figure).count("100 %") == 1


def test_shares_block_numbers_and_titles_are_written() -> None:
    values = torch.zeros(1, PATCHES)
    values[0, :6] = 1
    gates = [gate("blocks.2.mlp", values), gate("blocks.10.mlp", torch.ones(1, PATCHES))]
    written = texts(token_figure([picture()], gates, GRID, ["a $x^2$ cat"]))
    assert [words for words in written if words.startswith("block ")] == ["block 2", "block 10"]
    assert [words for words in written if words.endswith(" %")] == ["40 %", "100 %"]
    assert "a $x^2$ cat" in written
    assert "MLP" in written


def test_long_titles_are_wrapped_and_cut() -> None:
    figure = token_figure([picture()], [gate("blocks.0", torch.ones(1, PATCHES))], GRID, ["word " * 100])
    assert sum(words.startswith("word") for words in texts(figure)) == 3
    assert any(words.endswith("…") for words in texts(figure))


def test_heat_map_counts_blocks_per_patch() -> None:
    values = (torch.rand(4, 1, PATCHES, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    figure = token_figure([picture()], [gate(f"blocks.{i}.mlp", v) for i, v in enumerate(values)], GRID)
    heat = panels(figure)["image 0 times mlp"]
    np.testing.assert_array_equal(heat.get_array(), values.sum(0).reshape(GRID).numpy())
    assert heat.get_clim() == (0, 4)
    assert figure.axes[1].get_ylim() == (0, 4)


def test_attention_and_mlp_have_a_line_each_under_the_same_block_numbers() -> None:
    one = torch.ones(1, PATCHES)
    gates = [gate(f"blocks.{block}.{kind}", one) for block in range(3) for kind in ("attn", "mlp")]
    figure = token_figure([picture()], gates, GRID)
    shown = panels(figure)
    attention, mlp = (shown[f"image 0 block 1 {kind}"].get_extent() for kind in ("attn", "mlp"))
    assert attention[:2] == mlp[:2]
    assert attention[2] < mlp[3]
    assert {"image 0 times attn", "image 0 times mlp"} <= set(shown)
    assert shown["image 0 times attn"].get_clim() == (0, 3)
    assert texts(figure).count("block 1") == 1
    assert {"attention", "MLP"} <= set(texts(figure))


def test_a_deep_model_wraps_into_lines_with_their_own_numbers() -> None:
    gates = [gate(f"blocks.{block}.mlp", torch.ones(2, PATCHES)) for block in range(5)]
    figure = token_figure([picture(), picture()], gates, GRID, columns=2)
    shown = panels(figure)
    assert shown["image 0 block 0 mlp"].get_extent()[0] == shown["image 0 block 4 mlp"].get_extent()[0]
    assert texts(figure).count("block 4") == 2
    np.testing.assert_array_equal(shown["image 1 times mlp"].get_array(), np.full(GRID, 5))


@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (16, 16), (10, 20)])
def test_twelve_blocks_are_about_1600_pixels_wide_and_nothing_overlaps(grid: tuple[int, int]) -> None:
    gates = [gate(f"blocks.{block}.mlp", torch.zeros(6, grid[0] * grid[1])) for block in range(12)]
    figure = token_figure([picture()] * 6, gates, grid, ["title"] * 6)
    width, height = figure.get_size_inches() * figure.dpi
    assert 1400 <= width <= 1800
    boxes = [image.get_extent() for gid, image in panels(figure).items() if not gid.endswith("skipped")]
    assert len(boxes) == 6 * 14
    for number, (left, right, bottom, top) in enumerate(boxes):
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        for other in boxes[number + 1 :]:
            assert right <= other[0] or other[1] <= left or bottom <= other[3] or other[2] <= top


def test_gates_of_a_training_pass_can_be_drawn() -> None:
    values = torch.ones(1, PATCHES, requires_grad=True) * 1.0
    figure = token_figure([picture()], [Gate("blocks.0.mlp", values.to(torch.bfloat16), TokenPolicy())], GRID)
    assert "100 %" in texts(figure)


def test_gates_of_a_tuned_model_can_be_drawn(tmp_path: Path) -> None:
    import timm

    from dyntune import tune

    host = timm.create_model(
        "vit_tiny_patch16_224", img_size=(16, 24), patch_size=8, depth=2, embed_dim=24, num_heads=2, num_classes=3
    )
    model = tune(host, "dyt:dispatch=attn-mlp").eval()
    with torch.no_grad():
        gates = model.run(torch.rand(2, 3, 16, 24)).gates
    figure = token_figure([picture(), picture()], gates, (2, 3))
    for gate_ in gates:
        block, kind = split_path(gate_.unit)
        assert f"image 1 block {block} {kind}" in panels(figure)
    assert save_figure(figure, tmp_path / "tokens.svg").read_text().count("<image") >= 2 * 5


def reduced_gate(unit: str, values: Sequence[float], owner: Sequence[int], present: Sequence[float] | None) -> Gate:
    hidden = None if present is None else torch.tensor([present])
    return Gate(
        unit, torch.tensor([values]), TokenPolicy(), provenance=Provenance(torch.tensor([owner]), present=hidden)
    )


@pytest.mark.parametrize("present", [None, [1.0, 1.0, 1.0, 0.0]])
def test_tokens_are_mapped_back_to_their_patches(present: list[float] | None) -> None:
    # The first row is one skipped token, the second one active token, and of the third only one patch is left.
    owner = [0] * 5 + [1] * 5 + ([-1] * 4 if present is None else [3] * 4) + [2]
    values = [0.0, 1.0, 1.0] if present is None else [0.0, 1.0, 1.0, 1.0]
    figure = token_figure([picture()], [reduced_gate("blocks.0.mlp", values, owner, present)], GRID)
    drawn = np.median(rendered_patches(figure, "image 0 block 0 mlp"), axis=2)
    plain = np.asarray(picture()) / 255
    expected = plain.copy()
    expected[0] = (1 - VEIL_SHARE) * plain[0] + VEIL_SHARE * np.array(VEIL)
    expected[2, :4] = GONE
    assert np.abs(drawn - expected).max() < 0.02
    assert "67 %" in texts(figure)
    note = " ".join(texts(figure))
    assert "share of the tokens left" in note and "Dropped patches are dark" in note
    times = panels(figure)["image 0 times mlp"].get_array()
    np.testing.assert_array_equal(times, [[0] * 5, [1] * 5, [0] * 4 + [1]])


def test_gates_of_different_numbers_of_tokens_can_be_drawn() -> None:
    few = reduced_gate("blocks.1.mlp", [1.0, 0.0], [0] * 8 + [1] * 7, None)
    figure = token_figure([picture()], [gate("blocks.0.mlp", torch.ones(1, PATCHES)), few], GRID)
    assert [words for words in texts(figure) if words.endswith(" %")] == ["100 %", "50 %"]
    heat = panels(figure)["image 0 times mlp"].get_array()
    np.testing.assert_array_equal(heat.ravel(), [2] * 8 + [1] * 7)
    assert not any("Dropped" in words for words in texts(figure))


def test_no_gates_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(DyntuneError, match="tune it with dyt or dispatch"):
        token_figure([picture()], [], GRID)


@pytest.mark.parametrize(
    ("images", "titles", "patches", "columns", "message"),
    [
        (2, None, PATCHES, 12, r"shape \(1, 15\): expected .* \(2, 15\)"),
        (1, None, PATCHES + 1, 12, "shape"),
        (1, ["a", "b"], PATCHES, 12, "2 titles for 1 image:"),
        (0, None, PATCHES, 12, "0 images"),
        (1, None, PATCHES, 0, "0 columns"),
    ],
)
def test_numbers_that_do_not_fit(images: int, titles: list[str], patches: int, columns: int, message: str) -> None:
    gates = [gate("blocks.0.mlp", torch.ones(1, patches))]
    with pytest.raises(ValueError, match=message):
        token_figure([picture()] * images, gates, GRID, titles, columns=columns)


def test_unit_paths() -> None:
    assert [split_path(path) for path in ("blocks.3.mlp", "blocks.11.attn", "blocks.0")] == [
        (3, "mlp"),
        (11, "attn"),
        (0, "layer"),
    ]
    with pytest.raises(ValueError, match=r"'head' is no unit's path: expected blocks\.3"):
        split_path("head")
