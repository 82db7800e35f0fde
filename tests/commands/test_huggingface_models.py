"""The command line on a model of transformers in a local folder: train, eval, predict, cost and merge."""

import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import dyntune
from dyntune.backbones.hosts import create_backbone
from dyntune.commands.main import app
from dyntune.core.errors import CheckpointError, MachineError
from dyntune.data import build_transform

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def backbone(make_hf, randomise, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    randomise(make_hf("vit")).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4] * 3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(backbone, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "colours"
    options = ("--epochs", "2", "--batch-size", "12", "--lr", "0.01", "--method", "lora", "--json")
    report = invoke("train", photos, "--model", f"hf:{backbone}", "--out", out, *options)
    assert json.loads(report)["model"] == f"hf:{backbone}"
    return out


def invoke(*arguments):
    done = CliRunner().invoke(app, [*map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_run_is_evaluated_and_predicts(run, photos):
    assert json.loads(invoke("eval", run, photos, "--json"))["accuracy"] > 0.3
    assert invoke("predict", run, photos / "test" / "red")
    model = dyntune.load(run)
    assert model.classes == ("blue", "green", "red")
    assert model.preprocessing.mean == (0.4, 0.4, 0.4)
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}


def test_costs_need_no_weights(backbone):
    (backbone / "model.safetensors").rename(backbone / "away")
    try:
        printed = invoke("cost", "--model", f"hf:{backbone}", "--method", "dyt:recipe=published", "--json")
    finally:
        (backbone / "away").rename(backbone / "model.safetensors")
    assert "626720" in printed


@torch.no_grad()
def test_a_merged_run_is_a_folder_of_transformers(run, photos, tmp_path):
    with pytest.raises(CheckpointError, match="expected a folder"):
        invoke("merge", run, "--out", tmp_path / "merged.safetensors")
    printed = invoke("merge", run, "--out", tmp_path / "merged")
    assert f"ViTForImageClassification.from_pretrained({str(tmp_path / 'merged')!r})" in printed
    plain = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    processor = transformers.ViTImageProcessor.from_pretrained(tmp_path / "merged")
    assert plain.config.id2label == {0: "blue", 1: "green", 2: "red"}
    image = Image.open(next((photos / "test" / "red").iterdir()))
    theirs = plain(**processor(image, return_tensors="pt")).logits
    from dyntune.data.transforms import build_transform

    model = dyntune.load(run)
    ours = model(build_transform(model.preprocessing)(image)[None])
    torch.testing.assert_close(theirs, ours, atol=0.05, rtol=0.05)  # resizes differ by up to one level of 255


def test_a_merged_folder_may_have_a_point_in_its_name_and_be_there_if_it_is_empty(run, tmp_path):
    out = tmp_path / "vit-v1.0"
    out.mkdir()
    invoke("merge", run, "--out", out)
    assert transformers.AutoModelForImageClassification.from_pretrained(out)
    assert [entry.name for entry in tmp_path.iterdir()] == ["vit-v1.0"]
    written = (out / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match="is there already"):
        invoke("merge", run, "--out", out)
    assert (out / "config.json").read_bytes() == written


def test_a_merge_that_fails_leaves_no_folder(run, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dyntune.backbones.huggingface_models.write_processor", fail)
    with pytest.raises(MachineError):
        invoke("merge", run, "--out", tmp_path / "merged")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_siglip2_reads_what_is_merged_with_a_processor_that_fits(make_hf, randomise, tmp_path):
    host = randomise(make_hf("siglip2", num_patches=9))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    patches = images.reshape(-1, 3, 4, 8, 4, 8).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, 192)
    shapes, mask = torch.tensor([[4, 4]]).expand(2, -1), torch.ones(2, 16, dtype=torch.long)
    expected = host(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes).logits
    host.save_pretrained(tmp_path / "host")
    name = f"hf:{tmp_path / 'host'}"
    larger = dyntune.tune(create_backbone(name, img_size=32), "linear").eval()
    torch.testing.assert_close(larger(images), expected, atol=1e-5, rtol=1e-5)
    model = dyntune.tune(create_backbone(name), "lora").eval()
    model.save(tmp_path / "run")
    invoke("merge", tmp_path / "run", "--out", tmp_path / "merged")
    picture = Image.effect_noise((24, 24), 90).convert("RGB")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "merged")
    plain = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    seen = build_transform(model.preprocessing)(picture)[None]
    torch.testing.assert_close(
        plain(**processor(picture, return_tensors="pt")).logits, model(seen), atol=1e-4, rtol=1e-4
    )
