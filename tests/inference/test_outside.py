"""A runtime that another distribution brings: exported to, opened, checked and timed like those of the house."""

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import dyntune
from dyntune.core.errors import ExportError
from dyntune.inference.export import registry
from dyntune.inference.export.choose import choose
from dyntune.studies.bench import runtimes
from dyntune.studies.bench.plan import Plan

OUTSIDE = Path(__file__).parent / "outside"


def forget():
    """Runtimes that were found before are looked for again."""
    importlib.invalidate_caches()
    registry.registered.cache_clear()
    runtimes.exported.cache_clear()


@pytest.fixture(scope="module")
def app():
    """The command line where the distribution ``plain`` is installed, for child processes too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(OUTSIDE))
        patch.setenv("PYTHONPATH", str(OUTSIDE), prepend=os.pathsep)
        patch.setattr(dyntune, "commands", None, raising=False)
        for name in [name for name in sys.modules if f"{name}.".startswith("dyntune.commands.")]:
            patch.delitem(sys.modules, name)  # the command line says what there is when it is imported
        forget()
        yield importlib.import_module("dyntune.commands.main").app
    forget()


def run_command(app, *arguments, error=None):
    """Standard output of a command; with ``error``, the message of what it raises."""
    done = CliRunner().invoke(app, [*map(str, arguments)], env={"TERMINAL_WIDTH": "200"})
    if error is not None:
        assert isinstance(done.exception, error), (done.output, done.exception)
        return str(done.exception)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def test_the_main_job(app, run, photos, tmp_path):
    folder, images = tmp_path / "colours", photos / "test" / "red"
    options = ("--runtime", "plain", "--stamp", "hello", "--masks", "--check", photos)
    report = json.loads(run_command(app, "export", run, "--out", folder, *options, "--json"))
    assert report["runtime"] == "plain" and report["check"]["agreement"] == report["check"]["gate_agreement"] == 1.0
    assert (folder / "model.plain").read_bytes().startswith(b"hello\n")
    config = json.loads((folder / "deploy.json").read_text())
    assert config["stamp"] == "hello" and config["versions"]["plain"] == "1.0" and "opset" not in config
    assert "import plain" in (folder / "run.py").read_text()
    assert "for plain (stamp hello)" in (folder / "README.md").read_text()
    expected = json.loads(run_command(app, "predict", run, images, "--json", "--device", "cpu"))["predictions"]
    found = json.loads(run_command(app, "predict", folder, images, "--trust", "--json"))["predictions"]
    for one, other in zip(found, expected, strict=True):
        assert one["top"][0]["class"] == other["top"][0]["class"]
    assert "onnx and openvino need none" in run_command(app, "predict", folder, images, error=ExportError)


def test_help_lists_it_and_its_option(app):
    for command in ("export", "bench"):
        words = " ".join(run_command(app, command, "--help").replace("│", " ").split())
        assert "plain" in words and "torch" in words
    assert "--stamp" in run_command(app, "export", "--help")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--runtime", "plan"), "unknown runtime 'plan'. Did you mean 'plain'?"),
        (("--runtime", "torch", "--stamp", "hello"), "--stamp is for --runtime plain or auto"),
        (("--runtime", "plain", "--opset", 18), "--opset is for --runtime onnx or auto"),
        (("--runtime", "plain", "--precision", "int8"), "int8 is for the runtimes onnx and openvino"),
        (("--precision", "int9"), "unknown precision 'int9'. Did you mean 'int8'?"),
    ],
    ids=str,
)
def test_what_it_does_not_offer_is_refused(app, run, tmp_path, options, words):
    assert words in run_command(app, "export", run, "--out", tmp_path / "o", *options, error=ExportError)
    assert not list(tmp_path.iterdir())


def test_it_is_timed_like_the_others(app, export, some_images, tmp_path):
    candidates = registry.every({"stamp": "hello", "opset": 19})
    assert [candidate.name() for candidate in candidates] == ["onnx", "openvino", "torch", "plain"]
    assert [candidate.to_dict() for candidate in candidates] == [{"opset": 19}, {}, {}, {"stamp": "hello"}]
    choice = choose(export, tmp_path, some_images[:1], candidates[-1:], threads=1, rounds=1)
    assert choice.runtime == "plain" and "plain had the most images per second of the only runtime" in choice.reason


def test_bench_builds_it_and_without_the_distribution_its_folder_says_what_is_missing(
    app, tuned, some_images, tmp_path, monkeypatch
):
    Plan(runtimes=("eager", "plain"))
    assert runtimes.is_exact("plain")
    call = runtimes.build("plain", tuned, some_images, threads=1, folder=tmp_path / "plain")
    torch.testing.assert_close(call(some_images), tuned(some_images).detach(), atol=1e-4, rtol=1e-4)
    installed = {"torch": registry.lookup("torch")}
    monkeypatch.setattr(registry, "registered", lambda: installed)
    with pytest.raises(ExportError, match=r"deploy\.json .*unknown runtime 'plain'.* Known: torch"):
        dyntune.open_export(tmp_path / "plain", trust=True)
