"""What the commands do with folders of images: which are evaluated on, what a run remembers, and bad files."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import dyntune

from dyntune.commands import predict as predict_command
from dyntune.commands.console import print_json

COLOURS = ("blue", "[red] rose")
FAST = ("--method", "dyt:rate=0.5", "--epochs", 1, "--batch-size", 8, "--device", "cpu")


def draw(folder, count, first=0):
    """Little noisy pictures, whose colour follows the folder's name; ``first`` is the number of the first of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        pixels = np.random.default_rng((number, len(folder.name))).integers(0, 100, (12, 12, 3), dtype=np.uint8)
        pixels[..., 0 if "red" in folder.name else 2] += 150
        Image.fromarray(pixels).save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """A folder of class folders, and a run that was trained on it."""
    root = tmp_path_factory.mktemp("flat")
    for colour in COLOURS:
        draw(root / "data" / colour, 20)
    said = dyntune("train", root / "data", *FAST, "--out", root / "run").stderr
    assert "[red] rose" in said and "images" in said
    return root / "data", root / "run"


def evaluated(run, data, *options):
    printed = dyntune("eval", run, data, "--json", *options)
    return json.loads(printed.stdout) | {"said": printed.stderr}


def test_a_folder_that_the_run_was_trained_on_is_tested_on_what_it_has_not_seen(flat, tmp_path):
    data, run = flat
    report = evaluated(run, data)
    assert report["split"] == "test" and 0 < report["images"] < 20
    assert report["trained_on"] == report["selected_on"] == 0
    whole = evaluated(run, data, "--split", "all")
    assert whole["images"] == 40
    train, val = evaluated(run, data, "--split", "train"), evaluated(run, data, "--split", "val")
    assert train["trained_on"] == train["images"] and val["selected_on"] == val["images"]
    assert report["images"] + train["images"] + val["images"] == 40
    assert (whole["trained_on"], whole["selected_on"]) == (train["images"], val["images"])
    assert f"trained on {train['images']}, and its epoch was chosen on {val['images']}" in whole["said"]
    for colour in COLOURS:
        shutil.copytree(data / colour, tmp_path / "grown" / colour)
        draw(tmp_path / "grown" / colour, 20, first=20)
    grown = evaluated(run, tmp_path / "grown")
    assert grown["split"] == "test" and grown["images"] > report["images"]
    assert grown["trained_on"] == grown["selected_on"] == 0


def test_a_folder_that_the_run_was_not_trained_on_is_tested_whole(flat, tmp_path):
    for colour in COLOURS:
        draw(tmp_path / colour, 3, first=100)
    report = evaluated(flat[1], tmp_path)
    assert report["split"] == "all" and report["images"] == 6 and "all 6 images" in report["said"]
    assert evaluated(flat[1] / "last", tmp_path)["trained_on"] == 0
    shutil.rmtree(tmp_path / "blue")
    alone = evaluated(flat[1], tmp_path)
    assert alone["images"] == 3 and "no images of 1 class: 'blue'" in alone["said"]
    draw(tmp_path / "green", 1)
    assert "'green'" in dyntune("eval", flat[1], tmp_path, status=1).stderr


def test_images_that_were_trained_on_are_known_wherever_they_lie(flat, tmp_path):
    shutil.copytree(flat[0], tmp_path / "elsewhere/test")
    report = evaluated(flat[1], tmp_path / "elsewhere")
    assert report["split"] == "test" and report["images"] == 40 and report["trained_on"] > 20


def test_images_of_splits_that_are_not_used_are_not_read(flat, tmp_path):
    for split in ("train", "test"):
        for colour in COLOURS:
            draw(tmp_path / split / colour, 2, first=300)
        (tmp_path / split / COLOURS[0] / "cut.png").write_bytes(b"nothing")
    report = evaluated(flat[1], tmp_path, "--on-corrupt", "skip")
    assert report["images"] == 4 and report["skipped"] == 1 and "left out 1 image" in report["said"]


def test_training_images_too_few_to_be_split_do_not_keep_a_test_folder_from_being_used(flat, tmp_path):
    for colour in COLOURS:
        draw(tmp_path / "train" / colour, 1, first=400)
        draw(tmp_path / "test" / colour, 2, first=400)
    assert evaluated(flat[1], tmp_path)["images"] == 4
    shutil.rmtree(tmp_path / "test")
    assert evaluated(flat[1], tmp_path)["split"] == "train"


@pytest.mark.parametrize("split", ["test", "Testing", "val"])
def test_a_split_alone_is_enough(flat, tmp_path, split):
    for colour in COLOURS:
        draw(tmp_path / split / colour, 2, first=200)
    report = evaluated(flat[1], tmp_path)
    assert report["images"] == 4 and report["split"] == ("val" if split == "val" else "test")
    assert "no train split" in dyntune("eval", flat[1], tmp_path, "--split", "train", status=1).stderr
    assert "but no train folder" in dyntune("train", tmp_path, *FAST, "--out", tmp_path / "run", status=1).stderr


def test_a_run_that_does_not_remember_is_asked_about(flat, tmp_path):
    shutil.copytree(flat[1], tmp_path / "run")
    (tmp_path / "run/images.json").unlink()
    assert "--split all" in dyntune("eval", tmp_path / "run", flat[0], status=1).stderr
    report = evaluated(tmp_path / "run", flat[0], "--split", "all")
    assert report["images"] == 40 and report["trained_on"] is None and "is not known" in report["said"]
    (tmp_path / "run/images.json").write_text('{"trained": 3}')
    assert "images.json cannot be read" in dyntune("eval", tmp_path / "run", flat[0], status=1).stderr


@pytest.fixture
def album(tmp_path):
    """A folder with good pictures whose names mean something elsewhere, and one that was cut off."""
    folder = tmp_path / "album [2024]"
    draw(folder, 1)
    names = [
        b"a [final].png",
        b"[bold] b.png",
        b"caf\xe9.png",
        b"=1+1.png",
        b"$x_1$ :smile:.png",
        b"two\nlines\x1b[31m.png",
    ]
    for name in names:
        shutil.copy(folder / "0.png", os.path.join(os.fsencode(folder), name))
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    return folder


def test_predict_does_what_it_can_and_names_the_rest(flat, album, monkeypatch):
    done = dyntune("predict", flat[1], album, album / "gone.png", "--json", status=1)
    report = json.loads(done.stdout)
    assert len(report["predictions"]) == 7
    assert [os.path.basename(entry["image"]) for entry in report["failed"]] == ["gone.png", "cut.png"]
    assert "cut.png: cannot be read" in done.stderr and "--on-corrupt" not in done.stderr
    assert "2 left out, 7 done" in done.stderr
    (album / "cut.png").unlink()
    monkeypatch.chdir(album.parent)
    table = dyntune("predict", flat[1], f"{album.name}/*.png", "--top-k", 2).stdout
    for shown in ("a [final].png", "[bold] b.png", "=1+1.png", ":smile:", "[red] rose"):
        assert shown in table
    assert "\x1b" not in table and "\udce9" not in table and r"caf\xe9.png" in table
    assert "no image found" in dyntune("predict", flat[1], album / "gone.png", status=1).stderr


def test_a_prediction_that_is_stopped_shows_what_is_done(flat, tmp_path, monkeypatch):
    draw(tmp_path / "album", 6)
    work = predict_command._predicted

    def stopped(model, batch, *rest):
        if batch[0][0].name == "4.png":
            raise KeyboardInterrupt
        return work(model, batch, *rest)

    monkeypatch.setattr(predict_command, "_predicted", stopped)
    done = dyntune("predict", flat[1], tmp_path / "album", "--batch-size", 2, "--json", status=1)
    assert [Path(row["image"]).name for row in json.loads(done.stdout)["predictions"]] == [f"{i}.png" for i in range(4)]
    assert "stopped; so far 4 of 6 images" in done.stderr


def test_a_path_that_cannot_be_written_is_named(flat, tmp_path):
    (tmp_path / "file").touch()
    said = dyntune("export", flat[1], "--out", tmp_path / "file/run", status=1).stderr
    assert f"{tmp_path / 'file'}" in said and "Give another path" in said and "Errno" not in said
    for arguments in (("train", flat[0], *FAST), ("compare", flat[0], "--methods", "linear", "--epochs", 1)):
        said = dyntune(*arguments, "--out", tmp_path / "file/run", status=1).stderr
        assert f"{tmp_path / 'file'} is a file; give a folder for the run." in said and "data" not in said


def test_visualize_does_what_it_can_in_the_home_folder(flat, album, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    done = dyntune("visualize", flat[1], album, "--out=~/pictures", "--per-figure", 4, status=1)
    written = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert written == {"tokens-1.png", "tokens-2.png", "activation.png"}
    assert "cut.png" in done.stderr and "--on-corrupt" not in done.stderr


def test_training_takes_names_that_are_not_utf8(tmp_path):
    for name in (b"caf\xe9", b"plain"):
        draw(tmp_path / "data" / os.fsdecode(name), 6)
        os.rename(
            os.fsencode(tmp_path / "data") + b"/" + name + b"/0.png",
            os.fsencode(tmp_path / "data") + b"/" + name + b"/\xff.png",
        )
    dyntune("train", tmp_path / "data", *FAST, "--out", tmp_path / "run")
    assert evaluated(tmp_path / "run", tmp_path / "data", "--split", "all")["images"] == 12
    draw(tmp_path / "elsewhere/test/plain", 1)
    said = dyntune("predict", tmp_path / "run", tmp_path / "elsewhere", "--json").stdout
    assert {top["class"] for top in json.loads(said)["predictions"][0]["top"]} == {"caf\\xe9", "plain"}


def test_json_stays_json_where_the_output_lacks_signs(monkeypatch):
    said = {"image": "日本 é.png", "name": "caf\udce9"}
    for encoding in ("ascii", "cp1252", "utf-8"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding)
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", stream)
            print_json(said)
        stream.flush()
        assert json.loads(stream.buffer.getvalue().decode(encoding)) == said
