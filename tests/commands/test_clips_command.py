"""Videos through the commands: trained, evaluated in several views, predicted, drawn, counted and exported."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import dyntune
from dyntune.commands.main import app
from dyntune.core.errors import DyntuneError

pytest.importorskip("av")
from dyntune.data.video_files import write_video


def invoke(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Bright and dark films, 6 to train on, 2 to choose by and 2 to test on."""
    root = tmp_path_factory.mktemp("films")
    noise = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 1), ("test", 1)):
        for name, level in (("bright", 180), ("dark", 20)):
            for number in range(count):
                frames = [noise.integers(level, level + 60, (32, 48, 3), dtype=np.uint8) for _ in range(6)]
                write_video(root / split / name / f"{number}.mp4", frames)
    return root


@pytest.fixture(scope="module")
def run(films, two_blocks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    own = ("--model", "vit_two_blocks", "--weights", two_blocks, "--method", "dyt", "--device", "cpu")
    clip = ("--frames", 2, "--stride", 2, "--views", "2x3", "--temporal", "mixer")
    invoke(
        "train", f"video-folder:{films}", "--out", folder, *own, *clip, "--epochs", 8, "--batch-size", 3, "--lr", 0.01
    )
    return folder


def test_a_run_is_evaluated_in_its_views_and_in_others(films, run):
    model = dyntune.load(run)
    assert model.preprocessing.clip.spans == 2 and model.preprocessing.clip.crops == 3
    macs = {}
    for views in ("2x3", "1x1"):
        result = json.loads(invoke("eval", run, f"video-folder:{films}", "--json", "--device", "cpu", "--views", views))
        assert result["images"] == 2 and result["accuracy"] == 1.0
        assert 0 <= result["activation"] <= 1
        macs[views] = result["macs"]
    assert 4 < macs["2x3"] / macs["1x1"] < 9


def test_averages_over_views(films, run):
    from dyntune.data import build_transform, load_data

    model = dyntune.load(run)
    data = load_data(f"video-folder:{films}").test
    views = build_transform(model.preprocessing, every_view=True)(data.read(0))
    with torch.no_grad():
        logits = model(views)
    expected = logits.softmax(-1).mean(0)
    rows = json.loads(invoke("predict", run, films / "test" / "bright", "--json", "--device", "cpu"))["predictions"]
    found = {top["class"]: top["probability"] for top in rows[0]["top"]}
    assert [found["bright"], found["dark"]] == pytest.approx(expected.tolist(), abs=1e-5)
    assert torch.allclose(model.task.averaged(logits[None], "logits"), logits.mean(0, keepdim=True))


def test_pictures_of_a_film(films, run, tmp_path):
    data = f"video-folder:{films}"
    film = films / "test" / "dark" / "0.mp4"
    invoke("visualize", run, film, "--out", tmp_path, "--device", "cpu", "--rates-on", data)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "activation-data.png",
        "activation.png",
        "tokens-1.gif",
        "tokens-1.png",
    ]
    with Image.open(tmp_path / "tokens-1.gif") as animation:
        assert animation.n_frames == 2


def test_costs_of_clips():
    figures = [
        json.loads(invoke("cost", "--model", "vit_two_blocks", "--classes", 4, "--json", *options))
        for options in ((), ("--frames", 8, "--temporal", "mean"))
    ]
    assert figures[1]["macs"] == 8 * figures[0]["macs"] and figures[1]["head_macs"] == figures[0]["head_macs"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("video-folder:{films}",), "the data are videos, but the backbone takes images"),
        (("digits", "--frames", 2), "the data are images, but the backbone takes clips"),
        (("digits", "--stride", 2), "options of clips need --frames"),
        (("video-folder:{films}", "--frames", 2, "--views", "three"), "expected clips x crops"),
    ],
)
def test_what_does_not_go_together(films, tmp_path, two_blocks, arguments, message):
    given = [str(argument).format(films=films) for argument in arguments]
    with pytest.raises(DyntuneError, match=re.escape(message)):
        invoke("train", *given, "--model", "vit_two_blocks", "--weights", two_blocks, "--out", tmp_path / "run")


def test_an_exported_clip_model_and_its_runner(films, run, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    folder = tmp_path / "onnx"
    data = f"video-folder:{films}"
    out = json.loads(invoke("export", run, "--out", folder, "--check", data, "--batch-size", 2, "--json"))
    assert out["check"]["agreement"] == 1.0 and out["check"]["largest_difference"] < 1e-4
    film = films / "test" / "dark" / "0.mp4"
    rows = json.loads(invoke("predict", folder, film, "--json", "--views", "1x1"))["predictions"]
    done = subprocess.run([sys.executable, folder / "run.py", film], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = dict(reversed(line.split()) for line in done.stdout.splitlines()[1:])
    assert {name: float(share) for name, share in said.items()} == pytest.approx(
        {top["class"]: top["probability"] for top in rows[0]["top"]}, abs=2e-4
    )
