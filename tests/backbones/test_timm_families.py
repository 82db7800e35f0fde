"""timm's other ViTs behind the interface, against numbers of an independent computation in fp64 and timm's own."""

import copy
import inspect
import zlib

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVitCfg

import dyntune
from dyntune.backbones.hosts import create_backbone, rebuild, wrap
from dyntune.backbones.origin import BackboneSource
from dyntune.backbones.timm_weights import load_weights
from dyntune.core.errors import BackboneError

FIXTURES = {
    ("plain", "mlp", 23): (-7.512125, (-0.240695, 0.407565, -3.865022)),
    ("plain", "layer", 11): (-6.921994, (0.350684, 0.409616, -3.942555)),
    ("plain", "tome"): (-6.043560, (-0.017161, 0.468169, -3.609886)),
    ("plain", "evit"): (-5.989519, (-0.006113, 0.455740, -3.644197)),
    ("dinov3", "dense"): (-8.943571, (0.821811, -1.120259, -3.257720)),
    ("dinov3", "mlp", 21): (-9.195046, (0.822426, -1.042512, -3.581403)),
    ("dinov3", "layer", 13): (-5.496872, (0.215297, -0.907474, -1.684280)),
    ("dinov3", "tome"): (-9.335991, (0.893995, -1.189957, -3.363353)),
    ("dinov3", "evit"): (-8.074126, (0.915774, -0.888174, -3.371873)),
    ("eva02", "dense"): (-6.327478, (0.235777, -2.889435, -2.557685)),
    ("eva02", "mlp", 12): (-5.074487, (-0.505530, -1.860597, -1.438875)),
    ("eva02", "layer", 11): (-8.018226, (-1.147820, -2.421549, -2.353886)),
    ("eva02", "tome"): (-7.326053, (0.263891, -2.852685, -2.702770)),
    ("eva02", "evit"): (-6.662227, (0.152470, -3.421090, -1.979812)),
    ("mixed", "dense"): (-6.545660, (0.328173, -0.651668, -2.944589)),
    ("mixed", "mlp", 23): (-6.976407, (0.060212, -0.601707, -2.915233)),
    ("mixed", "layer", 14): (-7.373661, (-0.004523, -0.080253, -3.179217)),
    ("mixed", "tome"): (-6.665325, (0.428558, -0.753517, -3.100608)),
    ("mixed", "evit"): (-6.327424, (0.148108, -0.489916, -2.858771)),
    ("pe", "dense"): (2.807540, (-0.540534, -1.552502, -0.909434)),
    ("pe", "mlp", 15): (-4.165503, (-0.977950, -2.776973, -0.427469)),
    ("pe", "layer", 12): (-0.593246, (-1.278189, -0.633468, -0.878617)),
    ("pe", "tome"): (4.195921, (-0.431970, -1.473903, -0.921072)),
    ("pe", "evit"): (2.256930, (-0.925436, -1.766527, -0.741842)),
    ("naflex", "dense"): (-2.013916, (-1.291917, -1.212227, -1.276027)),
    ("naflex", "mlp", 21): (-2.484907, (-0.969965, -1.708378, -0.987735)),
    ("swin", "dense"): (-13.387141, (-0.957226, -1.392390, -1.048918)),
    ("swin", "mlp", 42): (-12.523736, (-0.899281, -0.318660, -1.488619)),
}
"""Sum of all logits of two images, and the first three of the first: straight-line computations in fp64."""
SPECS = {
    "dense": ("linear",),
    "mlp": ("dyt:bottleneck=8,scale=0.1",),
    "layer": ("dyt:bottleneck=8,scale=0.1,dispatch=layer",),
    "tome": ("linear", "tome:r=3"),
    "evit": ("linear", "evit:keep=0.5,layers=1,fuse=false"),
}
PUBLISHED = "dyt:recipe=published,bottleneck=8"
COSTS = {
    "vit_small_patch16_dinov3": (
        {"tokens": 261, "parameters": 21_586_944, "dense": 6_257_814_912, "bitfit": 37_632, "ssf": 102_912}
        | {
            PUBLISHED: 4_463_349_120,
            f"{PUBLISHED},dispatch=layer": 3_089_649_024,
        }
    ),
    "eva02_base_patch14_224": (
        {
            "tokens": 257,
            "parameters": 85_758_720,
            "dense": 23_216_496_384,
            PUBLISHED: 15_987_367_680,
        }
    ),
    "vit_pe_core_base_patch16_224": (
        {"tokens": 197, "parameters": 92_886_528, "dense": 17_821_324_032}
        | {f"{PUBLISHED},dispatch=layer": 8_984_875_776}
    ),
}
"""Tokens, parameters and MACs of the plain model; parameters of methods, MACs with half of the patches."""
TINY = {"embed_dim": 32, "num_heads": 4, "img_size": (32, 48), "num_classes": 5}
NAMES = {
    "eva_giant_patch14_224": {"depth": 2, "patch_size": 16},
    "eva02_enormous_patch14_clip_224": {"depth": 2, "patch_size": 16},
    "vit_7b_patch16_dinov3": {"depth": 2},
    "vit_small_patch16_dinov3_qkvb": {"depth": 2},
    "vit_pe_lang_large_patch14_448": {"depth": 2, "patch_size": 16},
    "vit_pe_spatial_base_patch16_512": {"depth": 2},
    "vit_base_patch16_rope_mixed_ape_224": {"depth": 2},
    "vit_medium_patch16_rope_reg1_gap_256": {"depth": 2},
    "vit_large_patch16_sapiens2": {"depth": 3, "num_kv_heads": (4, 2, 1)},
    "naflexvit_so400m_patch16_radio_v4": {"depth": 2},
    "naflexvit_base_patch16_parfac_gap": {"depth": 2},
    "beitv2_base_patch16_224": {"depth": 2},
    "vit_srelpos_small_patch16_224": {"depth": 2},
    "vit_relpos_medium_patch16_cls_224": {"depth": 2},
    "vit_relpos_base_patch32_plus_rpn_256": {"depth": 2, "patch_size": 16},
}
"""Registered architectures that differ in kind, and what makes them small."""


def drawn(name, shape, seed):
    """The values of a tensor of that name."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    matrix = len(shape) > 1
    fan_in = shape[1:].numel() if matrix and shape[0] > 1 and not name.endswith("freqs") else 4
    values = torch.randn(shape, generator=generator) * fan_in**-0.5
    return values if matrix or name.endswith("bias") else values + 1


@torch.no_grad()
def fill(module, seed, left_out=" "):
    for name, parameter in module.named_parameters():
        if not name.startswith(left_out):
            parameter.copy_(drawn(name.replace(".parallel.", ".beside."), parameter.shape, seed))
    return module


def small(name):
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    sizes = {"pos_embed_grid_size": (2, 3)} if name.startswith("naflex") else {}
    return timm.create_model(name, **(TINY | NAMES[name] | sizes))


@torch.no_grad()
@pytest.mark.parametrize(("host", "case", "seed"), [(*key, 0)[:3] for key in FIXTURES])
def test_logits_are_those_of_an_independent_computation(make_host, host, case, seed):
    expected_sum, first = FIXTURES[(host, case, seed) if seed else (host, case)]
    model = dyntune.tune(fill(make_host(host), 7), *SPECS[case]).eval()
    fill(model.backbone, seed, left_out="host.")
    images = torch.randn(2, *model.backbone.image_shape, generator=torch.Generator().manual_seed(5))
    logits = model(images)
    torch.testing.assert_close(logits[0, :3], torch.tensor(first), atol=1e-5, rtol=1e-5)
    assert logits.sum().item() == pytest.approx(expected_sum, abs=1e-5, rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_registered_architectures_compute_what_timm_computes(randomise, name):
    host = randomise(small(name), 3).eval()
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    expected = host(images)
    assert expected.std() > 0.01
    model = dyntune.tune(host, "dispatch:where=layer").eval()
    torch.testing.assert_close(model.run(images, complete=True).logits, expected, atol=1e-5, rtol=1e-5)
    for block in model.backbone.blocks:
        block.dispatcher.gate.weight.normal_(generator=torch.Generator().manual_seed(1))
    masked, compact = (model.run(images, execution=how) for how in ("masked", "compact"))
    assert 0 < sum(gate.values.mean() for gate in compact.gates) < len(compact.gates)
    torch.testing.assert_close(masked.logits, compact.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dyntune.optimize(model)(images), compact.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", COSTS)
def test_costs_of_the_real_sizes(name):
    figures = COSTS[name]
    for spec in list(figures)[3:]:
        with torch.device("meta"):
            host = timm.create_model(name, num_classes=10)
        cost = dyntune.cost(dyntune.tune(host, spec))
        assert cost.blocks[0].attention_tokens == figures["tokens"]
        assert cost.dense_macs == figures["dense"]
        added = cost.trainable_params if spec != "bitfit" else 0
        assert cost.total_params - cost.head_params - added == figures["parameters"]
        assert (cost.macs if spec.startswith("dyt") else cost.trainable_params) == figures[spec]


@torch.no_grad()
@pytest.mark.parametrize("name", ["dinov3", "naflex"])
def test_an_image_of_another_size_has_rotations_of_its_own(make_host, name):
    host = make_host(name)
    images = torch.randn(2, 3, 32, 16, generator=torch.Generator().manual_seed(0))
    model = dyntune.tune(host, "dispatch").eval()
    torch.testing.assert_close(model.run(images, complete=True).logits, copy.deepcopy(host)(images))
    assert model.backbone.embed(images).grid == (4, 2)


def test_images_of_a_wrong_shape_are_refused(make_host):
    for name, shape in (("eva02", (2, 3, 40, 32)), ("naflex", (2, 1, 32, 32)), ("dinov3", (3, 24, 40))):
        with pytest.raises(BackboneError, match=r"given"):
            dyntune.tune(make_host(name), "linear")(torch.zeros(shape))


@pytest.mark.skipif("rope_rescale_coords" not in inspect.signature(Eva).parameters, reason="this timm moves none")
def test_positions_stay_where_they_are_while_training(make_host):
    model = dyntune.tune(make_host("dinov3", rope_rescale_coords=2.0), "adaptformer:dropout=0")
    images = torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    still = model.eval()(images)
    assert torch.equal(model.train()(images), still)


def test_learned_rotations_learn_through_recomputed_blocks(make_host, images_for):
    gradients = []
    for on in (False, True):
        torch.manual_seed(0)
        model = dyntune.tune(make_host("mixed"), "full", "dispatch:where=layer").train()
        model.backbone.switch_gradient_checkpointing(on)
        model(images_for(model.backbone.host, 4)).square().sum().backward()
        gradients.append(model.backbone.host.rope.freqs.grad)
    assert gradients[0].abs().amax((0, 2, 3)).min() > 0  # of every block
    torch.testing.assert_close(gradients[1], gradients[0])


@torch.no_grad()
def test_a_folded_host_is_timms_own_with_biases_inside_the_map(make_host, images_for, randomise):
    model = randomise(dyntune.tune(make_host("dinov3", depth=1), "ssf"), 5).eval()
    images = images_for(model.backbone.host, 2)
    expected = model(images)
    host = model.merge()
    torch.testing.assert_close(host(images), expected, atol=1e-5, rtol=1e-5)
    assert host.blocks[0].attn.q_bias is None
    assert host.blocks[0].attn.qkv.bias[32:64].abs().min() > 0  # keys have one now, which rotation makes matter


def test_a_host_is_built_again_by_its_name(tmp_path):
    host = create_backbone("vit_small_patch16_dinov3_qkvb", pretrained=False, img_size=(64, 32), num_classes=3)
    source = wrap(host).origin()
    assert source.name.startswith("vit_small_patch16_dinov3_qkvb") and source.arguments["img_size"] == [64, 32]
    save_file(host.state_dict(), tmp_path / "host.safetensors")
    again = rebuild(BackboneSource(**source.to_dict()).with_weights(tmp_path / "host.safetensors"))
    assert wrap(again).image_shape == (3, 64, 32)
    assert all(torch.equal(tensor, host.state_dict()[key]) for key, tensor in again.state_dict().items())


def test_a_host_of_any_size_is_built_again_for_the_size_that_was_asked_for():
    with torch.device("meta"):
        host = create_backbone("naflexvit_base_patch16_parfac_gap", pretrained=False, img_size=(32, 48), num_classes=3)
        assert wrap(host).preprocessing().size == wrap(host).image_shape[1:] == (32, 48)
        source = wrap(host).origin()
        assert source.arguments["img_size"] == [32, 48]
        assert wrap(rebuild(BackboneSource(**source.to_dict()), pretrained=False)).image_shape == (3, 32, 48)


def test_settings_of_the_rotation_are_no_longer_those_of_the_name():
    for changes in ({}, {"rope_temperature": 50.0}, {"rope_rotate_half": False}):
        with torch.device("meta"):
            host = timm.create_model("vit_small_patch16_dinov3", **changes)
        assert (wrap(host).origin().name is None) == bool(changes)


def test_weights_under_the_names_of_dinov3(tmp_path, make_host, images_for):
    host = make_host("dinov3")
    state = {}
    for name, tensor in host.state_dict().items():
        name = (
            name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma").replace("reg_token", "storage_tokens")
        )
        if not name.endswith("v_bias"):
            state[name.replace("q_bias", "qkv.bias")] = tensor
    for index, block in enumerate(host.blocks):
        bias = torch.cat([block.attn.q_bias, torch.zeros(32), block.attn.v_bias])
        state[f"blocks.{index}.attn.qkv.bias"] = bias.detach()
    state["rope_embed.periods"], state["mask_token"] = torch.ones(2), torch.ones(1, 32)
    save_file(state, tmp_path / "dinov3.safetensors")
    again = make_host("dinov3", seed=1)
    load_weights(again, tmp_path / "dinov3.safetensors")
    assert torch.equal(again(images_for(host, 1)), host(images_for(host, 1)))
    with pytest.raises(BackboneError, match="do not fit"):
        load_weights(make_host("eva02"), tmp_path / "dinov3.safetensors")


@pytest.mark.parametrize("name", ["beit", "relpos", "mixed"])
def test_weights_come_back_from_a_file(tmp_path, make_host, images_for, name):
    host, again = make_host(name), make_host(name, seed=1)
    save_file(host.state_dict(), tmp_path / "host.safetensors")
    load_weights(again, tmp_path / "host.safetensors")
    assert torch.equal(again(images_for(host, 1)), host(images_for(host, 1)))


@torch.no_grad()
@pytest.mark.parametrize("name", ["beit", "relpos"])
def test_merged_tokens_have_the_mean_of_their_patches_biases(make_host, images_for, name):
    """A pair of equal tokens that is merged is attended to as both were, where both have the same biases."""
    host = make_host(name)
    for parameter_name, parameter in host.named_parameters():
        if "relative_position" in parameter_name:
            parameter.fill_(0.5)
    images = images_for(host, 1).mean((2, 3), keepdim=True).expand(images_for(host, 1).shape)
    model = dyntune.tune(host, "linear", "tome:r=4").eval()  # no positions but these biases
    assert model.run(images).tokens.patches.shape[1] < 8
    torch.testing.assert_close(model(images), copy.deepcopy(host)(images), atol=1e-5, rtol=1e-5)


def test_npz_files_are_not_read_into_an_eva(tmp_path, make_host):
    (tmp_path / "vit.npz").write_bytes(b"")
    with pytest.raises(BackboneError, match="of the VisionTransformer; given Eva"):
        load_weights(make_host("eva02"), tmp_path / "vit.npz")


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("eva02", {"patch_drop_rate": 0.5}, "patch_drop_rate=0"),
        ("naflex", {"patch_drop_rate": 0.5}, "patch_drop_rate=0"),
        pytest.param(
            "naflex",
            {"attn_gated": True},
            "gated",
            marks=pytest.mark.skipif(not hasattr(NaFlexVitCfg, "attn_gated"), reason="this timm gates none"),
        ),
    ],
)
def test_what_is_refused_says_why(make_host, name, changes, reason):
    with pytest.raises(BackboneError, match=reason):
        wrap(make_host(name, **changes))
