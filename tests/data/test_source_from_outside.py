"""A data source that another distribution adds (``outside/``), from its entry point to predictions."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from dyntune.commands import common
from dyntune.commands.main import app
from dyntune.core.errors import DataError
from dyntune.data import load_data
from dyntune.data.datasets import FileImages
from dyntune.data.load import sources
from dyntune.data.sources.base import Source


@pytest.fixture
def stripes(monkeypatch):
    """The distribution in ``outside/`` is installed for as long as a test runs."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "outside"))
    sources.cache_clear()
    yield
    sources.cache_clear()
    sys.modules.pop("stripes", None)


def report(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in (*arguments, "--device", "cpu", "--json")])
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


@pytest.mark.usefixtures("stripes")
def test_it_is_loaded_trained_on_evaluated_and_predicted(tmp_path):
    splits = load_data("stripes", seed=3, val_fraction=0.25)
    assert (splits.name, splits.classes) == ("stripes", ("red", "blue"))
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [18, 6, 8]
    assert load_data("stripes", seed=4).test[0][0].tobytes() != splits.test[0][0].tobytes()

    run = tmp_path / "run"
    options = ("--method", "linear", "--epochs", 1, "--batch-size", 4, "--lr", 0.1, "--warmup-epochs", 0)
    report("train", "stripes", "--out", run, *options)
    evaluated = report("eval", run, "stripes")
    assert (evaluated["images"], evaluated["accuracy"]) == (8, 1.0)
    for index in range(4):
        splits.test[index][0].save(tmp_path / f"{index}.png")
    rows = report("predict", run, tmp_path / "*.png")["predictions"]
    assert [row["top"][0]["class"] for row in rows] == ["red", "blue", "red", "blue"]


@pytest.mark.usefixtures("stripes")
def test_errors_and_help_name_it():
    with pytest.raises(DataError, match=r"Did you mean 'stripes'.*Expected one of: digits, .*stripes; folder:PATH"):
        load_data("strips")
    # The module that writes the help was read before the distribution was there.
    argument = runpy.run_path(common.__file__)["DataArgument"]
    program = typer.Typer()

    @program.command()
    def command(data: argument) -> None: ...

    words = CliRunner().invoke(program, ["--help"]).output.replace("│", " ").split()
    assert "digits, motion, shapes-location, shapes-orientation, stripes; folder:PATH" in " ".join(words)


def test_without_its_distribution_it_is_not_there():
    with pytest.raises(DataError, match=r"no data set 'stripes'.*shapes-orientation; folder:PATH"):
        load_data("stripes")


class Marked(Source):
    """Folders with a file called ``mark``; their one image is ``1.png``."""

    prefix = "marked:"

    def recognises(self, path):
        return (path / "mark").is_file()

    def load(self, request):
        image = FileImages([request.path / "1.png"], [0])
        return request.splits(image, image, classes=[request.given])


def test_a_folder_that_a_source_knows_is_not_taken_for_an_image_folder(tmp_path, monkeypatch):
    found = (*sources(), Marked())
    monkeypatch.setattr("dyntune.data.load.sources", lambda: found)
    for name in ("owl", "cat"):
        (tmp_path / name).mkdir()
    for name in ("1.png", "cat/1.png", *(f"owl/{number}.png" for number in range(3))):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    assert load_data(tmp_path).classes == ("cat", "owl")
    (tmp_path / "mark").touch()
    assert load_data(tmp_path).classes == load_data(f"marked:{tmp_path}").classes == (str(tmp_path),)
    assert load_data(f"folder:{tmp_path}").classes == ("cat", "owl")
