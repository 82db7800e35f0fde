"""Videos through the commands: trained, evaluated in several views, predicted, drawn, counted and exported."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import dyntune
from dyntune.commands.clips import ClipOptions
from dyntune.commands.main import app
from dyntune.core.errors import DyntuneError, SpecError
from dyntune.data import Preprocessing, Video
from dyntune.data.clips import Sampling

pytest.importorskip("av")
from dyntune.data.video_files import FORMATS, write_video


def run_command(*arguments, status=0):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == status, done.output
    return done


def invoke(*arguments):
    return run_command(*arguments).stdout


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
    done = run_command(
        "train", f"video-folder:{films}", "--out", folder, *own, *clip, "--epochs", 8, "--batch-size", 3, "--lr", 0.01
    )
    assert "for other rates on 2 videos" in done.stderr and "calibrated on 2 videos" in done.stdout
    return folder


def test_a_run_is_evaluated_in_its_views_and_in_others(films, run):
    model = dyntune.load(run)
    assert model.preprocessing.clip.spans == 2 and model.preprocessing.clip.crops == 3
    macs = {}
    for views in ("2x3", "1x1"):
        result = json.loads(invoke("eval", run, f"video-folder:{films}", "--json", "--device", "cpu", "--views", views))
        assert result["images"] == 2 and result["accuracy"] == 1.0
        assert 0 <= result["activation"] <= 1
        assert result["trained_on"] == result["selected_on"] == 0
        assert result["macs"] <= 1.2 * result["dense_macs"]
        macs[views] = result["macs"]
    assert 4 < macs["2x3"] / macs["1x1"] < 9


def test_averages_over_views(films, run, monkeypatch):
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
    sizes, forward = [], dyntune.TunedModel.forward
    monkeypatch.setattr(
        dyntune.TunedModel, "forward", lambda own, clips: sizes.append(len(clips)) or forward(own, clips)
    )
    done = invoke("predict", run, films / "test" / "bright", "--json", "--device", "cpu", "--batch-size", 4)
    assert sizes == [4, 2]
    top = json.loads(done)["predictions"][0]["top"]
    assert {each["class"]: each["probability"] for each in top} == pytest.approx(found, abs=1e-6)
    assert torch.allclose(model.task.averaged(logits[None], "logits"), logits.mean(0, keepdim=True))
    sure = model.task.averaged(torch.tensor([[[500.0, 0.0], [400.0, 0.0]]]), "probabilities")
    assert sure.isfinite().all() and torch.allclose(sure, torch.tensor([[0.0, -400.0 - float(np.log(2))]]), atol=1e-4)


def test_pictures_of_a_film(films, run, tmp_path):
    data = f"video-folder:{films}"
    film = films / "test" / "dark" / "0.mp4"
    rates = ("--rates-on", data, "--rates-on", f"video-folder:{films / 'train'}", "--format", "svg")
    invoke("visualize", run, film, "--out", tmp_path, "--device", "cpu", *rates)
    drawn = ["activation-data.svg", "activation.svg", "tokens-1.gif", "tokens-1.svg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == drawn
    legend = (tmp_path / "activation-data.svg").read_text()
    assert data in legend and f"video-folder:{films / 'train'}" in legend
    with Image.open(tmp_path / "tokens-1.gif") as animation:
        assert animation.n_frames == 2
    some = ("--animation", "mp4", "--blocks", 1)
    drawn = invoke("visualize", run, film, "--out", tmp_path / "mp4", "--device", "cpu", *some)
    assert drawn.count(", block 1 of 2 with gates (--blocks all for every one)") == 2
    assert len(Video(tmp_path / "mp4" / "tokens-1.mp4")) == 2
    again = run_command("visualize", run, film, "--out", tmp_path / "mp4", "--device", "cpu", "--animation", "mp4")
    assert "tokens-1.mp4 of 0.mp4, in the place of an earlier one" in again.stdout
    other = run_command("visualize", run, film, "--out", tmp_path / "mp4", "--device", "cpu")
    assert "still has tokens-1.mp4" in other.stderr


@pytest.fixture
def shelf(films, tmp_path):
    """A folder with a film, one as a folder of frames, and one that is none."""
    shutil.copytree(films / "test" / "dark", tmp_path / "shelf")
    (tmp_path / "shelf" / "frames").mkdir()
    for number in range(3):
        Image.new("RGB", (48, 32), (190, 200, 210)).save(tmp_path / "shelf" / "frames" / f"{number}.png")
    (tmp_path / "shelf" / "bad\x1b.mp4").write_bytes(b"nothing")
    (tmp_path / "shelf" / "notes.txt").write_text("none")
    return tmp_path / "shelf"


def test_predict_and_visualize_do_what_they_can_and_name_the_rest(run, shelf, tmp_path):
    done = run_command("predict", run, shelf, tmp_path / "gone.mp4", "--json", "--device", "cpu", status=1)
    report = json.loads(done.stdout)
    assert [Path(row["video"]).name for row in report["predictions"]] == ["0.mp4", "frames"]
    assert [row["top"][0]["class"] for row in report["predictions"]] == ["dark", "bright"]
    assert [Path(entry["video"]).name for entry in report["failed"]] == ["gone.mp4", "bad\x1b.mp4"]
    assert "2 left out, 2 done" in done.stderr and "--on-corrupt" not in done.stderr and "\x1b" not in done.stderr
    done = run_command("visualize", run, shelf, "--out", tmp_path / "pictures", "--device", "cpu", status=1)
    drawn = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert drawn == {"activation.png", *(f"tokens-{number}.{kind}" for number in (1, 2) for kind in ("gif", "png"))}


def test_a_runner_on_a_film_without_frames(tmp_path):
    import av

    with av.open(str(tmp_path / "none.avi"), "w") as film:
        stream = film.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        film.start_encoding()
    text = files("dyntune.inference.export").joinpath("clip_input.template").read_text(encoding="utf-8")
    runner = {}
    exec(Template(text).substitute(suffixes="", formats=FORMATS), runner)
    for sampling in ("spans", "segments"):
        with pytest.raises(ValueError, match="stops after 0 of 0 frames"):
            runner["read"](tmp_path / "none.avi", {"frames": 2, "stride": 2, "sampling": sampling})


def test_films_of_a_run_are_known_wherever_they_lie(films, run, tmp_path):
    shutil.copytree(films / "train", tmp_path / "Testing")
    (tmp_path / "Testing" / "dark" / "cut.mp4").write_bytes(b"nothing")
    data = f"video-folder:{tmp_path}"
    with pytest.raises(DyntuneError, match=r"cut\.mp4: cannot be opened as a video.*--on-corrupt skip"):
        invoke("eval", run, data)
    done = run_command("eval", run, data, "--json", "--device", "cpu", "--on-corrupt", "skip")
    report = json.loads(done.stdout)
    assert (report["split"], report["images"], report["trained_on"], report["skipped"]) == ("test", 6, 6, 1)
    assert "of the 6 videos, the run was trained on 6" in done.stderr and "left out 1 video that" in done.stderr
    (tmp_path / "some.txt").write_text("Testing/dark/0.mp4 dark\n")
    alone = json.loads(invoke("eval", run, f"video-list:{tmp_path / 'some.txt'}", "--json", "--device", "cpu"))
    assert alone["images"] == alone["trained_on"] == 1 and alone["accuracy"] == 1.0
    (tmp_path / "some.txt").write_text("Testing/dark/0.mp4 grey\n")
    with pytest.raises(DyntuneError, match="line 1: 'grey' is none of the classes"):
        invoke("eval", run, f"video-list:{tmp_path / 'some.txt'}")


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


PIXELS = Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3, "bilinear")
JOINT = "videomae_base_patch16_224"


@pytest.mark.parametrize(
    ("given", "model", "built", "clip"),
    [
        ({}, "vit_two_blocks", ("vit_two_blocks", {}), None),
        ({"frames": 4}, "vit_two_blocks", ("frames:vit_two_blocks", {"frames": 4}), Sampling(4)),
        ({"frames": 16}, JOINT, (JOINT, {"frames": 16}), Sampling(16, 4)),
        ({"views": "2x3"}, JOINT, (JOINT, {}), Sampling(16, 4, spans=2, crops=3)),
        ({"flip": 0.0, "sampling": "segments"}, JOINT, (JOINT, {}), Sampling(16, 4, "segments", flip=0.0)),
        ({"stride": 2, "average": "logits"}, JOINT, (JOINT, {}), Sampling(16, 2, average="logits")),
        ({"temporal": "mixer"}, "frames:a", ("frames:a", {"temporal": "mixer"}), Sampling(8)),
        ({"time": "none", "frames": 2}, "a", ("frames:a", {"frames": 2, "time": "none"}), Sampling(2)),
        ({"stride": 3}, "inflated:a", ("inflated:a", {}), Sampling(8, 3)),
    ],
)
def test_what_no_option_says_is_as_the_model_has_it(given, model, built, clip):
    options = ClipOptions(**given)
    assert options.backbone(model) == built
    frames = built[1].get("frames", 16 if model == JOINT else 8)
    own = None if clip is None else Sampling(frames, 4 if model == JOINT else 16)
    assert options.preprocessing(replace(PIXELS, clip=own)).clip == clip


@pytest.mark.parametrize("model", [JOINT, "videomae:folder", "inflated:vit_base_patch16_224"])
@pytest.mark.parametrize("given", [{"temporal": "mixer"}, {"time": "learned", "frames": 16}])
def test_a_head_over_frames_is_refused_where_there_is_none(model, given):
    with pytest.raises(SpecError, match=f"--{next(iter(given))}.*{model} does not have"):
        ClipOptions(**given).backbone(model)


def test_an_exported_clip_model_and_its_runner(films, run, shelf, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    folder = tmp_path / "onnx"
    data = f"video-folder:{films}"
    out = json.loads(invoke("export", run, "--out", folder, "--check", data, "--batch-size", 2, "--json"))
    assert out["check"]["agreement"] == 1.0 and out["check"]["largest_difference"] < 1e-4
    assert len((folder / "run.py").read_text().splitlines()) <= 135
    predicted = run_command("predict", folder, shelf, "--json", "--views", "1x1", status=1)
    rows = json.loads(predicted.stdout)["predictions"]
    done = subprocess.run([sys.executable, folder / "run.py", shelf], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "bad\\x1b.mp4" in done.stderr and "1 video could not be read" in done.stderr
    lines = done.stdout.splitlines()
    assert lines[::3] == [row["video"] for row in rows] and len(rows) == 2
    for place, row in enumerate(rows):
        said = dict(reversed(line.split()) for line in lines[3 * place + 1 : 3 * place + 3])
        assert {name: float(share) for name, share in said.items()} == pytest.approx(
            {top["class"]: top["probability"] for top in row["top"]}, abs=2e-4
        )
    shutil.copy(rows[0]["video"], tmp_path / "10:30.mp4")  # which FFmpeg would take for the protocol 10
    command = [sys.executable, folder / "run.py", "10:30.mp4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines() == ["10:30.mp4", *lines[1:3]], done.stderr
    (folder / "deploy.json").write_text((folder / "deploy.json").read_text().replace('"stride": 2', '"stride": 3'))
    done = subprocess.run([sys.executable, folder / "run.py", shelf], capture_output=True, text=True)
    assert done.returncode == 1 and "deploy.json" in done.stderr and "not as exported" in done.stderr
