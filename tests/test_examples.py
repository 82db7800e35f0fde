"""The scripts in examples/, each with its switch for seconds."""

import importlib
import inspect
import json
import tomllib
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import dyntune
from dyntune.commands.main import app
from dyntune.parts.registry import registered

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    """``example(name)`` is the module of a script, imported from beside it as its users do."""

    def imported(name: str):
        monkeypatch.syspath_prepend((EXAMPLES / name).parent)
        return importlib.import_module(Path(name).stem)

    return imported


def test_adapt_and_look(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    adapt = example("adapt.py")
    result = adapt.main(Path("runs/adapt"), quick=True)
    assert result.images == 48 and 0 < result.activation < 1
    said = capsys.readouterr().out
    assert f"accuracy {result.accuracy:.1%}" in said and "97.1 M without skipping" in said
    assert Image.open("runs/adapt/tokens.png").width > 600
    assert dyntune.load("runs/adapt").spec == "dyt"
    adapt.main(Path("runs/adapt"), quick=True)  # once more, which finds the run finished


def test_make_it_fast(example, capsys):
    seconds = example("faster.py").main(quick=True)
    said = capsys.readouterr().out.splitlines()
    assert len(seconds) >= 4 and [line.partition("  ")[0] for line in said[-len(seconds) :]] == list(seconds)


def test_a_method_of_ones_own_is_trained_in_its_script(example, capsys):
    result = example("own_method/channel_gain.py").main(quick=True)
    assert result.accuracy > 0.3
    assert "channel-gain: 1,152 parameters" in capsys.readouterr().out


def test_and_by_every_command_once_it_is_installed(example, photos, two_blocks, tmp_path, monkeypatch):
    module = example("own_method/channel_gain.py")
    project = tomllib.loads((EXAMPLES / "own_method/pyproject.toml").read_text())
    points = project["project"]["entry-points"]
    installed = tmp_path / "site" / "channel_gain-1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: channel-gain\nVersion: 1.0\n")
    lines = [line for group, named in points.items() for line in (f"[{group}]", *map(" = ".join, named.items()))]
    (installed / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path / "site")
    registered.cache_clear()
    assert project["tool"]["setuptools"]["py-modules"] == [module.__name__]

    def says(*arguments):
        done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    run = tmp_path / "run"
    model = ("--model", "vit_two_blocks", "--weights", two_blocks)
    trained = says("train", photos, *model, "--method", "channel-gain", "--out", run, "--epochs", 1, "--device", "cpu")
    assert trained["trainable_params"] == 2 * 96
    assert says("eval", run, photos)["images"] == 12
    registered.cache_clear()


def test_a_method_of_ones_own_takes_thirty_lines(example):
    module = example("own_method/channel_gain.py")
    lines = [line for part in (module.Gain, module.ChannelGain) for line in inspect.getsource(part).splitlines()]
    assert len(list(filter(None, lines))) <= 30
