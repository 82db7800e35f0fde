"""The Python of README and docs runs as it stands: page by page, the blocks of a page one after the other.

What a reader would fetch is stood in for by small models of the same names, and folders that blocks read lie there.
"""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.models import build_model_with_cfg
from timm.models._registry import _model_entrypoints
from timm.models.vision_transformer import VisionTransformer

import dyntune
import dyntune.data
from dyntune.data import ImageSubset, load_data

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
PAGES = [
    page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if BLOCK.search(page.read_text())
]
HOSTS = {
    "vit_base_patch16_224": {"img_size": 224, "patch_size": 56, "embed_dim": 32, "depth": 12, "num_heads": 4},
    "vit_mini_patch4_32": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4},
}
"""Shapes of the models that stand in for those of timm's that blocks build, weights and all."""
REPOSITORIES = {"vit": "google/vit-base-patch16-224", "dinov3": "facebook/dinov3-vits16-pretrain-lvd1689m"}
"""Kinds of tiny models that stand in for repositories of transformers' models."""
COMMIT = "0" * 40


def stand_in(name: str):
    def built(pretrained: bool = False, **given: object) -> VisionTransformer:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build_model_with_cfg(VisionTransformer, name, False, **(HOSTS[name] | given))

    return built


@pytest.fixture(scope="module")
def hosts():
    """Models of timm's by their names."""
    with pytest.MonkeyPatch.context() as patch:
        for name in HOSTS:
            patch.setitem(_model_entrypoints, name, stand_in(name))
        yield


def published() -> dict[str, torch.Tensor]:
    """A checkpoint of DyT's public code, for the stand-in of ViT-B/16 with 100 classes."""
    model = dyntune.tune(timm.create_model("vit_base_patch16_224", num_classes=100), "dyt:bottleneck=64,scale=0.1")
    public = {"host.": "", "mlp.parallel.adapter.": "adaptmlp.", "mlp.dispatcher.gate.": "mlp_token_select.mlp_head."}
    state = {}
    for name, value in model.backbone.named_parameters():
        for ours, theirs in public.items():
            name = name.replace(ours, theirs)
        state[name] = value.detach()
    return state


@pytest.fixture(scope="module")
def stocked(hosts, photos, make_hf, tmp_path_factory):
    """What lies in a reader's folder: images, a photo, a trained run, weights; and the cache of the hub."""
    folder = tmp_path_factory.mktemp("stocked")
    shutil.copytree(photos, folder / "flowers")
    shutil.copy(photos / "test/red/0.png", folder / "photo.jpg")
    for kind, repository in REPOSITORIES.items():
        cached = folder / "cache" / f"models--{repository.replace('/', '--')}"
        make_hf(kind).save_pretrained(cached / "snapshots" / COMMIT)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(COMMIT)

    vit = timm.create_model("vit_base_patch16_224.orig_in21k", pretrained=True, num_classes=3)
    torch.save(vit.state_dict(), folder / "vit.pth")
    torch.save({"model": published()}, folder / "checkpoint.pth")
    data = load_data(f"folder:{folder / 'flowers'}")
    model = dyntune.tune(vit, "dyt:rate=0.5")
    dyntune.fit(model, data.train, epochs=1)
    model.calibration = dyntune.calibrate(model, data.val)
    model.save(folder / "runs/flowers")
    return folder


@pytest.fixture
def hub(stocked, tmp_path, monkeypatch):
    """A hub whose models are in the cache, and that takes what is uploaded, and gives it back."""
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(stocked / "cache"))
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(stocked / "cache"), raising=False)
    api = SimpleNamespace(
        create_repo=lambda repo_id, **about: SimpleNamespace(repo_id=repo_id),
        file_exists=lambda repo_id, filename, **about: (tmp_path / "hub" / repo_id / filename).exists(),
        upload_folder=lambda repo_id, folder_path, **about: SimpleNamespace(
            commit_url=shutil.copytree(folder_path, tmp_path / "hub" / repo_id)
        ),
    )
    monkeypatch.setattr("huggingface_hub.HfApi", lambda **about: api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo_id, **about: str(tmp_path / "hub" / repo_id))


@pytest.fixture
def desk(stocked, hub, tmp_path, monkeypatch):
    """The folder that a page's blocks run in. Of each split that they load there are the first images, and trainings
    have two epochs."""

    def few(*arguments, **options):
        return load_data(*arguments, **options).map(lambda split: ImageSubset(split, range(min(len(split), 36))))

    def short(*arguments, **options):
        return fit(*arguments, **{**options, "epochs": 2})

    fit = dyntune.fit
    monkeypatch.setattr(dyntune.data, "load_data", few)
    monkeypatch.setattr(dyntune, "fit", short)
    shutil.copytree(stocked, tmp_path / "desk")
    monkeypatch.chdir(tmp_path / "desk")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks_of_python_run_as_they_stand(page, desk):
    text = page.read_text()
    if 'out="runs/flowers"' in text:
        shutil.rmtree("runs")  # the page trains it itself
    names: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        above = text.count("\n", 0, block.start(1))
        exec(compile("\n" * above + block[1], str(page), "exec"), names)


def test_no_block_of_python_is_written_in_another_way():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        text = page.read_text()
        assert len(re.findall("```py", text)) == len(BLOCK.findall(text)), page


def test_the_readme_can_be_read_in_three_minutes():
    assert len((ROOT / "README.md").read_text().split()) <= 1200
