"""Names from before optimise and export were told apart: they work and say what they are called now."""

from pathlib import Path

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

import dyntune
from dyntune.commands import export
from dyntune.commands.main import app


def test_deploy_is_optimize(make_host, images_for):
    with pytest.warns(DeprecationWarning, match=r"dyntune\.deploy is now called dyntune\.optimize"):
        former = dyntune.deploy
    with pytest.warns(DeprecationWarning, match=r"dyntune\.OptimizedModel"):
        assert dyntune.DeployedModel is dyntune.OptimizedModel
    host = make_host(depth=1)
    images = images_for(host, 2)
    assert torch.equal(former(host)(images), dyntune.optimize(host)(images))
    assert "deploy" not in dir(dyntune)


def test_what_the_readme_of_an_older_folder_says_works(exported, some_images):
    with pytest.warns(DeprecationWarning, match=r"dyntune\.open_export"):
        from dyntune.deployment import open_runtime as former
    model = former(exported("torch"), trust=True)
    assert torch.equal(model(some_images), dyntune.open_export(exported("torch"), trust=True)(some_images))


def test_the_command_deploy_is_export(tmp_path, monkeypatch):
    commands = get_command(app).commands
    described = [[(option.name, option.default) for option in commands[name].params] for name in ("deploy", "export")]
    assert described[0] == described[1] and len(described[0]) > 10
    seen = []
    monkeypatch.setattr(export, "command", lambda **options: seen.append(options))
    done = CliRunner().invoke(app, ["deploy", str(tmp_path), "--out", "there", "--runtime", "torch", "--opset", "18"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert done.stderr == "dyntune deploy is now called dyntune export\n"
    assert (seen[0]["run"], seen[0]["folder"], seen[0]["runtime"]) == (tmp_path, Path("there"), "torch")
    assert (seen[0]["opset"], seen[0]["masks"], seen[0]["precision"]) == (18, False, "fp32")
    listed = CliRunner().invoke(app, ["--help"]).output
    assert "export" in listed and "deploy" not in listed


def test_a_policy_was_called_tokens(make_host, tmp_path):
    folder = dyntune.tune(make_host(), "adaptformer").save(tmp_path)
    with pytest.warns(DeprecationWarning, match=r"load\(policy="):
        former = dyntune.load(folder, backbone=make_host(), tokens="tome:r=3")
    assert former.spec == dyntune.load(folder, backbone=make_host(), policy="tome:r=3").spec == "adaptformer+tome:r=3"


def test_the_option_tokens_is_policy(capsys):
    done = CliRunner().invoke(app, ["cost", "--method", "linear", "--tokens=tome:r=4", "--json"])
    assert done.exit_code == 0 and '"tokens": "tome:r=4"' in done.stdout
    assert "--tokens is now called --policy" in capsys.readouterr().err + done.output
    assert "--tokens" not in CliRunner().invoke(app, ["cost", "--help"]).stdout


def test_the_error_of_exports_had_another_name():
    with pytest.warns(DeprecationWarning, match="ExportError"):
        from dyntune.core.errors import DeploymentError
    assert DeploymentError is dyntune.core.errors.ExportError
