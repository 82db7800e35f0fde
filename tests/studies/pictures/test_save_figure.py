"""Saving figures: the suffix decides, files are replaced as a whole, and no state is shared between threads."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from matplotlib._pylab_helpers import Gcf
from matplotlib.figure import Figure
from PIL import Image

from dyntune import DyntuneError
from dyntune.studies.pictures import activation_figure, save_figure


@pytest.fixture
def figure() -> Figure:
    return activation_figure({"DyT": [("blocks.0.mlp", 0.25), ("blocks.1.mlp", 0.75)]}, {"DyT": 0.5})


@pytest.mark.parametrize(
    ("name", "start"), [("a.png", b"\x89PNG"), ("a.PNG", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")]
)
def test_the_suffix_decides(figure: Figure, tmp_path: Path, name: str, start: bytes) -> None:
    path = save_figure(figure, tmp_path / "new" / name)
    assert path == tmp_path / "new" / name
    assert path.read_bytes().startswith(start)
    assert [file.name for file in path.parent.iterdir()] == [name]


def test_without_a_suffix_it_is_png(figure: Figure, tmp_path: Path) -> None:
    path = save_figure(figure, str(tmp_path / "rates"))
    assert path == tmp_path / "rates.png"
    with Image.open(path) as image:
        assert image.size == tuple(round(length * 150) for length in figure.get_size_inches())


@pytest.mark.parametrize("name", ["a.jpg", "rate0.5", "a.png.txt"])
def test_another_suffix_is_an_error(figure: Figure, tmp_path: Path, name: str) -> None:
    with pytest.raises(DyntuneError, match=r"expected a name ending in \.png, \.svg, \.pdf"):
        save_figure(figure, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(figure: Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_text("old")

    def fail(file: Path, **_: object) -> None:
        file.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(DyntuneError, match="no room left"):
        save_figure(figure, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_an_error(figure: Figure, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DyntuneError, match="cannot write"):
        save_figure(figure, tmp_path / "file" / "a.png")


def test_figures_are_drawn_in_threads_and_pyplot_holds_none(tmp_path: Path) -> None:
    def draw(number: int) -> bytes:
        rates = {"DyT": [("blocks.0.mlp", 0.25)]}
        return save_figure(activation_figure(rates), tmp_path / f"{number}.png").read_bytes()

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(draw, range(8)))) == 1
    assert not Gcf.figs
