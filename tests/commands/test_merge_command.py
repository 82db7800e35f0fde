"""``dyntune merge``: the file that it writes is timm's, and what does not fold is said."""

import pytest
import safetensors.torch
import timm
import torch
from typer.testing import CliRunner

import dyntune
from dyntune.backbones.builtin import BUILTIN_BACKBONE
from dyntune.commands.main import app
from dyntune.core.errors import CheckpointError
from dyntune.model.tune import build_tuned


def saved(spec, folder):
    model = build_tuned(BUILTIN_BACKBONE, spec, classes=("a", "b", "c"))
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in model.tuned_state().values():
            tensor += 0.1 * torch.randn_like(tensor)
    model.save(folder)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("spec", ["lora", "ssf+bitfit"])
def test_the_file_is_read_by_timm_and_predicts_the_same(tmp_path, spec):
    model = saved(spec, tmp_path / "run")
    file = tmp_path / "merged.safetensors"
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "run"), "--out", str(file)])
    assert done.exit_code == 0, done.output
    assert "timm.create_model" in done.output
    plain = timm.create_model(BUILTIN_BACKBONE, num_classes=3, checkpoint_path=str(file)).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(plain(images), model(images), atol=1e-4, rtol=1e-4)
    assert safetensors.torch.load_file(file).keys() == plain.state_dict().keys()


def saved_on(name, spec, folder, **arguments):
    """A model on random weights of a timm architecture, which come from a file beside the run."""
    weights = folder / "weights.safetensors"
    safetensors.torch.save_file(timm.create_model(name, num_classes=3, **arguments).state_dict(), weights)
    model = build_tuned(name, spec, classes=("a", "b", "c"), weights=weights, **arguments)
    with torch.no_grad():
        for tensor in model.tuned_state().values():
            tensor += 0.1
    model.save(folder / "run")
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("arguments", [{"img_size": 48}, {"img_size": 32, "global_pool": "avg"}])
def test_the_printed_line_builds_the_model(tmp_path, arguments):
    model = saved_on("vit_tiny_patch16_224", "lora", tmp_path, **arguments)
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged.safetensors")])
    assert done.exit_code == 0, done.exception
    line = next(line for line in done.output.splitlines() if line.startswith("next: "))
    imports, expression = line.removeprefix("next: ").split("; ")
    assert imports == "import timm"
    plain = eval(expression, {"timm": timm}).eval()
    images = torch.randn(2, *model.backbone.image_shape)
    torch.testing.assert_close(plain(images), model(images), atol=1e-4, rtol=1e-4)


def test_tensors_that_timm_would_not_read_are_refused(tmp_path):
    saved_on("vit_xsmall_patch16_clip_224", "ssf", tmp_path)
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged.safetensors")])
    assert "tensors that timm's model does not have (patch_embed.proj.bias)" in str(done.exception)
    assert not (tmp_path / "merged.safetensors").exists()


def test_what_does_not_fold_is_said(tmp_path):
    saved("lora+adaptformer", tmp_path / "run")
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged.safetensors")])
    assert isinstance(done.exception, CheckpointError)
    assert "adaptformer: an adapter is not linear" in str(done.exception)
    assert not (tmp_path / "merged.safetensors").exists()


@pytest.mark.parametrize("name", ["merged.pth", "merged"])
def test_another_ending_is_refused(tmp_path, name):
    saved("lora", tmp_path / "run")
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "run"), "--out", str(tmp_path / name)])
    assert isinstance(done.exception, CheckpointError)
    assert "ends in .safetensors" in str(done.exception)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("folder", [False, True])
def test_what_is_there_is_refused_before_anything_is_loaded_and_stays(tmp_path, folder):
    there = tmp_path / "weights.safetensors"
    if folder:
        there.mkdir()
    kept = there / "mine" if folder else there
    kept.write_bytes(b"mine")
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "no run"), "--out", str(there)])
    assert isinstance(done.exception, CheckpointError)
    assert "is there already" in str(done.exception)
    assert kept.read_bytes() == b"mine"


def test_the_reason_is_logged_in_python(make_host, caplog):
    dyntune.tune(make_host(), "adaptformer").merge()
    assert "adaptformer is not merged" in caplog.text


def test_what_timm_cannot_read_is_not_written(tmp_path):
    model = build_tuned(f"frames:{BUILTIN_BACKBONE}", "lora", classes=("a", "b"), frames=2)
    model.save(tmp_path / "run")
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "run"), "--out", str(tmp_path / "m.safetensors")])
    assert isinstance(done.exception, CheckpointError) and "is no model of timm's" in str(done.exception)
    assert not (tmp_path / "m.safetensors").exists()
