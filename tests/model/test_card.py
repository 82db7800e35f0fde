"""The Python on a saved adapter's card goes from a file to the name of its class, and runs as it stands."""

import shutil

import numpy as np
import pytest
import torch

import dyntune
from dyntune.data import Video, build_transform, read_image
from dyntune.model.tune import build_tuned

CLASSES = ("blue", "green", "red")


def run_card(folder, names):
    """Runs the Python on a folder's card, and gives what it has made, by name."""
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    exec(code.replace("path/to/this/folder", str(folder)), names)
    return names


@pytest.mark.parametrize("classes", [CLASSES, None])
def test_an_image_is_told_its_class(two_blocks, photos, tmp_path, monkeypatch, capsys, classes):
    shutil.copy(photos / "test/red/0.png", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    model = build_tuned("vit_two_blocks", "dyt", classes=CLASSES, weights=two_blocks).eval()
    torch.nn.init.normal_(model.backbone.heads[0].weight)
    model.classes = classes
    names = run_card(model.save(tmp_path / "run"), {})
    expected = model(build_transform(model.preprocessing)(read_image("photo.jpg"))[None])
    assert torch.equal(names["outputs"], expected)
    best = int(expected.argmax())
    assert capsys.readouterr().out.strip() == (classes[best] if classes else str(best))


def test_a_clip_too(two_blocks, tmp_path, monkeypatch, capsys):
    pytest.importorskip("av")
    from dyntune.data.video_files import write_video

    write_video(tmp_path / "film.mp4", np.random.default_rng(0).integers(0, 255, (8, 32, 48, 3), dtype=np.uint8))
    monkeypatch.chdir(tmp_path)
    model = build_tuned("frames:vit_two_blocks", "dyt", classes=CLASSES, weights=two_blocks, frames=2).eval()
    names = run_card(model.save(tmp_path / "run"), {})
    expected = model(build_transform(model.preprocessing)(Video("film.mp4"))[None])
    assert torch.equal(names["outputs"], expected) and capsys.readouterr().out.strip() in CLASSES


def test_who_must_give_the_backbone_has_it_as_model(make_host, photos, tmp_path, monkeypatch, capsys):
    shutil.copy(photos / "test/red/0.png", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    model = dyntune.tune(make_host(num_classes=3), "dyt")
    model.classes = CLASSES
    folder = model.save(tmp_path / "run")
    run_card(folder, {"model": make_host(num_classes=3)})
    assert capsys.readouterr().out.strip() in CLASSES
