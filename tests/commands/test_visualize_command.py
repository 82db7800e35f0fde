"""``dyntune visualize``: which pictures there are depends on what the model does with its tokens."""

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dyntune.backbones.builtin import BUILTIN_BACKBONE
from dyntune.commands.main import app
from dyntune.core.errors import DyntuneError
from dyntune.model.tune import build_tuned


def visualize(spec, photos, folder, *options):
    torch.manual_seed(0)
    build_tuned(BUILTIN_BACKBONE, spec, classes=("a", "b", "c")).save(folder / "run")
    arguments = ["visualize", str(folder / "run"), str(photos / "test" / "red"), "--out", str(folder / "out")]
    return CliRunner().invoke(app, [*arguments, "--per-figure", "3", "--device", "cpu", *options])


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("linear+dispatch", ["activation", "tokens-1", "tokens-2"]),
        ("linear+tome:r=4", ["reductions-1", "reductions-2"]),
        ("dispatch+tome:r=4", ["activation", "reductions-1", "reductions-2", "tokens-1", "tokens-2"]),
    ],
)
def test_pictures(photos, tmp_path, spec, expected):
    done = visualize(spec, photos, tmp_path)
    assert done.exit_code == 0, done.output
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == [f"{name}.png" for name in expected]
    assert all(Image.open(file).width > 600 for file in files)
    assert done.output.count("wrote") == len(expected)


def test_blocks_are_chosen(photos, tmp_path):
    done = visualize("linear+dispatch", photos, tmp_path, "--blocks", "0,7")
    assert done.exit_code == 0, done.output
    assert done.stdout.count(", blocks 0, 7 of 12 with gates (--blocks all for every one)") == 2
    few = Image.open(tmp_path / "out" / "tokens-1.png").width
    every = visualize("linear+dispatch", photos, tmp_path, "--blocks", "all")
    assert "blocks 0" not in every.output and few < Image.open(tmp_path / "out" / "tokens-1.png").width
    for spec, blocks, reason in (
        ("linear+dispatch", "12", "gated in the blocks 12; those with gates are 0, 1"),
        ("linear+dispatch", "first", "--blocks 'first': expected numbers"),
        ("linear+tome:r=4", "3", "the model gates no unit"),
    ):
        wrong = visualize(spec, photos, tmp_path, "--blocks", blocks)
        assert isinstance(wrong.exception, DyntuneError) and reason in str(wrong.exception)


@pytest.mark.parametrize(("spec", "reason"), [("linear", "has no token policy"), ("linear+tome:r=0", "drops no token")])
def test_nothing_to_show(photos, tmp_path, spec, reason):
    done = visualize(spec, photos, tmp_path)
    assert isinstance(done.exception, DyntuneError) and reason in str(done.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["eval", "predict", "visualize"])
def test_a_policy_is_put_on_a_run_that_was_trained_without(photos, tmp_path, command):
    torch.manual_seed(0)
    run = build_tuned(BUILTIN_BACKBONE, "linear", classes=("blue", "green", "red")).save(tmp_path / "run")
    red = str(photos / "test" / "red")
    rest = {"eval": [f"folder:{photos}"], "predict": [red], "visualize": [red, "--out", str(tmp_path / "out")]}[command]
    arguments = [command, str(run), *rest, "--policy", "tome:r=4", "--device", "cpu"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    if command == "visualize":
        assert [file.name for file in (tmp_path / "out").iterdir()] == ["reductions-1.png"]
    else:
        assert "linear+tome:r=4" in done.output
    if command == "eval":
        assert "active patches" not in done.output
        counts = [line.split()[-2] for line in done.output.splitlines() if "tokens in blocks" in line]
        assert counts == [str(65 - 4 * block) for block in range(1, 13)]


def test_pictures_of_an_earlier_call_are_told_of(photos, tmp_path):
    visualize("linear+dispatch", photos, tmp_path)
    (tmp_path / "out" / "notes.png").touch()
    (tmp_path / "out" / "tokens-3.png").touch()
    done = visualize("linear+dispatch", photos, tmp_path)
    assert done.stdout.count(", in the place of an earlier one") == 3 == done.stdout.count("wrote ")
    assert f"of an earlier call, {tmp_path / 'out'} still has tokens-3.png" in done.stderr.replace("\n", "")
