"""The command line from its arguments to what it prints and its exit status."""

import io
import json
import logging
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from dyntune.backbones.builtin import BUILTIN_BACKBONE
from dyntune.commands import main as program
from dyntune.commands.main import main

COMMANDS = (
    "methods",
    "cost",
    "train",
    "eval",
    "predict",
    "visualize",
    "compare",
    "merge",
    "noah",
    "vtab",
    "demo",
    "bench",
    "calibrate",
    "export",
)


def dyntune(*arguments: object, status: int = 0) -> SimpleNamespace:
    """Runs the program in this process, checks its exit status, and gives ``stdout`` and ``stderr``."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        patch.setattr(sys, "argv", ["dyntune", *map(str, arguments)])
        main()
    assert (ended.value.code or 0) == status, out.getvalue() + err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "colours"
    options = ("--epochs", 4, "--batch-size", 8, "--lr", 0.01, "--device", "cpu")
    printed = dyntune("train", photos, "--method", "dyt:rate=0.5,scale=1", "--out", out, *options, "--json")
    report = json.loads(printed.stdout)
    assert report["method"] == "dyt:scale=1" and report["accuracy"] > 0.5
    return out


def test_eval_reports_what_ran(run, photos):
    report = json.loads(dyntune("eval", run, photos, "--json").stdout)
    assert report["images"] == 12 and report["accuracy"] > 0.5
    assert len(report["activation_per_unit"]) == 12
    assert report["macs"] < report["dense_macs"]
    assert report["images_per_second"] > 0
    table = dyntune("eval", run, photos).stdout
    assert "accuracy" in table and "blocks.11.mlp" in table


def test_predict_names_the_colour(run, photos):
    images = sorted((photos / "test" / "red").iterdir())
    report = json.loads(dyntune("predict", run, photos / "test" / "red", "--json", "--top-k", 2).stdout)
    assert [Path(row["image"]) for row in report["predictions"]] == images
    for row in report["predictions"]:
        assert [top["class"] in ("blue", "green", "red") for top in row["top"]] == [True, True]
        assert row["top"][0]["probability"] >= row["top"][1]["probability"]
    assert sum(row["top"][0]["class"] == "red" for row in report["predictions"]) >= 3
    assert "red" in dyntune("predict", run, images[0]).stdout


def test_visualize_writes_pictures(run, photos, tmp_path):
    dyntune("visualize", run, photos / "test", "--out", tmp_path / "pictures", "--per-figure", 8)
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["activation.png", "tokens-1.png", "tokens-2.png"]
    for name in names:
        assert Image.open(tmp_path / "pictures" / name).width > 600


def test_compare_writes_table_and_page(photos, tmp_path):
    arguments = (
        "compare",
        photos,
        "--methods",
        "linear,dyt:rate=0.5,dispatch=layer",
        "--epochs",
        1,
        "--out",
        tmp_path / "c",
    )
    how = ("--lr", "2e-3", "--batch-size", 24, "--backbone-lr", 0.5, "--seed", 3, "--device", "cpu")
    report = json.loads(dyntune(*arguments, *how, "--json").stdout)
    assert [row["method"] for row in report["rows"]] == ["linear", "dyt:rate=0.5,dispatch=layer"]
    settings = {"epochs": 1, "lr": 2e-3, "batch_size": 24, "backbone_lr": 0.5, "seed": 3, "precision": "fp32"}
    assert settings.items() <= report["settings"].items() and "device" not in report["settings"]
    assert (report["data"], report["model"], report["weights"]) == (str(photos), BUILTIN_BACKBONE, None)
    kept = json.loads((tmp_path / "c" / "results.json").read_text())
    assert kept == {"title": f"Methods on {photos}", **report}
    page = (tmp_path / "c" / "index.html").read_text()
    assert "1 epoch, learning rate 0.002, batches of 24, seed 3; 12 test images." in page
    for name in ("tradeoff.png", "activation.png", "tokens-dyt-rate-0.5-dispatch-layer.png"):
        assert name in page and (tmp_path / "c" / name).stat().st_size > 1000
    assert len((tmp_path / "c" / "results.csv").read_text().splitlines()) == 3
    assert "| `linear` |" in (tmp_path / "c" / "results.md").read_text()


def test_cost_prints_the_published_numbers():
    report = json.loads(
        dyntune(
            "cost",
            "--model",
            "vit_base_patch16_224",
            "--method",
            "adaptformer",
            "--policy",
            "dispatch:rate=0.5,recipe=published",
            "--json",
        ).stdout
    )
    assert report["model"] == "vit_base_patch16_224"
    assert (report["method"], report["tokens"]) == ("adaptformer", "dispatch:rate=0.5,recipe=published")
    assert (report["trainable_params"], report["macs"], report["dense_macs"]) == (
        165_996,
        12_059_247_360,
        17_581_972_224,
    )
    assert report["head_params"] == report["head_macs"] + 1000 == 769_000
    assert report["total_params"] == 85_798_656 + 165_996 + 769_000
    assert report["adapter_bytes"] == 4 * (165_996 + 769_000)


def test_methods_lists_every_part_and_the_options_of_one():
    done = dyntune("methods", "--json")
    report = json.loads(done.stdout)
    assert not done.stderr  # what auto has found for this backbone is nobody's question
    costs = {row["name"]: (row["trainable_params"], row["macs"]) for row in report}
    assert costs["full"] == (85_798_656, 17_581_972_224)
    assert costs["dyt"] == (165_996, 12_171_811_584)
    options = dyntune("methods", "dyt").stdout
    assert "bottleneck" in options and "temperature" in options and "``" not in options


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("cost", "--method", "dyt:rat=0.5"), ("'rat'", "rate", "bottleneck")),
        (("cost", "--method", "adaptfomer"), ("adaptformer",)),
        (("cost", "--model", "cait_xxs24_224"), ("Cait", "not supported", "DeiT")),
        (("eval", "nowhere", "digits"), ("nowhere", "dyntune.json")),
        (("predict", "nowhere", "missing*.jpg"), ("missing*.jpg",)),
        (("visualize", "nowhere", "missing.jpg", "--out", "out"), ("missing.jpg",)),
        (("train", "digitz", "--out", "never"), ("digitz", "digits")),
        (("train", "digits", "--out", "never", "--weights", "missing.npz"), ("missing.npz", ".safetensors")),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else None,
)
def test_a_mistake_gets_one_clear_message_and_status_1(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = dyntune(*arguments, status=1)
    assert done.stderr.startswith("error:")
    for word in words:
        assert word in done.stderr.replace("\n", " ")
    assert not (tmp_path / "never").exists()


def test_a_process_ends_with_the_message_and_the_status():
    command = [sys.executable, "-m", "dyntune", "cost", "--method", "adaptfomer"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error:") and "adaptformer" in done.stderr and "Traceback" not in done.stderr


def test_what_the_library_warns_of_is_called_a_warning(monkeypatch):
    logger = logging.getLogger("dyntune")
    monkeypatch.setattr(program, "app", lambda: logger.warning("[%s] is complete", "a run"))
    monkeypatch.setattr(sys, "argv", ["dyntune", "train"])
    err = io.StringIO()
    with redirect_stderr(err):
        main()
    assert err.getvalue() == "warning: [a run] is complete\n"


def test_wrong_usage_gets_status_2():
    assert "--metod" in dyntune("cost", "--metod", "dyt", status=2).stderr
    dyntune("evaluate", status=2)


def test_eval_refuses_data_with_other_classes(run):
    assert "classes" in dyntune("eval", run, "digits", status=1).stderr


def test_every_command_has_help_with_examples():
    from typer.testing import CliRunner

    from dyntune.commands.main import app

    for name in COMMANDS:
        help_text = CliRunner().invoke(app, [name, "--help"], terminal_width=120).output
        assert "Examples:" in help_text and f"dyntune {name}" in help_text
