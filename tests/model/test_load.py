"""Saved adapters: what comes back, what is refused, and what a failure leaves behind."""

import hashlib
import json
import math
import os
import pickle
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

import dyntune
from dyntune.backbones.hosts import create_backbone
from dyntune.core.errors import BackboneError, CheckpointError, DyntuneError, MachineError
from dyntune.core.files import SEAL, sealed, write_atomically
from dyntune.model.adapter_folder import CARD, CONFIG, FORMER_CONFIG, FORMER_WEIGHTS, PREVIOUS, WEIGHTS, read_config
from dyntune.model.tune import build_tuned

TINY = {"img_size": 32, "num_classes": 3}


class Bomb:
    """Unpickling this makes the directory ``path``."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def build(make_host, randomise):
    """``build(spec, seed=1)``: a model on the plain host whose trained tensors, and only those, depend on the seed."""

    def build(spec="dyt:rate=0.7", seed=1, name="plain"):
        model = dyntune.tune(make_host(name), spec)
        donor = randomise(dyntune.tune(make_host(name), spec), seed)
        with torch.no_grad():
            for key, parameter in model.tuned_state().items():
                parameter.copy_(donor.tuned_state()[key])
        return model.eval()

    return build


@pytest.fixture
def saved(build, tmp_path):
    """The folder of a saved adapter."""
    return build().save(tmp_path / "adapter")


def edit(folder, **changes):
    """Sets entries of the configuration, as who changes it on purpose would; ``...`` removes one."""
    config = json.loads((folder / CONFIG).read_text())
    config |= {SEAL: ..., **changes}
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def replace_weights(folder, payload):
    """Puts ``payload`` in place of the weights and corrects the digest, as who damages a file on purpose would."""
    (folder / WEIGHTS).write_bytes(payload)
    edit(folder, weights_sha256=hashlib.sha256(payload).hexdigest())


@pytest.mark.parametrize("spec", ["dyt", "dyt:dispatch=attn-mlp,scale=learnable,experts=3", "full+dispatch", "linear"])
@torch.no_grad()
def test_round_trip_is_bit_equal(build, make_host, images_for, tmp_path, spec):
    model = build(spec)
    model.classes = ("cat", "dog", "fox", "owl", "ünï")
    loaded = dyntune.load(str(model.save(str(tmp_path / "a" / "b"))), backbone=make_host())
    images = images_for(model.backbone.host, 4)
    assert torch.equal(loaded(images), model(images))
    assert (loaded.spec, loaded.parts) == (spec, model.parts)
    assert loaded.classes == model.classes
    assert loaded.preprocessing == model.preprocessing
    assert loaded.origin == model.origin
    assert not any(module.training for module in loaded.modules())
    assert loaded.tuned_state().keys() == model.tuned_state().keys()


def test_only_trained_tensors_are_saved(build, saved):
    model = build()
    tensors = safetensors.torch.load_file(saved / WEIGHTS)
    trained = {model.backbone.saved_name(name): p for name, p in model.tuned_state().items()}
    surrogates = {name for name, buffer in model.backbone.named_buffers() if ".surrogate." in name}
    assert len(surrogates) == 3 * 4 and tensors.keys() == trained.keys() | surrogates
    assert "blocks.0.mlp.beside.adapter.up_proj.weight" in tensors  # as files have always called it
    assert all(torch.equal(tensors[name], p) for name, p in trained.items())
    values = 3 * (2 * 32 * 8 + 8 + 32) + 3 * (32 + 1) + 32 * 5 + 5
    assert sum(tensors[name].numel() for name in trained) == values
    fitted = sum(tensors[name].numel() for name in surrogates)
    assert fitted == 3 * (2 * 32 + 32 + 1)  # of rank 1, in bf16
    assert dyntune.cost(model).adapter_bytes == 4 * values + 2 * fitted
    header = 8 + int.from_bytes((saved / WEIGHTS).read_bytes()[:8], "little")
    assert (saved / WEIGHTS).stat().st_size == header + 4 * values + 2 * fitted


def test_folder_holds_three_files_and_is_readable_as_json(saved):
    assert sorted(path.name for path in saved.iterdir()) == sorted((CONFIG, WEIGHTS, CARD))
    config = json.loads((saved / CONFIG).read_text(encoding="utf-8"))
    assert config["spec"] == "dyt:rate=0.7"
    assert [part["type"] for part in config["parts"]] == ["adaptformer", "dispatch"]
    assert "dyntune" in (saved / CARD).read_text(encoding="utf-8")


@torch.no_grad()
def test_folders_whose_files_are_called_as_before_are_read_and_replaced(saved, build, make_host, images_for):
    (saved / CONFIG).rename(saved / FORMER_CONFIG)
    (saved / WEIGHTS).rename(saved / FORMER_WEIGHTS[0])
    loaded = dyntune.load(saved, backbone=make_host())
    images = images_for(loaded.backbone.host, 2)
    assert torch.equal(loaded(images), build()(images))
    build(seed=2).save(saved)
    assert sorted(path.name for path in saved.iterdir()) == sorted((CONFIG, WEIGHTS, CARD))
    assert torch.equal(dyntune.load(saved, backbone=make_host())(images), build(seed=2)(images))


def test_an_adapter_of_peft_in_the_same_folder_is_left_alone(saved, build, make_host):
    (saved / FORMER_CONFIG).write_text('{"peft_type": "LORA"}')
    (saved / FORMER_WEIGHTS[0]).write_bytes(b"theirs")
    build(seed=2).save(saved)
    dyntune.load(saved, backbone=make_host())
    assert (saved / FORMER_WEIGHTS[0]).read_bytes() == b"theirs"
    (saved / CONFIG).unlink()
    refused(saved, make_host, "not written by Dyntune", "PeftModel.from_pretrained")


def test_saving_again_replaces_the_adapter(build, make_host, images_for, saved):
    newer = build(seed=2)
    newer.save(saved)
    images = images_for(newer.backbone.host, 2)
    with torch.no_grad():
        assert torch.equal(dyntune.load(saved, backbone=make_host())(images), newer(images))


def test_loaded_model_trains_on(saved, make_host, images_for):
    model = dyntune.load(saved, backbone=make_host()).train()
    dyntune.training_loss(model, images_for(model.backbone.host, 2), torch.tensor([0, 1])).total.backward()
    assert {name for name, p in model.backbone.named_parameters() if p.requires_grad} == set(model.tuned_state())


def refused(folder, make_host, *said, **options):
    with pytest.raises(CheckpointError) as error:
        dyntune.load(folder, backbone=make_host(), **options)
    for text in said:
        assert text in str(error.value)


def test_missing_files_are_named(saved, make_host, tmp_path):
    refused(tmp_path / "nowhere", make_host, "nowhere", CONFIG)
    (saved / WEIGHTS).unlink()
    refused(saved, make_host, str(saved), WEIGHTS)
    (saved / CONFIG).unlink()
    refused(saved, make_host, CONFIG, "missing")


def test_model_card_is_not_needed(saved, make_host):
    (saved / CARD).unlink()
    dyntune.load(saved, backbone=make_host())


@pytest.mark.parametrize("position", [0, 100, -1])
def test_any_changed_byte_of_the_weights_is_noticed(saved, make_host, position):
    payload = bytearray((saved / WEIGHTS).read_bytes())
    payload[position] ^= 1
    (saved / WEIGHTS).write_bytes(payload)
    refused(saved, make_host, WEIGHTS, "damaged")


def test_weights_that_are_not_meant_are_never_in_memory(saved, make_host, monkeypatch):
    os.truncate(saved / WEIGHTS, 2**24)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"all of {path.name} was read"))
    refused(saved, make_host, WEIGHTS, "damaged")


def test_cut_off_weights_are_noticed(saved, make_host):
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:-10])
    refused(saved, make_host, "damaged")


def test_weights_of_another_adapter_are_noticed(build, saved, make_host, tmp_path):
    other = build(seed=2).save(tmp_path / "other")
    shutil.copy(other / WEIGHTS, saved / WEIGHTS)
    refused(saved, make_host, "does not belong")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b'{"library": "peft"}', b'{"peft_type": "LORA"}']
)
def test_configurations_that_are_none_are_refused(saved, make_host, content):
    (saved / CONFIG).write_bytes(content)
    refused(saved, make_host, CONFIG)


@pytest.mark.parametrize("number", [2, 99, "1", None])
def test_newer_format_is_refused(saved, make_host, number):
    edit(saved, format=number)
    refused(saved, make_host, repr(number), "Upgrade Dyntune")


KEYS = ("format", "spec", "parts", "backbone", "preprocessing", "classes", "results", "weights_sha256")


@pytest.mark.parametrize("value", [..., 5, "x", [], [1], {}, None], ids=repr)
@pytest.mark.parametrize("key", KEYS)
def test_damaged_configuration_is_refused_or_harmless(saved, build, make_host, images_for, key, value):
    edit(saved, **{key: value})
    try:
        loaded = dyntune.load(saved, backbone=make_host())
    except CheckpointError as error:
        assert str(saved) in str(error)
        return
    images = images_for(loaded.backbone.host, 2)
    with torch.no_grad():
        assert torch.equal(loaded(images), build()(images))
    assert key not in ("format", "parts", "backbone", "preprocessing", "weights_sha256")
    assert loaded.classes is None or all(isinstance(name, str) for name in loaded.classes)


@pytest.mark.parametrize(
    "part,said",
    [
        ({"type": "adaptfromer"}, "Did you mean 'adaptformer'"),
        ({"type": "adaptformer", "botleneck": 8}, "Did you mean 'bottleneck'"),
        ({"type": "adaptformer", "bottleneck": "8"}, "whole number"),
        ({"type": "adaptformer", "bottleneck": -1}, "at least 1"),
    ],
)
def test_wrong_parts_are_told(saved, make_host, part, said):
    edit(saved, parts=[part])
    refused(saved, make_host, CONFIG, said)


def test_adapter_that_does_not_fit_is_refused(saved, make_host):
    for changes, said in (
        ({"embed_dim": 64}, "expected"),
        ({"num_classes": 7}, "host.head"),
        ({"depth": 2}, "unexpected blocks.2"),
    ):
        with pytest.raises(CheckpointError, match="does not fit the backbone") as error:
            dyntune.load(saved, backbone=make_host(**changes))
        assert said in str(error.value)
    with pytest.raises(CheckpointError, match="missing blocks"):
        dyntune.load(saved, backbone=make_host(depth=4))


def test_other_backbone_weights_are_refused_unless_asked_for(saved, build, make_host, images_for):
    with pytest.raises(CheckpointError, match="other weights") as error:
        dyntune.load(saved, backbone=make_host(seed=5))
    assert "check_backbone=False" in str(error.value)
    model = dyntune.load(saved, backbone=make_host(seed=5), check_backbone=False)
    images = images_for(model.backbone.host, 2)
    with torch.no_grad():
        assert not torch.allclose(model(images), build()(images))


def test_small_changes_of_any_frozen_tensor_are_noticed(saved, make_host):
    names = [name for name, _ in make_host().named_parameters() if not name.startswith("head")]
    for name in names:
        host = make_host()
        with torch.no_grad():
            host.get_parameter(name).mul_(1.001)
        with pytest.raises(CheckpointError, match="other weights"):
            dyntune.load(saved, backbone=host)


def test_head_of_the_given_backbone_does_not_matter(saved, make_host, build, images_for):
    host = make_host()
    torch.nn.init.zeros_(host.head.weight)
    images = images_for(host, 2)
    with torch.no_grad():
        assert torch.equal(dyntune.load(saved, backbone=host)(images), build()(images))


@pytest.mark.parametrize("broken", [1, 2, 3])
@torch.no_grad()
def test_failure_while_writing_leaves_a_whole_adapter(build, saved, make_host, images_for, monkeypatch, broken):
    """Whichever of the writes fails, the folder holds the old adapter or the new one."""
    calls = []
    sync = os.fsync

    def full_disk(handle):
        calls.append(handle)
        if len(calls) == broken:
            raise OSError("no space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(MachineError, match="no room left"):
        build(seed=2).save(saved)
    monkeypatch.undo()
    assert not [path for path in saved.iterdir() if path.name not in (CONFIG, WEIGHTS, CARD)]
    loaded = dyntune.load(saved, backbone=make_host())
    images = images_for(loaded.backbone.host, 2)
    found = [torch.equal(loaded(images), build(seed=seed)(images)) for seed in (1, 2)]
    assert found == ([True, False] if broken == 1 else found)
    assert any(found)


def test_interrupted_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted(temporary):
        temporary.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, interrupted)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_saving_into_a_file_is_refused(build, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file"):
        build().save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("digest", ["stale", "corrected"])
@pytest.mark.parametrize("writer", [pickle.dumps, "torch"], ids=["pickle", "torch"])
def test_pickle_in_place_of_the_weights_is_never_executed(saved, make_host, tmp_path, writer, digest):
    mark = tmp_path / "executed"
    if writer == "torch":
        torch.save(Bomb(mark), tmp_path / "bomb")
        payload = (tmp_path / "bomb").read_bytes()
    else:
        payload = writer(Bomb(mark))
    if digest == "corrected":
        replace_weights(saved, payload)
    else:
        (saved / WEIGHTS).write_bytes(payload)
    try:
        refused(saved, make_host, WEIGHTS)
    finally:
        assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()


def test_weights_of_other_names_are_refused(saved, make_host):
    replace_weights(saved, safetensors.torch.save({"model.weight": torch.ones(3)}))
    refused(saved, make_host, "does not fit", "missing")


@pytest.fixture
def no_downloads(monkeypatch):
    """timm without a network: nothing pretrained can be had."""
    create = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no network")
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)


@torch.no_grad()
def test_backbone_is_rebuilt_from_its_name_and_a_weight_file(no_downloads, randomise, tmp_path):
    host = randomise(create_backbone("vit_tiny_patch16_224", pretrained=False, **TINY))
    file = tmp_path / "vit.safetensors"
    safetensors.torch.save_file(host.state_dict(), file)
    model = dyntune.tune(host, "dyt").eval()
    assert model.origin.name.startswith("vit_tiny_patch16_224")
    folder = randomise_tuned(model, randomise).save(tmp_path / "adapter")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    loaded = dyntune.load(folder, weights=file)
    assert torch.equal(loaded(images), model(images))
    assert loaded.preprocessing.size == (32, 32)
    assert loaded.origin.weights == str(file)
    again = dyntune.load(loaded.save(tmp_path / "again"))
    assert torch.equal(again(images), model(images))

    with pytest.raises(CheckpointError, match=r"nobody knows where .*--weights FILE"):  # nothing is asked for
        dyntune.load(folder)
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file(randomise(host, seed=9).state_dict(), other)
    with pytest.raises(CheckpointError, match="other weights"):
        dyntune.load(folder, weights=other)


def randomise_tuned(model, randomise):
    """Random values in the trained tensors only."""
    frozen = {name: p.clone() for name, p in model.backbone.named_parameters() if not p.requires_grad}
    randomise(model, 3)
    for name, parameter in model.backbone.named_parameters():
        if name in frozen:
            parameter.copy_(frozen[name])
    return model


@torch.no_grad()
def test_full_tuning_needs_no_backbone_weights(no_downloads, randomise, tmp_path):
    host = create_backbone("vit_tiny_patch16_224", pretrained=False, **TINY)
    model = randomise(dyntune.tune(host, "full", "dyt")).eval()
    folder = model.save(tmp_path / "adapter")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dyntune.load(folder)(images), model(images))


def test_backbone_that_timm_did_not_build_must_be_given(saved):
    with pytest.raises(BackboneError, match="backbone=model"):
        dyntune.load(saved)


def test_refused_adapter_leaves_the_weights_of_the_given_backbone(saved, make_host):
    host = make_host(seed=5)
    before = {name: p.clone() for name, p in host.state_dict().items()}
    with pytest.raises(CheckpointError):
        dyntune.load(saved, backbone=host)
    assert all(torch.equal(p, before[name]) for name, p in host.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_another_precision_comes_back_in_it(tmp_path, dtype):
    host = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3)
    path = tmp_path / "backbone.safetensors"
    safetensors.torch.save_file(host.state_dict(), path)
    model = dyntune.tune(host.to(dtype), "dyt").eval()
    model.save(tmp_path / "adapter")
    loaded = dyntune.load(tmp_path / "adapter", weights=path)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    images = torch.randn(2, 3, 32, 32).to(dtype)
    assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize("options", [{"act_layer": "relu"}, {"patch_size": 8}, {"init_values": 0.1}, {"qk_norm": True}])
def test_a_backbone_that_its_name_would_not_build_must_be_given(tmp_path, options):
    def make():
        torch.manual_seed(0)
        return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, **options)

    model = dyntune.tune(make(), "dyt").eval()
    model.save(tmp_path / "adapter")
    with pytest.raises(DyntuneError, match="backbone=model"):
        dyntune.load(tmp_path / "adapter")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(dyntune.load(tmp_path / "adapter", backbone=make())(images), model(images))


@pytest.mark.parametrize(
    "extra", [{"checkpoint_path": "/etc/passwd"}, {"pretrained_cfg_overlay": {"file": "x"}}, {"num_classes": {}}]
)
def test_a_stranger_cannot_pass_arguments_to_timm(tmp_path, extra):
    host = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3)
    dyntune.tune(host, "dyt").save(tmp_path / "adapter")
    path = tmp_path / "adapter" / CONFIG
    config = json.loads(path.read_text())
    config["backbone"]["arguments"] |= extra
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="backbone argument"):
        dyntune.load(tmp_path / "adapter")


def test_two_kills_in_a_row_leave_the_adapter_that_the_configuration_names(make_host, tmp_path, monkeypatch):
    """A kill between weights and configuration, twice: simulated by a configuration that is never written."""
    folder = tmp_path / "adapter"
    first = dyntune.tune(make_host(), "dyt").eval()
    first.save(folder)
    for seed in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr("dyntune.model.adapter_folder.write_json", lambda *_: (_ for _ in ()).throw(_Killed()))
            patch.setattr(Path, "replace", _no_way_back(Path.replace))
            with pytest.raises(_Killed):
                torch.manual_seed(seed)
                dyntune.tune(make_host(), "dyt").save(folder)
    loaded = dyntune.load(folder, backbone=make_host())
    assert all(torch.equal(p, loaded.tuned_state()[name]) for name, p in first.tuned_state().items())


class _Killed(BaseException):
    pass


def _no_way_back(replace):
    """After a kill nothing puts the previous weights back."""
    return lambda self, target: self if self.name == PREVIOUS else replace(self, target)


def test_a_tuned_model_is_no_backbone(build, tmp_path):
    folder = build().save(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="give the plain model"):
        dyntune.load(folder, backbone=build())


def test_tensors_have_the_order_that_states_of_unfinished_runs_know(make_host):
    """An optimiser's state knows tensors by their number: what places have in common, the host, the blocks."""
    names = list(dyntune.tune(make_host(), "fact-tt+adaptformer").tuned_state())
    first = [name.partition(".")[0] for name in names]
    assert first == sorted(first, key=("shared", "host", "blocks").index)


def test_every_weight_and_an_adapter_beside_them_are_complete(make_host, tmp_path):
    model = dyntune.tune(make_host(), "full+adaptformer").eval()
    folder = model.save(tmp_path)
    assert read_config(folder)["backbone"]["complete"]


@pytest.fixture
def made_up(saved):
    """``made_up(change)``: the folder with a configuration that a stranger has changed and sealed again."""

    def made_up(change):
        config = json.loads((saved / CONFIG).read_text())
        change(config)
        (saved / CONFIG).write_text(json.dumps(sealed(config)))
        return saved

    return made_up


@pytest.mark.parametrize(
    "change,said",
    [
        (lambda c: c["preprocessing"].update(mean=[math.inf, 0.5, 0.5]), "finite numbers"),
        (lambda c: c["preprocessing"].update(std=[0.5, math.nan, 0.5]), "finite numbers"),
        (lambda c: c["preprocessing"].update(size=[10**9, 10**9]), "at most 4096"),
        (lambda c: c["preprocessing"].update(size=["32", 32]), "no whole number"),
        (lambda c: c["parts"][0].update(bottleneck=10**9), "beyond 65,536"),
        (lambda c: c["parts"][0].update(bottleneck=60_000), "expected (60000, 32)"),
        (lambda c: c["parts"][0].update(scale=1e308), "is not valid"),
        (lambda c: c["parts"].append({"type": "auto", "budget": 0.5}), "what it has found"),
        (lambda c: c["backbone"].update(complete=True), "that every weight of the backbone is saved"),
        (lambda c: c["backbone"].update(dtype="float16", fingerprint=None), "other weights"),
        (lambda c: c.update(classes=["a", "b"]), "names 2 classes, but the head has 5 outputs"),
        (lambda c: c.update(classes=[[["a"]]]), "list of names"),
        (lambda c: c.update(format=True), "has format True"),
        (lambda c: c.update(extra={"host.norm.weight": True}), "missing host.norm.weight"),
        (lambda c: c.update(extra={"nowhere": True}), "the model lacks: nowhere"),
        (lambda c: c.update(extra=["host.norm.weight"]), "whether it is trained"),
    ],
)
def test_what_no_save_has_written_is_refused(made_up, make_host, change, said):
    refused(made_up(change), make_host, said)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("name", ["blocks.0.mlp.dispatcher.gate.bias", "host.head.weight"])
def test_numbers_that_are_not_finite_are_refused(saved, make_host, name, value):
    tensors = safetensors.torch.load_file(saved / WEIGHTS)
    tensors[name].view(-1)[0] = value
    replace_weights(saved, safetensors.torch.save(tensors))
    refused(saved, make_host, str(saved), name, "not finite")


def test_numbers_that_the_precision_does_not_hold_and_integers_are_refused(build, make_host, tmp_path):
    dyntune.tune(make_host().half(), "dyt").save(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS)
    for other, said in ((torch.full((5,), 1e6), "not finite in torch.float16"), (torch.ones(5).int(), "torch.int32")):
        replace_weights(tmp_path, safetensors.torch.save(tensors | {"host.head.bias": other}))
        refused(tmp_path, make_host, "host.head.bias", said)


def test_a_changed_figure_of_the_configuration_is_noticed(saved, make_host):
    text = (saved / CONFIG).read_text()
    assert "0.7" in text
    (saved / CONFIG).write_text(text.replace("0.7", "0.6"))
    refused(saved, make_host, CONFIG, "not as it was written", "remove its entry")


@pytest.mark.parametrize(
    "content,said",
    [
        ('{"library": ' + "[" * 3000 + "]" * 3000 + "}", "nested more than"),
        ('{"library": ' + "[" * 40 + "]" * 40 + "}", "nested more than"),
        ('{"format": ' + "9" * 5000 + "}", "whole number of 5000 digits"),
        ('{"library": "' + "x" * 17_000_000 + '"}', "bytes"),
    ],
    ids=["deep", "too deep", "long number", "large"],
)
def test_json_that_would_take_the_machine_is_refused(saved, make_host, content, said):
    (saved / CONFIG).write_text(content)
    refused(saved, make_host, CONFIG, said)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_pipes_and_devices_are_not_waited_for(saved, build, make_host, name):
    for put in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (saved / name).unlink()
        put(saved / name)
        refused(saved, make_host, name, "missing")
    build(seed=2).save(saved)  # takes their place
    dyntune.load(saved, backbone=make_host())


ELSEWHERE = ["hf-hub:nobody/nothing", "local-dir:/nowhere", "hf:nobody/nothing", "hf:/nowhere"]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_stranger_does_not_decide_what_is_fetched_or_read(made_up, make_host, monkeypatch, name):
    def followed(*_, **__):
        raise AssertionError("it was followed")

    folder = made_up(lambda c: c["backbone"].update(name=name, arguments={"num_classes": 5}, published=True))
    for module in ("dyntune.model.load", "dyntune.backbones.hosts"):
        monkeypatch.setattr(f"{module}.create_backbone", followed)
    with pytest.raises(CheckpointError, match="trust=True") as error:
        dyntune.load(folder)
    assert name in str(error.value) and str(folder) in str(error.value)
    dyntune.load(folder, backbone=make_host())
    with pytest.raises(CheckpointError, match="it was followed"):
        dyntune.load(folder, trust=True)


@torch.no_grad()
def test_weights_are_read_from_where_they_were_given_on_this_machine(tmp_path, monkeypatch):
    file = tmp_path / "vit.safetensors"
    safetensors.torch.save_file(timm.create_model("vit_two_blocks").state_dict(), file)
    model = build_tuned("vit_two_blocks", "linear", classes="abc", weights=file).eval()
    folder, images = model.save(tmp_path / "run"), torch.randn(2, 3, 32, 32)
    assert torch.equal(dyntune.load(folder)(images), model(images))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    with pytest.raises(CheckpointError, match="trust=True"):
        dyntune.load(folder)
    assert torch.equal(dyntune.load(folder, weights=file)(images), model(images))  # who gives it knows it
    assert torch.equal(dyntune.load(folder)(images), model(images))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a third"))
    assert torch.equal(dyntune.load(folder, trust=True)(images), model(images))
    inside = shutil.copytree(folder, tmp_path / "sent")
    config = json.loads((inside / CONFIG).read_text())
    config["backbone"]["weights"] = str(shutil.copy(file, inside))
    (inside / CONFIG).write_text(json.dumps(sealed(config)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a fourth"))
    assert torch.equal(dyntune.load(inside)(images), model(images))  # what lies in the folder belongs to it


@torch.no_grad()
def test_a_model_that_was_converted_after_it_was_tuned_comes_back(build, make_host, images_for, tmp_path):
    model = build().to(torch.bfloat16)
    loaded = dyntune.load(model.save(tmp_path), backbone=make_host())
    images = images_for(model.backbone.host, 2).to(torch.bfloat16)
    assert torch.equal(loaded(images), model(images))


def test_the_default_precision_of_the_program_is_not_that_of_the_backbone(tmp_path):
    host = create_backbone("vit_mini_patch4_32.dyntune", num_classes=5)
    model = dyntune.tune(host, "adaptformer").eval()
    model.save(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
    torch.set_default_dtype(torch.float64)
    try:
        loaded = dyntune.load(tmp_path)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(images), expected)
