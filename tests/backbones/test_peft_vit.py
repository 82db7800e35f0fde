"""Hosts that Hugging Face's PEFT has wrapped: its layers are trained, skipped, saved, counted and merged with ours."""

import copy
import json
import sys

import peft
import pytest
import safetensors.torch
import timm
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

import dyntune
from dyntune.backbones.hosts import create_backbone
from dyntune.backbones.peft import PeftBackbone
from dyntune.backbones.peft_config import TYPES
from dyntune.backbones.sites import Change
from dyntune.core.errors import BackboneError, CheckpointError
from dyntune.core.files import SEAL
from dyntune.core.shapes import shapes_only
from dyntune.model.adapter_folder import CONFIG

LAYERS = {"target_modules": ["qkv", "fc1"], "modules_to_save": ["head"]}
OPTIONS = {
    "BEFT": {},
    "BOFT": {"boft_block_size": 4},
    "DEFT": {"r": 4},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 20},
    "GLORA": {"r": 4},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": ["fc1"]},
    "LN_TUNING": {"target_modules": ["norm1", "norm2"]},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "LORA": {"r": 4},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "PEANUT": {"r": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 8},
    "SUPERTUNING": {},
    "UNILORA": {"r": 4},
    "VBLORA": {"vector_length": 8, "num_vectors": 16, "topk": 2, "r": 4},
    "VERA": {"r": 4},
}
CASES = {kind: (kind, options) for kind, options in OPTIONS.items()} | {
    "DORA": ("LORA", {"r": 4, "use_dora": True}),
    "LORA-bias": ("LORA", {"r": 4, "use_rslora": True, "lora_bias": True, "bias": "all", "lora_dropout": 0.1}),
    "LORA-wide": ("LORA", {"r": 4, "target_modules": ["proj", "fc2"], "modules_to_save": ["norm", "head"]}),
    "LORA-headless": ("LORA", {"r": 4, "modules_to_save": None}),
}
KNOWN = [case for case, (kind, _) in CASES.items() if kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING]
FEW = ["LORA", "DORA", "OFT", "VERA"]


def config_for(case):
    kind, options = CASES[case]
    return peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind](**(LAYERS | options))


def shake(module, seed=3):
    """Moves what is trained, and makes the gates skip some tokens."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if ".dispatcher." in name:
                parameter.copy_(noise)
            elif parameter.requires_grad:
                parameter.add_(0.05 * noise)
    return module.eval()


@pytest.fixture
def wrap(make_host):
    """``wrap(case)``: the plain host with PEFT's layers, as if PEFT had trained them before."""

    def wrap(case="LORA", name="plain", **changes):
        torch.manual_seed(1)
        return shake(peft.get_peft_model(make_host(name, **changes), config_for(case)))

    return wrap


@pytest.fixture(scope="module")
def plain(make_host):
    """The same host without PEFT's layers."""
    return dyntune.tune(make_host(), "linear")


@pytest.fixture
def images(make_host, images_for):
    return images_for(make_host(), 4)


def state_of(model):
    """Every parameter and buffer by name."""
    return dict(model.backbone.named_parameters()) | dict(model.backbone.named_buffers())


def train(model, images, steps=2):
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        dyntune.training_loss(model, images, torch.arange(len(images)) % 5).total.backward()
        optimiser.step()
    return model.eval()


def test_every_supported_type_is_tested():
    assert set(OPTIONS) == set(TYPES)
    assert set(FEW) <= set(KNOWN)


@pytest.mark.parametrize("case", KNOWN)
def test_all_that_holds_for_a_peft_model(case, wrap, plain, make_host, images, tmp_path):
    """One pass through a model's life, because building each of them is what takes the time."""
    wrapped = wrap(case)
    with torch.no_grad():
        expected = wrapped(images)
    model = dyntune.tune(wrapped, "dispatch:rate=0.5").eval()
    vit = wrapped.get_base_model()
    assert isinstance(model.backbone, PeftBackbone)
    assert model.backbone.host is vit
    with torch.no_grad():
        assert torch.equal(model.run(images, complete=True).logits, expected)

    own = {p for p in wrapped.parameters() if p.requires_grad}
    gates = {p for name, p in model.named_parameters() if ".dispatcher." in name}
    head = {p for head in model.backbone.heads for p in head.parameters()}
    trained = {p for p in model.parameters() if p.requires_grad}
    assert trained == own | gates | head
    assert own - gates - head

    before = {name: tensor.detach().clone() for name, tensor in state_of(model).items()}
    train(model, images)
    assert {p for p in model.parameters() if p.grad is not None} == trained
    moved = {name for name, tensor in state_of(model).items() if not torch.equal(tensor, before[name])}
    assert moved == set(model.tuned_state())

    shake(model)
    with torch.no_grad():
        gates = model.run(images).gates
        masked, compact = (model.run(images, execution=how).logits for how in ("masked", "compact"))
    assert 0.01 < sum(gate.values.mean() for gate in gates) / len(gates) < 0.99
    torch.testing.assert_close(masked, compact, atol=1e-5, rtol=1e-5)

    cost = dyntune.cost(model)
    assert (cost.dense_macs, cost.head_macs) == (plain.dense_macs, 32 * 5)
    assert cost.trainable_params == sum(p.numel() for p in trained - head)
    assert cost.head_params == 32 * 5 + 5
    assert model.fingerprint == plain.fingerprint or case == "LORA-bias"

    folder = model.save(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(model(images), compact)  # counting and saving change nothing
    torch.manual_seed(7)
    host = make_host()
    loaded = dyntune.load(folder, backbone=host)
    assert loaded.backbone.host is host
    assert loaded.tuned_state().keys() == model.tuned_state().keys()
    saved, returned = (peft.get_peft_model_state_dict(m.backbone.peft) for m in (model, loaded))
    assert saved.keys() == returned.keys()
    assert all(torch.equal(tensor, returned[name]) for name, tensor in saved.items())
    with torch.no_grad():
        assert torch.equal(loaded(images), compact)

    merged = model.merge()
    assert merged is model
    assert list(model.unmerged) == ["dispatch"]
    assert not any(type(module).__module__.startswith("peft") for module in merged.modules())
    with torch.no_grad():
        torch.testing.assert_close(merged(images), compact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", KNOWN)
@torch.no_grad()
def test_layers_take_no_tokens_at_all(case, wrap):
    """As where a host without a class token skips every patch."""
    for layer in wrap(case).modules():
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer.get_base_layer(), torch.nn.Conv2d):
            channels = layer.get_base_layer().weight.shape[-1]
            assert layer(torch.empty(0, channels)).shape == (0, len(layer.get_base_layer().weight))


@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("where", ["attn", "attn-mlp", "layer"])
@torch.no_grad()
def test_masked_equals_compact_wherever_the_gates_are(case, where, wrap, images):
    model = shake(dyntune.tune(wrap(case), f"dispatch:where={where}"))
    masked, compact = (model.run(images, execution=how).logits for how in ("masked", "compact"))
    torch.testing.assert_close(masked, compact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["registers", "siglip", "qk_norm", "distilled"])
@torch.no_grad()
def test_other_kinds_of_hosts(name, wrap, make_host, images_for, tmp_path):
    config = peft.LoraConfig(target_modules=["qkv", "fc2"], modules_to_save=["head"])
    wrapped = shake(peft.get_peft_model(make_host(name), config))
    images = images_for(make_host(name), 3)
    expected = wrapped(images)
    model = dyntune.tune(wrapped, "dispatch").eval()
    torch.testing.assert_close(model.run(images, complete=True).logits, expected, atol=1e-5, rtol=1e-5)
    shake(model)
    loaded = dyntune.load(model.save(tmp_path / "adapter"), backbone=make_host(name))
    assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize("spec", ["linear", "full", "bitfit", "lora", "ssf+dispatch", "adaptformer+dispatch"])
@pytest.mark.parametrize("case", ["VERA", "LN_TUNING"])
def test_our_methods_on_top(spec, case, wrap, make_host, images, tmp_path):
    model = dyntune.tune(wrap(case), spec)
    before = {name: tensor.detach().clone() for name, tensor in state_of(model).items()}
    train(model, images, steps=3)
    moved = {name for name, tensor in state_of(model).items() if not torch.equal(tensor, before[name])}
    assert moved == set(model.tuned_state())
    loaded = dyntune.load(model.save(tmp_path / "adapter"), backbone=make_host())
    with torch.no_grad():
        before = model(images)
        assert torch.equal(loaded(images), before)
        torch.testing.assert_close(model.merge()(images), before, atol=1e-4, rtol=1e-4)


class Shift(Change):
    """A change of a site that folds: y + shift."""

    def __init__(self, channels):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.linspace(-1, 1, channels))

    def forward(self, x, y):
        return y + self.shift

    def fold(self, base):
        base.bias.add_(self.shift)


@torch.no_grad()
def test_changes_of_sites_go_around_the_layers_of_peft(wrap, plain, make_host, images):
    model = dyntune.tune(wrap("LORA-wide"), "linear").eval()
    before = model(images)
    sites = list(model.backbone.sites())
    assert [(site.path, site.channels, site.channel_dim) for site in sites] == [
        (site.path, site.channels, site.channel_dim) for site in plain.backbone.sites()
    ]
    assert [type(site.module) for site in sites] == [type(site.module) for site in plain.backbone.sites()]
    for site in model.backbone.sites("fc2", "norm", "qkv"):
        site.add("shift", Shift(site.channels))
    shifted = model(images)
    assert not torch.allclose(shifted, before)
    assert torch.equal(model.backbone.plain().host.blocks[0].mlp.fc2.weight, make_host().blocks[0].mlp.fc2.weight)
    merged = model.merge()
    assert type(merged) is type(make_host())
    assert str(merged) == str(make_host())
    torch.testing.assert_close(merged(images), shifted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_peft_cannot_merge_stays(make_host, images_for):
    config = peft.LoraConfig(target_modules=["qkv"], lora_bias=True, modules_to_save=["head"])
    with pytest.warns(UserWarning, match="merging LoRA weights"):
        wrapped = shake(peft.get_peft_model(make_host("qk_norm"), config))
    model = dyntune.tune(wrapped, "linear").eval()
    for site in model.backbone.sites("norm1", "qkv"):
        site.add("shift", Shift(site.channels))
    images = images_for(make_host("qk_norm"), 2)
    before = model(images)
    assert model.merge() is model
    assert "no bias" in model.unmerged["peft"]
    torch.testing.assert_close(model(images), before, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_whatever_peft_says_when_it_cannot_merge_nothing_is_lost(wrap, images, monkeypatch):
    model = shake(dyntune.tune(wrap(), "ssf", "lora:targets=proj")).eval()
    before = model(images)

    def merge():
        raise AttributeError("'Identity' object has no attribute 'weight'")

    monkeypatch.setattr(model.backbone.peft, "merge_and_unload", merge)
    assert model.merge() is model and "has no attribute 'weight'" in model.unmerged["peft"]
    assert torch.equal(model(images), before)


@torch.no_grad()
def test_biases_that_peft_trains_are_those_of_the_published_weights_before(tmp_path):
    def host():
        return create_backbone("vit_mini_patch4_32.dyntune", num_classes=3)

    config = peft.LoraConfig(r=4, target_modules=["qkv"], bias="lora_only")
    model = shake(dyntune.tune(peft.get_peft_model(host(), config), "dispatch"))
    images = torch.randn(2, 3, 32, 32)
    loaded = dyntune.load(model.save(tmp_path / "adapter"))
    assert loaded.origin.published and torch.equal(loaded(images), model(images))
    torch.testing.assert_close(
        loaded.backbone.host.blocks[0].attn.qkv.bias, model.backbone.host.blocks[0].attn.qkv.bias
    )


def test_inactive_adapters_are_neither_trained_nor_saved(wrap, make_host, images, tmp_path):
    wrapped = wrap()
    wrapped.add_adapter("second", peft.LoraConfig(r=2, target_modules=["fc2"], modules_to_save=["head"]))
    wrapped.set_adapter("second")
    model = shake(dyntune.tune(shake(wrapped), "full+dispatch"))
    assert not any("default" in name or "original" in name for name in model.saved_state())
    assert "host.head.modules_to_save.second.weight" in model.saved_state()
    train(model, images)
    loaded = dyntune.load(model.save(tmp_path / "adapter"), backbone=make_host())
    assert list(loaded.backbone.peft.peft_config) == ["second"]
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


def test_several_active_adapters_are_all_trained_and_saved(make_host, images, tmp_path):
    wrapped = peft.get_peft_model(make_host(), peft.LoraConfig(r=4, target_modules=["qkv"]), "first")
    wrapped.add_adapter("second", peft.LoraConfig(r=2, target_modules=["qkv", "fc2"]))
    wrapped.base_model.set_adapter(["first", "second"])
    model = train(dyntune.tune(shake(wrapped), "dispatch"), images)
    loaded = dyntune.load(model.save(tmp_path / "adapter"), backbone=make_host())
    assert loaded.backbone.peft.active_adapters == ["first", "second"]
    with torch.no_grad():
        before = model(images)
        assert torch.equal(loaded(images), before)
        torch.testing.assert_close(model.merge()(images), before, atol=1e-4, rtol=1e-4)


def test_an_adapter_that_peft_has_frozen_stays_so_and_is_saved(wrap, make_host, images, tmp_path):
    wrap().save_pretrained(tmp_path / "peft")
    frozen = peft.PeftModel.from_pretrained(make_host(), tmp_path / "peft")
    model = train(dyntune.tune(frozen, "dispatch"), images)
    assert not any("lora" in name for name in model.tuned_state())
    assert any("lora_A" in name for name in model.saved_state())
    loaded = dyntune.load(model.save(tmp_path / "adapter"), backbone=make_host())
    assert loaded.tuned_state().keys() == model.tuned_state().keys()
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize("upcast", [True, False])
@torch.no_grad()
def test_precision_comes_back(make_host, images, tmp_path, upcast):
    host = make_host().to(torch.bfloat16)
    wrapped = shake(peft.get_peft_model(host, config_for("LORA"), autocast_adapter_dtype=upcast))
    model = shake(dyntune.tune(wrapped, "dispatch"))
    loaded = dyntune.load(model.save(tmp_path / "adapter"), backbone=make_host())
    dtypes = {name: p.dtype for name, p in model.backbone.named_parameters()}
    assert {name: p.dtype for name, p in loaded.backbone.named_parameters()} == dtypes
    assert (torch.float32 in dtypes.values()) == upcast
    images = images.to(torch.bfloat16)
    assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize("case", ["DORA", "VERA"])
@torch.no_grad()
def test_built_again_from_its_timm_name(case, tmp_path):
    torch.manual_seed(0)
    host = create_backbone("vit_tiny_patch16_224", pretrained=False, img_size=32, num_classes=3)
    file = tmp_path / "vit.safetensors"
    safetensors.torch.save_file(host.state_dict(), file)
    model = shake(dyntune.tune(peft.get_peft_model(host, config_for(case)), "dispatch"))
    assert model.origin.name.startswith("vit_tiny_patch16_224")
    images = torch.randn(2, 3, 32, 32)
    loaded = dyntune.load(model.save(tmp_path / "adapter"), weights=file)
    assert torch.equal(loaded(images), model(images))
    again = dyntune.load(loaded.save(tmp_path / "again"))
    assert torch.equal(again(images), model(images))
    stranger = create_backbone("vit_tiny_patch16_224", pretrained=False, img_size=32, num_classes=3)
    with pytest.raises(CheckpointError, match="other weights"):
        dyntune.load(tmp_path / "adapter", backbone=stranger)


def test_costs_are_counted_without_weights():
    with shapes_only():
        vit = timm.create_model("vit_base_patch16_224", num_classes=100)
        config = peft.LoraConfig(r=8, target_modules=["qkv"], modules_to_save=["head"])
        model = dyntune.tune(peft.get_peft_model(vit, config), "dispatch:rate=0.5")
    cost = dyntune.cost(model)
    lora, gates = 12 * 8 * (768 + 3 * 768), 12 * (768 + 1)
    assert cost.dense_macs == 17_581_972_224
    assert cost.trainable_params == lora + gates
    assert cost.head_params == 76_900
    dense = dyntune.cost(dyntune.tune(_meta_vit(), "dispatch:rate=0.5"))
    assert cost.macs - dense.macs == 197 * lora


def _meta_vit():
    with shapes_only():
        return timm.create_model("vit_base_patch16_224", num_classes=100)


def test_a_copy_is_independent(wrap, images):
    model = dyntune.tune(wrap("VERA"), "dispatch").eval()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = model(images)
        assert torch.equal(twin(images), before)
        shake(twin)
        assert torch.equal(model(images), before)
    assert twin.backbone.peft.get_base_model() is twin.backbone.host


def test_gradient_checkpointing_gives_the_same_gradients(wrap, images):
    gradients = []
    for checkpointing in (False, True):
        wrapped = wrap("DORA")
        wrapped.get_base_model().set_grad_checkpointing(checkpointing)
        model = dyntune.tune(wrapped, "linear").train()
        model(images).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.backbone.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def refused(model, *said):
    with pytest.raises(BackboneError) as error:
        dyntune.tune(model, "dispatch")
    for text in said:
        assert text in str(error.value)


def test_what_is_not_supported_is_refused_with_a_reason(make_host, wrap):
    wrapped = wrap()
    refused(wrapped.get_base_model(), "VisionTransformer", "no peft.PeftModel", "get_peft_model")
    refused(wrapped.base_model, "LoraModel", "no peft.PeftModel")
    refused(peft.get_peft_model(make_host(), config_for("LORA"), mixed=True), "PeftMixedModel", "without mixed=True")
    cait = timm.create_model("cait_xxs24_224", embed_dim=16, depth=1, num_heads=2)
    refused(peft.get_peft_model(cait, peft.LoraConfig(target_modules=["qkv"])), "Cait is not supported")
    for copied in ("mlp", "attn", "blocks.2"):
        config = peft.LoraConfig(target_modules=["patch_embed.proj"], modules_to_save=[copied])
        refused(peft.get_peft_model(make_host(), config), "modules_to_save has copied blocks.", f"{copied} as a whole")
    for init in ("pissa", "olora"):
        config = peft.LoraConfig(target_modules=["qkv"], init_lora_weights=init)
        refused(peft.get_peft_model(make_host(), config), init, "init_lora_weights=True")
    config = peft.LoraConfig(target_parameters=["attn.qkv.weight"])
    refused(peft.get_peft_model(make_host(), config), "target_parameters")
    config = peft.AdaLoraConfig(target_modules=["qkv"], total_step=10)
    refused(peft.get_peft_model(make_host(), config), "ADALORA", "LORA")
    refused(peft.get_peft_model(make_host(), peft.LoraConfig(target_modules=["head"])), "classifier", "exclude_modules")
    wrapped.merge_adapter()
    refused(wrapped, "merged", "unmerge_adapter")
    wrapped.unmerge_adapter()
    with wrapped.disable_adapter():
        refused(wrapped, "switched off")
    dyntune.tune(wrapped, "dispatch")


def test_prompts_are_refused_with_a_reason(make_host):
    config = peft.PrefixTuningConfig(
        task_type="FEATURE_EXTRACTION", num_virtual_tokens=4, num_layers=3, token_dim=32, num_attention_heads=4
    )
    # PEFT itself builds such a model only around one from transformers.
    model = peft.PeftModel.__new__(peft.PeftModel)
    torch.nn.Module.__init__(model)
    model._is_prompt_learning, model._peft_config = True, {"default": config}
    model.base_model, model.active_adapter = make_host(), "default"
    refused(model, "PREFIX_TUNING", "vpt")


def test_a_refused_part_leaves_the_peft_model_as_it_was(wrap, images):
    wrapped = wrap()
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    with torch.no_grad():
        before = wrapped(images)
    with pytest.raises(BackboneError):
        dyntune.tune(wrapped, "dispatch", "dispatch:where=attn-mlp")
    assert {name for name, p in wrapped.named_parameters() if p.requires_grad} == trained
    with torch.no_grad():
        assert torch.equal(wrapped(images), before)


@pytest.fixture
def saved(wrap, tmp_path):
    return dyntune.tune(wrap(), "dispatch").save(tmp_path / "adapter")


def test_the_configuration_is_plain_json_of_pefts_options(saved):
    config = json.loads((saved / CONFIG).read_text())["peft"]
    assert config["version"] == peft.__version__
    options = config["adapters"]["default"]
    assert options["peft_type"] == "LORA"
    assert options["target_modules"] == ["fc1", "qkv"]
    assert not {"base_model_name_or_path", "megatron_config", "megatron_core"} & set(options)


def edit(folder, **options):
    config = json.loads((folder / CONFIG).read_text())
    config["peft"]["adapters"]["default"] |= options
    del config[SEAL]
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    "options,said",
    [
        ({"option_of_tomorrow": 3}, "option_of_tomorrow"),
        ({"peft_type": "METHOD_OF_TOMORROW"}, "METHOD_OF_TOMORROW"),
        ({"peft_type": "XLORA", "adapters": {"a": "/etc/passwd"}}, "XLORA"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_modules": ["nowhere"]}, "rebuilt"),
        ({"r": "many"}, "rebuilt"),
        ({"r": 2}, "does not fit"),
    ],
)
def test_options_that_are_not_understood_are_told(saved, make_host, options, said):
    edit(saved, **options)
    with pytest.raises(CheckpointError) as error:
        dyntune.load(saved, backbone=make_host())
    assert said in str(error.value)
    assert str(saved) in str(error.value)


def test_options_of_a_newer_peft_that_are_off_do_no_harm(saved, make_host):
    edit(saved, option_of_tomorrow=None, another=False)
    dyntune.load(saved, backbone=make_host())


def test_a_stranger_cannot_make_peft_import_anything(saved, make_host):
    edit(saved, megatron_config={"a": 1}, megatron_core="antigravity")
    dyntune.load(saved, backbone=make_host())
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("recipe", [3, [], {}, {"version": "1", "adapters": {}, "upcast": True}, {"adapters": 5}])
def test_damaged_recipes_are_refused(saved, make_host, recipe):
    config = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps(config | {"peft": recipe}))
    with pytest.raises(CheckpointError, match=CONFIG):
        dyntune.load(saved, backbone=make_host())


def test_the_plain_model_is_to_be_given(saved, wrap):
    with pytest.raises(CheckpointError, match="plain model"):
        dyntune.load(saved, backbone=wrap())


def test_dyntune_does_not_need_peft(saved, make_host, monkeypatch):
    """``test_imports.py`` sees that importing Dyntune does not import it."""
    monkeypatch.setitem(sys.modules, "peft", None)
    for name in ("peft", "peft_config"):
        monkeypatch.delitem(sys.modules, f"dyntune.backbones.{name}")
    dyntune.tune(make_host(), "dyt")
    with pytest.raises(dyntune.DyntuneError, match=r"pip install peft"):
        dyntune.load(saved, backbone=make_host())
