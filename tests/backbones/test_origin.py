"""Where the weights of a backbone come from: what is recorded is what was looked at, and nobody waits for a network."""

import json
import threading

import pytest
import safetensors.torch
import timm
import torch

import dyntune
from dyntune.backbones import hosts, hub
from dyntune.backbones.builtin import BUILTIN_BACKBONE
from dyntune.backbones.hosts import create_backbone, rebuild
from dyntune.backbones.origin import BackboneSource
from dyntune.core.errors import BackboneError, CheckpointError
from dyntune.model.adapter_folder import read_config

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}


def origin(host):
    return dyntune.tune(host, "linear").origin


def changed(host):
    with torch.no_grad():
        host.blocks[0].mlp.fc1.weight[0, 0] += 1
    return host


@pytest.fixture
def unreachable(monkeypatch):
    """A machine without a network."""
    monkeypatch.setattr(hub, "_known", None)
    monkeypatch.setattr(hub, "_connects", lambda endpoint: False)


@pytest.mark.parametrize(
    ("build", "published"),
    [
        (lambda: create_backbone(BUILTIN_BACKBONE), True),
        (lambda: timm.create_model(BUILTIN_BACKBONE, pretrained=True), True),
        (lambda: timm.create_model(BUILTIN_BACKBONE, pretrained=True).to(torch.bfloat16), True),
        (lambda: timm.create_model(BUILTIN_BACKBONE, pretrained=False), False),
        (lambda: create_backbone(BUILTIN_BACKBONE, pretrained=False), False),
        (lambda: changed(create_backbone(BUILTIN_BACKBONE)), False),
    ],
    ids=("ours", "timm's", "bf16", "random", "ours, random", "changed"),
)
def test_weights_are_published_if_they_are_those_of_the_name(build, published):
    found = origin(build())
    assert (found.name, found.published, found.weights) == (BUILTIN_BACKBONE, published, None)


def test_nothing_is_looked_for_until_it_is_recorded(monkeypatch):
    def looked(*given):
        raise AssertionError("it was looked for")

    model = dyntune.tune(timm.create_model(BUILTIN_BACKBONE), "dyt")
    with monkeypatch.context() as patch:
        patch.setattr("dyntune.model.tuned.checked_origin", looked)
        assert dyntune.cost(model).model == BUILTIN_BACKBONE
        dyntune.optimize(model.eval())
    assert not model.origin.published


def test_what_weights_of_a_name_are_is_looked_into_once(monkeypatch):
    built = []
    monkeypatch.setattr(
        "dyntune.backbones.hosts.rebuild", lambda *given, **how: built.append(1) or rebuild(*given, **how)
    )
    hosts._published_fingerprints.cache_clear()
    for before, pretrained in ((0, True), (1, False), (1, True)):
        model = dyntune.tune(timm.create_model(BUILTIN_BACKBONE, pretrained=pretrained), "linear")
        model.reset_classifier(3)
        repr(model)
        assert len(built) == before
        assert (model.origin.published, model.origin.arguments["num_classes"]) == (pretrained, 3)
        assert len(built) == 1


def test_training_every_weight_does_not_make_them_unknown():
    model = dyntune.tune(create_backbone(BUILTIN_BACKBONE), "full")
    changed(model.backbone.host)
    assert model.origin.published


def test_the_file_that_weights_were_read_from_is_recorded_and_read_again(two_blocks, tmp_path):
    model = dyntune.tune(create_backbone("vit_two_blocks", weights=two_blocks), "linear").eval()
    assert (model.origin.weights, model.origin.published) == (str(two_blocks.resolve()), False)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(dyntune.load(model.save(tmp_path))(images), model(images))


def test_weights_of_ones_own_are_asked_for(two_blocks, tmp_path):
    host = timm.create_model("vit_two_blocks")
    host.load_state_dict(safetensors.torch.load_file(two_blocks), strict=False)  # by hand
    model = dyntune.tune(host, "linear").eval()
    assert not model.origin.known
    folder = model.save(tmp_path / "run")
    card = (folder / "README.md").read_text()
    assert "base_model" not in card and "vit_two_blocks with weights of unknown origin" in card
    assert 'dyntune.load("path/to/this/folder", backbone=model)' in card
    with pytest.raises(CheckpointError, match=r"load\(folder, backbone=model\), or weights=FILE \(--weights FILE\)"):
        dyntune.load(folder)
    images = torch.randn(2, 3, 32, 32)
    loaded = dyntune.load(folder, weights=two_blocks)
    assert torch.equal(loaded(images), model(images)) and loaded.origin.weights == str(two_blocks)


@pytest.mark.parametrize("official", [True, False])
def test_weights_that_were_not_at_hand_when_the_adapter_was_saved_are_compared_when_it_is_loaded(
    tmp_path, monkeypatch, official
):
    def missing(*_, **__):
        raise BackboneError("the cache does not have it")

    host = timm.create_model(BUILTIN_BACKBONE, pretrained=official)
    hosts._published_fingerprints.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(hosts, "rebuild", missing)
        model = dyntune.tune(host, "linear").eval()
        folder = model.save(tmp_path)
    assert not model.origin.published
    with monkeypatch.context() as patch:
        patch.setattr("dyntune.model.load.rebuild", missing)
        with pytest.raises(
            CheckpointError, match=r"cannot be had \(the cache does not have it\), so that nobody knows"
        ):
            dyntune.load(folder)
    if official:
        images = torch.randn(2, 3, 32, 32)
        loaded = dyntune.load(folder)
        assert torch.equal(loaded(images), model(images)) and loaded.origin.published
    else:
        with pytest.raises(CheckpointError, match="are not those published under its name, so that nobody knows"):
            dyntune.load(folder)


def test_an_adapter_of_an_earlier_version_is_looked_for_as_before(tmp_path):
    folder = dyntune.tune(create_backbone(BUILTIN_BACKBONE), "linear").save(tmp_path)
    config = json.loads((folder / "dyntune.json").read_text())
    del config["backbone"]["published"], config["config_sha256"]
    (folder / "dyntune.json").write_text(json.dumps(config))
    assert dyntune.load(folder).origin.published


def test_a_backbone_that_was_not_checked_is_not_called_the_recorded_one(tmp_path):
    folder = dyntune.tune(create_backbone(BUILTIN_BACKBONE), "linear").save(tmp_path)
    other = changed(create_backbone(BUILTIN_BACKBONE))
    assert dyntune.load(folder, backbone=create_backbone(BUILTIN_BACKBONE)).origin.published
    assert not dyntune.load(folder, backbone=other, check_backbone=False).origin.known


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_model_of_a_hub_that_others_have_built_is_compared_with_the_cache(tmp_path, monkeypatch, pretrained):
    folder = tmp_path / "somebody" / "little-vit"
    folder.mkdir(parents=True)
    host = timm.create_model("vit_tiny_patch16_224", **SMALL)
    safetensors.torch.save_file(host.state_dict(), folder / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": SMALL}
    pretrained_cfg = {"input_size": [3, 32, 32], "num_classes": 5, "classifier": "head"}
    (folder / "config.json").write_text(json.dumps(config | {"pretrained_cfg": pretrained_cfg}))
    monkeypatch.setattr(
        "timm.models._hub.hf_hub_download", lambda repo_id, filename, **about: str(tmp_path / repo_id / filename)
    )
    found = origin(timm.create_model("hf-hub:somebody/little-vit", pretrained=pretrained))
    assert (found.name, found.published) == ("hf-hub:somebody/little-vit", pretrained)
    assert found.repository == ("somebody/little-vit" if pretrained else None)


def test_nothing_is_downloaded_to_look_at_it(monkeypatch, tmp_path):
    """These weights are of no hub."""
    name, created, create = "vit_huge_patch14_gap_224.in1k_ijepa", [], timm.create_model

    def noting(name, pretrained=False, **arguments):
        created.extend([name] * pretrained)
        return create(name, **arguments)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(timm, "create_model", noting)
    with hub.cache_alone(), pytest.raises(BackboneError, match="not on this machine"):
        create_backbone(name)
    assert not created and hub.downloads()


@pytest.mark.parametrize(
    ("source", "title", "repository"),
    [
        (BackboneSource("vit.tag", published=True), "vit.tag", "timm/vit.tag"),
        (BackboneSource("vit.tag"), "vit with weights of unknown origin", None),
        (BackboneSource("vit.tag", weights="/home/me/a.npz"), "vit.tag with weights from a.npz", None),
        (BackboneSource("hf:me/vit", published=True), "hf:me/vit", "me/vit"),
        (BackboneSource("hf:me/vit"), "hf:me/vit with weights of unknown origin", None),
        (BackboneSource("hf:/home/me/vit", published=True), "hf:/home/me/vit", None),
        (BackboneSource(BUILTIN_BACKBONE, published=True), BUILTIN_BACKBONE, None),
        (BackboneSource(None), "a custom model", None),
    ],
)
def test_a_heading_names_what_is_known(source, title, repository):
    assert (source.title, source.repository) == (title, repository)


@pytest.mark.parametrize(
    "name", ["hf:/home/me/vit", "local-dir:/home/me/vit", "frames:hf:/home/me/vit", "inflated:local-dir:/home/me/vit"]
)
def test_no_path_of_this_machine_is_left_for_others(name):
    assert BackboneSource(name, {"num_classes": 3}, published=True).without_paths() == BackboneSource(None)
    kept = BackboneSource("vit.tag", {"num_classes": 3}, "/home/me/a.npz").without_paths()
    assert kept == BackboneSource("vit.tag", {"num_classes": 3})


@pytest.mark.parametrize("prefix", ["", "frames:", "inflated:"])
def test_a_model_for_clips_says_of_its_weights_what_its_image_model_does(prefix):
    words = {"vit.tag": "weights that timm has for it", "hf:me/vit": "weights from there (hf)"}
    words[BUILTIN_BACKBONE] = "weights that come with Dyntune"
    for name, said in words.items():
        assert BackboneSource(prefix + name, published=True).weights_in_words == said


def test_without_a_network_there_is_an_answer_at_once(unreachable, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        BackboneError, match=r"cannot be reached .*give a local weight file .*or use the built-in backbone"
    ):
        create_backbone("vit_tiny_patch16_224", img_size=32, depth=1)
    assert not constants.HF_HUB_OFFLINE
    source = BackboneSource("vit_tiny_patch16_224", {"img_size": 32, "num_classes": 3}, published=True)
    with pytest.raises(BackboneError, match="backbone=model") as error:
        rebuild(source)
    assert "built-in" not in str(error.value)


def test_a_name_that_is_looked_up_for_ever_is_waited_for_no_longer_than_said(monkeypatch):
    asked, found, course = threading.Event(), threading.Event(), []

    def look_up(*given, **options):
        course.append("asked")
        asked.set()
        found.wait(600)
        course.append("found")
        raise OSError

    monkeypatch.setattr(hub, "PATIENCE", 0.05)
    monkeypatch.setattr(hub.socket, "getaddrinfo", look_up)
    assert not hub._connects("https://huggingface.co")
    assert asked.wait(60) and course == ["asked"]
    found.set()


@pytest.mark.parametrize(
    ("proxies", "place"),
    [
        ({}, ("hub.org", 443)),
        ({"https": "http://proxy:3128"}, ("proxy", 3128)),
        ({"all": "proxy:1080"}, ("proxy", 1080)),
    ],
)
def test_behind_a_proxy_that_is_what_must_answer(monkeypatch, proxies, place):
    asked = []

    def look_up(*to, **options):
        asked.append(to)
        raise OSError

    monkeypatch.setattr(hub.urllib.request, "getproxies", lambda: proxies)
    monkeypatch.setattr(hub.urllib.request, "proxy_bypass", lambda host: False)
    monkeypatch.setattr(hub.socket, "getaddrinfo", look_up)
    assert not hub._connects("https://hub.org") and asked == [place]


def test_one_address_that_leads_nowhere_does_not_matter(monkeypatch):
    nowhere = threading.Event()

    class Connection:
        def close(self): ...

    def connect(address, seconds):
        if address[0] == "::1":
            nowhere.wait(30)
        return Connection()

    found = [(0, 0, 0, "", ("::1", 443, 0, 0)), (0, 0, 0, "", ("10.0.0.1", 443))]
    monkeypatch.setattr(hub.socket, "getaddrinfo", lambda *given, **options: found)
    monkeypatch.setattr(hub.socket, "create_connection", connect)
    assert hub._connects("https://hub.org")
    nowhere.set()


def test_threads_may_leave_the_cache_in_any_order(monkeypatch):
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    first, second = hub.cache_alone(), hub.cache_alone()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert constants.HF_HUB_OFFLINE and not hub.downloads()
    second.__exit__(None, None, None)
    assert not constants.HF_HUB_OFFLINE and hub.downloads()


def test_a_model_of_a_repository_with_another_configuration_is_not_the_repositorys(make_hf, tmp_path):
    transformers = pytest.importorskip("transformers")
    make_hf("vit").save_pretrained(tmp_path / "vit")
    read = transformers.ViTForImageClassification.from_pretrained
    same = origin(read(tmp_path / "vit"))
    assert same.name == f"hf:{tmp_path / 'vit'}" and same.published
    assert origin(read(tmp_path / "vit", id2label={0: "a", 1: "b"}, ignore_mismatched_sizes=True)).published
    for options in ({"hidden_act": "relu"}, {"layer_norm_eps": 1e-3}, {"num_hidden_layers": 2}):
        assert origin(read(tmp_path / "vit", **options)) == BackboneSource(None)
    other = read(tmp_path / "vit")
    with torch.no_grad():
        other.vit.embeddings.cls_token += 1
    found = origin(other)
    assert found.name == f"hf:{tmp_path / 'vit'}" and not found.published


def test_what_is_recorded_in_a_folder_says_it(tmp_path):
    folder = dyntune.tune(create_backbone(BUILTIN_BACKBONE), "linear").save(tmp_path)
    assert read_config(folder)["backbone"]["published"] is True
