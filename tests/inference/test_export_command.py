"""``dyntune export`` on a saved run, and ``dyntune predict`` on what it has written."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from dyntune.commands.main import app
from dyntune.core.errors import DataError, ExportError
from dyntune.core.files import sealed


def dyntune(*arguments, error=None):
    """What the command prints to standard output; with ``error``, the message of what it raises."""
    done = CliRunner().invoke(app, [*map(str, arguments)])
    if error is not None:
        assert isinstance(done.exception, error), (done.output, done.exception)
        return str(done.exception)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


@pytest.fixture(scope="module")
def written(run, photos, tmp_path_factory):
    """An int8 folder, and what the command has reported about it."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("exported") / "int8"
    options = ("--precision", "int8", "--check", photos, "--min-agreement", 0.5)
    return folder, json.loads(dyntune("export", run, "--out", folder, *options, "--json"))


def test_int8_is_written_checked_and_reported(written):
    folder, report = written
    assert (report["runtime"], report["precision"], report["choice"]) == ("onnx", "int8", None)
    checked = report["check"]
    assert (checked["images"], checked["batch_size"]) == (12, 1)
    assert 0.5 <= checked["agreement"] <= 1
    assert len(checked["gate_agreement_per_unit"]) == 2 and 0.8 < checked["gate_agreement"] <= 1
    assert 0 < checked["largest_difference"] < checked["largest_logit"]
    assert report["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert [path.name for path in folder.parent.iterdir()] == ["int8"]
    config = json.loads((folder / "deploy.json").read_text())
    assert config["check"] == checked and config["gates"] == []
    assert config["integer_products"] == 2 * 4 + 1  # the last block's queries stand apart
    assert f"| agreement | {checked['agreement']:.4g} |" in (folder / "README.md").read_text()


def test_predict_reads_an_exported_folder(written, run, photos):
    images = photos / "test" / "red"
    expected = json.loads(dyntune("predict", run, images, "--json", "--device", "cpu"))["predictions"]
    found = json.loads(dyntune("predict", written[0], images, "--json"))["predictions"]
    assert [row["image"] for row in found] == [row["image"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        shares = [{top["class"]: top["probability"] for top in row["top"]} for row in (one, other)]
        assert shares[0] == pytest.approx(shares[1], abs=0.15)
    assert "fixed" in dyntune("predict", written[0], images, "--rate", 0.3, error=ExportError)
    assert "runs on the CPU" in dyntune("predict", written[0], images, "--device", "cuda", error=ExportError)
    assert "over the whole batch" in (written[0] / "README.md").read_text()


def test_predict_reads_classifiers_alone(exported, photos, tmp_path):
    folder = shutil.copytree(exported("torch"), tmp_path / "other")
    config = json.loads((folder / "deploy.json").read_text())
    assert config["task"] == "image-classification"
    (folder / "deploy.json").write_text(json.dumps(sealed(config | {"task": "depth-estimation"})))
    images = photos / "test" / "red"
    assert "exported for depth-estimation" in dyntune("predict", folder, images, "--trust", error=ExportError)


def test_nothing_is_written_where_too_few_predictions_agree(run, photos, tmp_path, monkeypatch):
    from dyntune.commands import export
    from dyntune.inference.export.check import Check

    monkeypatch.setattr(export, "check", lambda *_, **__: Check(12, 1, 0.9, 0.3, 0.25, 5.0, 6.0, None, {}))
    options = ("--runtime", "torch", "--check", photos, "--masks")
    message = dyntune("export", run, "--out", tmp_path / "bad", *options, error=ExportError)
    assert "25.00% of 12 images" in message and "90.00% before, 30.00% after" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        ("--min-agreement", 0.5),
        ("--batch-size", 2),
        ("--threads", 1),
        ("--calibrate-on", "digits"),
        ("--calibrate-on", "digits", "--precision", "int8"),
        ("--calibrate-on", "digits", "--runtime", "openvino"),
        ("--opset", 18, "--runtime", "torch"),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_options_that_would_do_nothing_are_refused(run, tmp_path, options):
    message = dyntune("export", run, "--out", tmp_path / "o", *options, error=ExportError)
    assert message.startswith(f"{options[0]} is for ")
    assert not list(tmp_path.iterdir())


def test_an_older_opset_is_written_checked_and_recorded(run, photos, tmp_path):
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    options = ("--precision", "int8", "--opset", 18, "--check", photos, "--min-agreement", 0.5)
    dyntune("export", run, "--out", tmp_path / "old", *options)
    config = json.loads((tmp_path / "old" / "deploy.json").read_text())
    assert config["opset"] == 18 and config["integer_products"] == 2 * 4 + 1
    card = (tmp_path / "old" / "README.md").read_text()
    assert "for onnx (opset 18)" in card and 'pip install "onnxruntime>=1.15" numpy pillow' in card


def test_a_check_needs_no_more_images_than_eval(run, photos, tmp_path):
    for colour in ("red", "blue"):
        shutil.copytree(photos / "test" / colour, tmp_path / "some" / "test" / colour)
    options = ("--runtime", "torch", "--check", tmp_path / "some", "--json")
    checked = json.loads(dyntune("export", run, "--out", tmp_path / "out", *options))["check"]
    evaluated = json.loads(dyntune("eval", run, tmp_path / "some", "--json", "--device", "cpu"))
    assert checked["images"] == 8 and checked["agreement"] == 1
    assert checked["accuracy_before"] == pytest.approx(evaluated["accuracy"])


def test_mistakes_are_refused_before_anything_is_written(written, run, tmp_path):
    assert "is there already" in dyntune("export", run, "--out", written[0], error=ExportError)
    assert "classes" in dyntune("export", run, "--out", tmp_path / "o", "--check", "digits", error=DataError)
    options = ("--runtime", "openvino", "--precision", "int8")
    assert "--calibrate-on" in dyntune("export", run, "--out", tmp_path / "o", *options, error=ExportError)
    message = dyntune("export", run, "--out", tmp_path / "o", "--opset", 99, error=ExportError)
    assert message.startswith("opset 99 cannot be written") and len(message.splitlines()) == 1
    options = ("--runtime", "auto", "--opset", 99)
    assert dyntune("export", run, "--out", tmp_path / "o", *options, error=ExportError) == message
    assert not list(tmp_path.iterdir())
