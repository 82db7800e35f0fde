"""The folder: what lies in it, the runner that needs no Dyntune, and what happens when it is damaged."""

import copy
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dyntune
from dyntune.commands.predict import predict
from dyntune.core.errors import DataError, ExportError
from dyntune.core.files import sealed
from dyntune.data import build_transform, read_image
from dyntune.inference.export.folder import is_exported, open_export
from dyntune.inference.export.runtimes.torch import Torch
from dyntune.model.tasks import Classification

RUNTIMES = ("onnx", "openvino", "torch")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Image files that have to be turned, laid on white, scaled down or up."""
    root = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0).integers(0, 256, (47, 90, 4), dtype=np.uint8)
    photo = Image.fromarray(noise[..., :3])
    photo.save(root / "photo.jpg", quality=90)
    turned = Image.Exif()
    turned[0x0112] = 6
    photo.save(root / "turned.jpg", exif=turned)
    # Of the two tags, the orientation and the unit of the resolution, the latter is a text in place of a number.
    tags = struct.pack("<HHIHH", 0x0112, 3, 1, 5, 0) + struct.pack("<HHI4s", 0x0128, 2, 4, b"ab")
    photo.save(root / "malformed.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x02\0" + tags + bytes(4))
    Image.fromarray(noise).save(root / "clear.png")
    Image.fromarray(noise[:20, :11, 0]).save(root / "grey.png")
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257 - noise[..., 1] // 2)
    deep.save(root / "deep.png")
    deep.save(root / "deep.pgm")
    return sorted(root.iterdir())


def run(folder, *arguments):
    """Runs the runner, and then prints which libraries it has imported."""
    program = (
        "import runpy, sys; runpy.run_path(sys.argv[0], run_name='__main__'); "
        "print(*(name for name in ('torch', 'dyntune', 'timm', 'onnx') if name in sys.modules))"
    )
    command = [sys.executable, "-c", f"import sys; sys.argv = sys.argv[1:]; {program}", str(folder / "run.py")]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *lines, imported = done.stdout.splitlines()
    return lines, imported.split()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_runner_says_what_predict_says(exported, tuned, pictures, runtime):
    folder = exported(runtime)
    assert len((folder / "run.py").read_text().splitlines()) <= 80
    lines, imported = run(folder, *pictures, "--top-k", 2)
    assert imported == (["torch"] if runtime == "torch" else [])
    expected = predict(tuned, pictures, 2)
    assert lines[::3] == [row["image"] for row in expected]
    for place, row in enumerate(expected):
        said = [line.split() for line in lines[3 * place + 1 : 3 * place + 3]]
        assert [name for _, name in said] == [top["class"] for top in row["top"]]
        for (share, _), top in zip(said, row["top"], strict=True):
            assert float(share) == pytest.approx(top["probability"], abs=1e-4)


def test_the_runner_prints_the_outputs_of_other_tasks(make_host, pictures, tmp_path):
    class Sizes(Classification):
        name = "sizes"

    model = dyntune.tune(make_host("plain", depth=1), "linear").eval()
    model.task = Sizes()
    folder = dyntune.export(model, tmp_path / "exported", runtime="torch")
    lines, _ = run(folder, pictures[0])
    outputs = model(build_transform(model.preprocessing)(read_image(pictures[0]))[None])[0].tolist()
    assert [line.split()[1] for line in lines[1:]] == [str(place) for place in range(len(outputs))]
    assert [float(line.split()[0]) for line in lines[1:]] == pytest.approx(outputs, abs=1e-3)
    assert "--top-k" not in (folder / "README.md").read_text()


def test_the_runner_takes_folders_and_names_what_it_cannot_read(exported, pictures, tmp_path):
    album = tmp_path / "album [1]"
    (album / "deep/.hidden").mkdir(parents=True)
    content = pictures[0].read_bytes()
    (album / "a [final].jfif").write_bytes(content)
    (album / "deep/cut.png").write_bytes(content[:200])
    (album / "deep/.hidden/b.png").write_bytes(content)
    (album / "notes.txt").touch()
    # Pillow would have Ghostscript run PostScript, whatever its file is called.
    program, ran = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n", tmp_path / "ran"
    (album / "drawing.eps").write_text(program)
    (album / "deep/program.png").write_text(program)
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {ran}\n")
    (tmp_path / "gs").chmod(0o755)
    with open(os.fsencode(album) + b"/caf\xe9.png", "wb") as file:
        file.write(content)
    folder = shutil.copytree(exported(), tmp_path / "copy")
    command = [sys.executable, str(folder / "run.py"), str(album), str(tmp_path / "gone.png"), "--top-k", "1"]
    latin = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=latin | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr and not ran.exists()
    shown = [line.removeprefix(f"{album}/") for line in done.stdout.splitlines()[::2]]
    assert shown == ["a [final].jfif", r"caf\udce9.png"]
    assert "cut.png: " in done.stderr and "gone.png: " in done.stderr and "3 images could not be read" in done.stderr


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_of_32_bits_are_refused_by_runner_and_predict(exported, tuned, tmp_path, kind):
    wide = tmp_path / "wide.tif"
    Image.fromarray(np.arange(64, dtype=kind).reshape(8, 8)).save(wide)
    with pytest.raises(AssertionError, match=r"wide\.tif: its pixels are 32-bit numbers"):
        run(exported(), wide)
    with pytest.raises(DataError, match="32-bit numbers"):
        predict(tuned, [wide], 1)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_images_that_the_model_does_not_take_are_refused_in_words(exported, some_images, runtime):
    model = open_export(exported(runtime), threads=1, trust=True)
    with pytest.raises(ExportError, match=r"torch\.float64 on cpu.*images\.cpu\(\)"):
        model(some_images.double())
    with pytest.raises(ExportError, match=r"torch\.float32 on meta"):
        model(some_images.to("meta"))
    with pytest.raises(ExportError, match=r"images \(24, 3, 8, 8\)"):
        model(some_images[:, :, :8, :8])


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_no_file_carries_a_path_of_this_machine(exported, runtime):
    paths = [str(place).encode() for place in (Path(dyntune.__file__).parent, Path(torch.__file__).parent)]
    for file in exported(runtime).iterdir():
        archive = zipfile.ZipFile(file) if zipfile.is_zipfile(file) else None
        contents = [archive.read(name) for name in archive.namelist()] if archive else [file.read_bytes()]
        assert not any(path in content for content in contents for path in paths), file.name


def test_a_model_in_half_precision_is_exported_in_fp32(tuned, some_images, tmp_path):
    half = copy.deepcopy(tuned).bfloat16()
    folder = dyntune.export(half, tmp_path / "half", runtime="torch", rate=1.0)
    assert next(half.parameters()).dtype is torch.bfloat16 and half.target_rate == 0.5
    expected = half.float()
    expected.set_rate(1.0)
    with torch.no_grad():
        torch.testing.assert_close(
            open_export(folder, trust=True)(some_images), expected(some_images), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("runtime", RUNTIMES)
@torch.no_grad()
def test_an_opened_folder_gives_logits_and_masks_of_the_model(exported, tuned, some_images, runtime):
    model = open_export(exported(runtime), threads=1, trust=True)
    output = tuned.run(some_images)
    logits, masks = model.run(some_images)
    torch.testing.assert_close(logits, output.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(some_images[:1]), output.logits[:1], atol=1e-4, rtol=1e-4)
    assert model.gates == tuple(gate.unit for gate in output.gates) == ("blocks.0.mlp", "blocks.1.mlp")
    assert torch.equal(masks, torch.stack([gate.values > 0.5 for gate in output.gates], dim=1))
    assert 0.1 < masks.float().mean() < 0.9
    assert (model.classes, model.preprocessing, model.spec) == (tuned.classes, tuned.preprocessing, tuned.spec)


def test_deploy_json_says_what_the_model_is(exported, tuned):
    from dyntune import cost

    config = json.loads((exported() / "deploy.json").read_text())
    assert config["spec"] == "dyt" and config["classes"] == ["blue", "green", "red"]
    assert (config["runtime"], config["precision"], config["integer_products"]) == ("onnx", "fp32", 0)
    assert config["opset"] == 23
    assert (config["activation"], config["macs"]) == (0.5, cost(tuned).macs)
    assert set(config["files"]) == {"model.onnx", "run.py"}
    card = (exported() / "README.md").read_text()
    assert 'pip install "onnxruntime>=1.23" numpy pillow' in card and "blue" not in config["versions"]


def test_the_python_of_the_card_runs(exported, photos, tmp_path, monkeypatch, capsys):
    shutil.copy(photos / "test/red/0.png", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    code = (exported() / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    exec(code.replace("path/to/this/folder", str(exported())), {})
    assert capsys.readouterr().out.strip() in ("blue", "green", "red")


def test_write_without_masks_gives_none_and_names_no_gate(tuned, some_images, tmp_path):
    folder = dyntune.export(tuned, tmp_path / "runs" / "small", runtime="torch")
    assert is_exported(folder) and [path.name for path in folder.parent.iterdir()] == ["small"]
    with pytest.raises(ExportError, match="may run code"):
        open_export(folder)
    model = open_export(folder, trust=True)
    assert model.run(some_images)[1] is None and model.gates == ()
    torch.testing.assert_close(model(some_images), tuned(some_images).detach(), atol=1e-4, rtol=1e-4)


def test_rate_opens_every_gate_of_the_copy_alone(tuned, some_images, tmp_path):
    folder = dyntune.export(tuned, tmp_path / "all", runtime="torch", masks=True, rate=1.0)
    model = open_export(folder, trust=True)
    assert model.run(some_images)[1].all() and model.config["activation"] == 1
    assert tuned.target_rate == 0.5
    with torch.no_grad():
        expected = tuned.run(some_images, complete=False, execution="masked").gates
        assert not all(gate.values.all() for gate in expected)


def test_a_folder_that_is_there_is_left_alone(tuned, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ExportError, match="mine is there already"):
        dyntune.export(tuned, tmp_path / "mine", runtime="torch")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_a_write_that_fails_leaves_nothing(tuned, tmp_path, monkeypatch):
    def fail(self, program, path, spec):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Torch, "write", fail)
    with pytest.raises(OSError, match="disk full"):
        dyntune.export(tuned, tmp_path / "out", runtime="torch")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_an_opset_is_refused_where_there_is_none(tuned, tmp_path, runtime):
    with pytest.raises(ExportError, match=f"given 18 for {runtime}"):
        dyntune.export(tuned, tmp_path / "out", runtime=runtime, opset=18)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("runtime", "words"), [("torch", "onnx and openvino"), ("openvino", "calibration_images")], ids=RUNTIMES[:0:-1]
)
def test_int8_is_refused_where_it_cannot_be_had(tuned, tmp_path, runtime, words):
    with pytest.raises(ExportError, match=words):
        dyntune.export(tuned, tmp_path / "out", runtime=runtime, precision="int8")
    assert not list(tmp_path.iterdir())


def _change(**entries):
    """Changes the configuration on purpose."""

    def change(folder):
        path = folder / "deploy.json"
        path.write_text(json.dumps(sealed(json.loads(path.read_text()) | entries)))

    return change


_SPOILT = {"size": [32, 32], "mean": [0.5, math.inf, 0.5], "std": [0.5] * 3, "interpolation": "bicubic"}
DAMAGE = {
    "a changed model": (lambda folder: (folder / "model.onnx").write_bytes(b"other"), "damaged: model.onnx"),
    "a changed runner": (lambda folder: (folder / "run.py").write_text("import os"), "damaged: run.py"),
    "no model": (lambda folder: (folder / "model.onnx").unlink(), "damaged: model.onnx"),
    "no configuration": (lambda folder: (folder / "deploy.json").unlink(), "deploy.json is missing"),
    "no JSON": (lambda folder: (folder / "deploy.json").write_text("{"), "not readable JSON"),
    "of another program": (_change(library="other"), "not written by Dyntune"),
    "newer": (_change(format=99), "reads 1 to 1"),
    "a format that is no number": (_change(format=True), "has format True"),
    "a format before the first": (_change(format=0), "has format 0"),
    "gates that are no list": (_change(gates="blocks"), "gates a list of texts"),
    "a spec that is no text": (_change(spec=None), "spec must be a text"),
    "unknown runtime": (_change(runtime="tpu"), "not a valid configuration"),
    "no preprocessing": (_change(preprocessing={}), "preprocessing"),
    "a file elsewhere": (_change(files={"../model.onnx": "0"}), "damaged: ../model.onnx"),
    "a model without digest": (_change(files={}), "damaged: model.onnx"),
    "a mean that is not finite": (_change(preprocessing=_SPOILT), "finite numbers"),
    "images of any size": (_change(preprocessing=_SPOILT | {"mean": [0] * 3, "size": [10**9] * 2}), "at most 4096"),
    "classes in one text": (_change(classes="abc"), "list of texts"),
    "a changed figure": (
        lambda folder: (folder / "deploy.json").write_text((folder / "deploy.json").read_text().replace("0.5", "0.4")),
        "not as it was written",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused_in_words(exported, tmp_path, name):
    damage, words = DAMAGE[name]
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in exported().iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    open_export(folder)
    damage(folder)
    with pytest.raises(ExportError, match=words):
        open_export(folder)


def test_other_names_than_outputs_are_noticed(exported, some_images, tmp_path):
    folder = shutil.copytree(exported(), tmp_path / "copy")
    _change(classes=["blue", "green"])(folder)
    with pytest.raises(ExportError, match=r"3 outputs, but deploy\.json names 2 classes"):
        open_export(folder)(some_images)


@pytest.mark.parametrize("name", ["model.onnx", "deploy.json", "missing", "deep", "a list"])
def test_the_runner_checks_its_own_files(exported, pictures, tmp_path, name):
    folder = shutil.copytree(exported(), tmp_path / "copy")
    if name == "missing":
        (folder / "model.onnx").unlink()
    elif name in ("deep", "a list"):
        (folder / "deploy.json").write_text("[" * 5000 + "]" * 5000 if name == "deep" else "[]")
    else:
        content = bytearray((folder / name).read_bytes())
        place = content.index(b"0.5") + 2 if name == "deploy.json" else len(content) // 2
        content[place] ^= 1
        (folder / name).write_bytes(content)
    done = subprocess.run(
        [sys.executable, str(folder / "run.py"), str(pictures[0])], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr and not done.stdout
    words = {
        "model.onnx": "model.onnx is missing or not as exported",
        "deploy.json": 'deploy.json (if it was changed on purpose, remove its entry "config_sha256") is missing or not',
        "missing": "model.onnx is missing or not as exported",
        "deep": "deploy.json cannot be read (RecursionError",
        "a list": "deploy.json cannot be read (TypeError",
    }
    assert words[name] in done.stderr


def test_the_runner_does_what_a_configuration_that_was_changed_on_purpose_says(exported, pictures, tmp_path):
    folder = shutil.copytree(exported(), tmp_path / "copy")
    config = json.loads((folder / "deploy.json").read_text())
    command = [sys.executable, str(folder / "run.py"), str(pictures[0])]
    for entry, value, status, words in (
        ("classes", ["one", "two", "three"], 0, "two"),
        ("preprocessing", config["preprocessing"] | {"std": [1e-320] * 3}, 1, "outputs are not finite"),
    ):
        changed = {key: held for key, held in config.items() if key != "config_sha256"} | {entry: value}
        (folder / "deploy.json").write_text(json.dumps(changed))
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == status and words in done.stdout + done.stderr, done.stderr
