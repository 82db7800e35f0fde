"""timm's Swin hosts: stages of other widths and fewer tokens, windows that the host computes, norms behind in V2."""

import copy
import functools
import json

import pytest
import timm
import torch
from packaging.version import Version
from safetensors.torch import save_file
from test_timm_families import fill
from torch import nn
from typer.testing import CliRunner

import dyntune
from dyntune.backbones.hosts import create_backbone, rebuild, wrap
from dyntune.backbones.origin import BackboneSource
from dyntune.backbones.timm_weights import load_weights
from dyntune.commands.main import app
from dyntune.core.errors import BackboneError
from dyntune.inference import folded_copy
from dyntune.inference.export.program import export_program
from dyntune.inference.export.registry import lookup
from dyntune.studies.pictures.patches import states_at_gate

KINDS = ("swin", "swinv2")
ODD = {"img_size": (28, 36), "window_size": 4, "depths": (2, 2, 2), "num_heads": (2, 4, 4)}
"""7 x 9 patches, 4 x 5 and 2 x 3 cells: windows and merged cells are padded."""
SHALLOW = {"swin": {"img_size": (28, 36), "depths": (2, 1)}, "swinv2": {"depths": (2, 1)}}
"""Shifted and merged, one of them padded, in three blocks."""


def half_open(model):
    """Gates that are open for some of the patches."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.backbone.named_parameters():
            if not name.startswith("host."):
                parameter.normal_(std=0.5, generator=generator)
    return model.eval()


@torch.no_grad()
def straight_line(model, images):
    """DyT on the host's own modules, block by block; beside it, the gates of each block."""
    x, host, gates = model.backbone.host.patch_embed(images), model.backbone.host, []
    units = iter(block.mlp for block in model.backbone.blocks)
    for stage in host.layers:
        x = stage.downsample(x)
        for block in stage.blocks:
            unit = next(units)
            if hasattr(block.attn, "logit_scale"):  # V2
                x = x + block.norm1(block._attn(x))
                update = block.norm2(block.mlp(x))
            else:
                x = x + block._attn(block.norm1(x))
                update = block.mlp(block.norm2(x))
            gate = (unit.dispatcher.gate(x) > 0).squeeze(-1)
            adapter = unit.parallel["adapter"]
            hidden = adapter.down_proj(x).relu()
            x = x + gate.unsqueeze(-1) * update + adapter.scale * adapter.up_proj(hidden)
            gates.append(gate)
    return host.head(host.norm(x)), gates


@torch.no_grad()
def test_gates_of_the_fixture_are_those_of_an_independent_computation(make_host):
    model = dyntune.tune(fill(make_host("swin"), 7), "dyt:bottleneck=8,scale=0.1").eval()
    fill(model.backbone, 42, left_out="host.")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    output = model.run(images)
    active = [gate.values.sum(1).int().tolist() for gate in output.gates]
    assert active == [[31, 36], [44, 44], [2, 12], [2, 6]]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, ODD], ids=["even", "padded"])
def test_dispatch_on_stages_is_the_straight_line_computation(make_host, images_for, kind, changes):
    try:
        host = make_host(kind, **changes)
    except RuntimeError:
        pytest.skip("this timm cannot build a V2 whose windows are padded")
    images = images_for(host, 3)
    own = host(images)
    torch.testing.assert_close(dyntune.tune(host, "linear").eval()(images), own, atol=1e-5, rtol=1e-5)
    model = half_open(dyntune.tune(make_host(kind, **changes), "dyt"))
    expected, gates = straight_line(model, images)
    for how in ("masked", "compact"):
        output = model.run(images, execution=how)
        torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dyntune.optimize(model)(images), expected, atol=1e-4, rtol=1e-4)
    assert 0.1 < sum(gate.float().mean() for gate in gates) / len(gates) < 0.9
    rows, columns = output.grid
    assert (rows, columns) == model.backbone.grid == host.patch_embed.grid_size
    for made, gate in zip(output.gates, gates, strict=True):
        assert torch.equal(made.values > 0.5, gate.flatten(1))
        step = -(-rows // gate.shape[1])  # patches in a row of a cell
        on_patches = gate.repeat_interleave(step, 1).repeat_interleave(step, 2)[:, :rows, :columns]
        assert torch.equal(made.on_patches > 0.5, on_patches.flatten(1))
        state = states_at_gate(made, 3, output.grid)[1]
        assert state.tokens == gate[0].numel() and state.share == pytest.approx(gate[1].float().mean().item())
    features = model.features(images)
    assert features.shape == (3, model.backbone.blocks[-1].width, *gates[-1].shape[1:])
    torch.testing.assert_close(host.head(features.permute(0, 2, 3, 1)), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_of_another_size(make_host, kind):
    host = make_host(kind, strict_img_size=False)
    images = torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(0))
    expected = host(images)
    torch.testing.assert_close(dyntune.tune(host, "linear").eval()(images), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(BackboneError, match="built for images of 32 x 32 pixels"):
        dyntune.tune(make_host(kind), "linear")(images)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_blocks_have_the_same_gradients(make_host, images_for, kind):
    gradients = []
    for on in (False, True):
        torch.manual_seed(0)
        model = dyntune.tune(make_host(kind, drop_path_rate=0), "lora", "dispatch", "full").train()
        model.backbone.switch_gradient_checkpointing(on)
        assert model.backbone.gradient_checkpointing == on
        model(images_for(model.backbone.host, 4)).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.backbone.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@torch.no_grad()
def test_ssf_scales_what_comes_out_of_every_map_with_its_biases(make_host, images_for, randomise):
    """V2 adds biases of queries and values behind its map, where they would miss the scale."""
    host = make_host("swinv2")
    model = randomise(dyntune.tune(host, "ssf"), 5).eval()
    attn = model.backbone.host.layers[0].blocks[0].attn
    x = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1))
    change = attn.qkv.changes["ssf"]
    bias = torch.cat([attn.q_bias, torch.zeros(16), attn.v_bias])
    expected = (x @ attn.qkv.weight.T + bias) * change.scale + change.shift
    torch.testing.assert_close(attn.qkv(x) + bias, expected)
    before = attn(x)
    images = images_for(host, 2)
    logits = model(images)
    merged = model.merge()
    torch.testing.assert_close(attn(x), before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged(images), logits, atol=1e-5, rtol=1e-5)


def test_ssf_stands_where_the_published_one_does(make_host):
    """Behind the patch embedding and its norm, six times in a block, behind norms between stages, and at the end."""
    cost = dyntune.cost(dyntune.tune(make_host("swin"), "ssf"))
    assert cost.trainable_params == 2 * (16 + 16 + 2 * 11 * 16 + 64 + 2 * 11 * 32 + 32)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_peft_are_called_by_the_host(make_host, images_for, kind):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["qkv", "fc1"], init_lora_weights=False)
    wrapped = peft.get_peft_model(make_host(kind), config)
    images = images_for(make_host(kind), 2)
    model = dyntune.tune(wrapped, "dispatch").eval()
    with wrapped.disable_adapter():
        plain = model.run(images, complete=True).logits
    logits = model.run(images, complete=True).logits
    assert (logits - plain).abs().max() > 0.01
    assert all(
        layer.lora_A["default"].weight.requires_grad
        for name, layer in model.backbone.host.named_modules()
        if name.endswith("qkv")
    )
    torch.testing.assert_close(copy.deepcopy(wrapped).merge_and_unload()(images), logits, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def traced(make_host):
    """``traced(kind)``: a model with stages, and the program that it is exported as."""

    @functools.cache
    def program(kind):
        model = half_open(dyntune.tune(make_host(kind, **SHALLOW[kind]), "dyt"))
        return model, export_program(folded_copy(model, masks=True), masks=True)

    return program


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "runtime"), [("swin", "torch"), ("swin", "onnx"), ("swinv2", "torch"), ("swinv2", "openvino")]
)
def test_exported_stages_agree(traced, images_for, tmp_path, kind, runtime):
    writer = lookup(runtime)()
    for package in (*writer.writes_with, *writer.runs_with):
        pytest.importorskip(package)
    model, program = traced(kind)
    writer.write(program, tmp_path / writer.file, spec="")
    session = writer.open(tmp_path / writer.file, threads=1)
    images = images_for(model.backbone.host, 3)
    for batch in (1, 3):
        expected = model.run(images[:batch])
        logits, active = session.run(images[:batch])
        torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(active, torch.stack([gate.on_patches > 0.5 for gate in expected.gates], dim=1))


def counted(size, window, second, rate=1.0, bottleneck=0):
    """MACs of a tiny Swin of four stages without its head, by hand: parts without windows, windows, norms."""
    width, depths, heads = 96, (2, 2, 6, 2), (3, 6, 12, 24)
    tokens = (size // 4) ** 2
    macs = tokens * (48 * width + 5 * width)
    for stage, depth in enumerate(depths):
        if stage:
            tokens, width = tokens // 4, 2 * width
            macs += tokens * (2 * width * width + 5 * (width if second else 2 * width))
        area = min(window**2, tokens)
        attention = tokens * (4 * width**2 + 2 * area * width + 5 * width)
        if second:  # a small MLP gives the biases of a window's pairs, once for the batch
            side = 2 * int(area**0.5) - 1
            attention += side**2 * 512 * (2 + heads[stage])
        gate = tokens * width * (rate < 1) + 2 * tokens * bottleneck * width
        macs += depth * (attention + rate * tokens * (8 * width**2 + 5 * width) + gate)
    return macs + 5 * tokens * width


@pytest.mark.parametrize(
    ("name", "parameters", "shape"),
    [
        ("swin_tiny_patch4_window7_224", 28_288_354, (224, 7, False)),
        ("swinv2_tiny_window8_256", 28_347_154, (256, 8, True)),
    ],
)
def test_costs_of_the_real_sizes(name, parameters, shape):
    with torch.device("meta"):
        cost = dyntune.cost(dyntune.tune(timm.create_model(name), "dyt:recipe=published,bottleneck=8"))
    assert cost.total_params - cost.trainable_params == parameters
    assert cost.dense_macs == counted(*shape)
    assert cost.macs == counted(*shape, rate=0.5, bottleneck=8)
    assert [block.attention_tokens for block in cost.blocks][::4] == [(shape[0] // cell) ** 2 for cell in (4, 16, 16)]
    assert sum(block.macs for block in cost.blocks) + cost.embedding_macs + cost.norm_macs == cost.macs


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_a_host_is_built_again_by_its_name(name):
    if name.startswith("swinv2") and Version(timm.__version__) < Version("1.0.31"):
        pytest.skip("timm before 1.0.31 builds Swin V2 at its own size alone on the meta device")
    with torch.device("meta"):
        host = create_backbone(name, pretrained=False, img_size=(64, 96), num_classes=3)
        source = wrap(host).origin()
        assert source.name.startswith(name) and source.arguments["img_size"] == [64, 96]
        again = wrap(rebuild(BackboneSource(**source.to_dict()), pretrained=False))
        assert again.image_shape == (3, 64, 96) and again.classes == 3
        for changes in ({"window_size": 4}, {"num_heads": (1, 6, 12, 24)}, {"strict_img_size": False}):
            other = wrap(timm.create_model(name, num_classes=3, **changes)).origin()
            assert other.name is None or timm.create_model(other.name, **other.arguments).dynamic_img_size


@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_back_from_a_file(tmp_path, make_host, images_for, kind):
    host, again = make_host(kind), make_host(kind, seed=1)
    save_file(host.state_dict(), tmp_path / "host.safetensors")
    load_weights(again, tmp_path / "host.safetensors")
    assert torch.equal(again(images_for(host, 1)), host(images_for(host, 1)))
    # The authors' files name what is between two stages by the first of them, and the classifier otherwise.
    native = {name.replace("layers.1.down", "layers.0.down"): tensor for name, tensor in host.state_dict().items()}
    save_file({name.replace("head.fc.", "head."): t for name, t in native.items()}, tmp_path / "native.safetensors")
    again = make_host(kind, seed=1)
    load_weights(again, tmp_path / "native.safetensors")
    assert torch.equal(again(images_for(host, 1)), host(images_for(host, 1)))
    with pytest.raises(BackboneError, match=r"do not fit the model \(width 32, 4 blocks, 8 x 8 patches\)"):
        load_weights(make_host(kind, embed_dim=32), tmp_path / "host.safetensors")


def test_what_is_refused_says_why(make_host):
    class Own(timm.models.swin_transformer.SwinTransformer):
        def forward_features(self, x):
            return super().forward_features(x)

    with pytest.raises(BackboneError, match="overrides forward_features"):
        wrap(Own(img_size=32, embed_dim=16, depths=(1,), num_heads=(2,), window_size=4))
    host = make_host("swin")
    host.layers[1].blocks[0].mlp = nn.Identity()
    with pytest.raises(BackboneError, match=r"layers\.1\.blocks\.0\.mlp is a Identity"):
        wrap(host)


def says(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_commands_on_stages(photos, tmp_path):
    run, quick = tmp_path / "run", ("--epochs", "1", "--batch-size", "18", "--workers", "0", "--device", "cpu")
    save_file(
        create_backbone("swin_two_stages", pretrained=False, num_classes=5).state_dict(), tmp_path / "w.safetensors"
    )
    model = ("--model", "swin_two_stages", "--method", "dyt:rate=0.5")
    cost = says("cost", *model)
    trained = says("train", photos, *model, "--weights", tmp_path / "w.safetensors", "--out", run, *quick)
    assert trained["macs"] == cost["macs"]
    assert says("eval", run, photos)["images"] == 12
    photo = next((photos / "test").rglob("*.png"))
    predicted = says("predict", run, photo)["predictions"][0]["top"]
    says("export", run, "--runtime", "torch", "--out", tmp_path / "exported")
    exported = says("predict", tmp_path / "exported", photo, "--trust")["predictions"][0]["top"]
    for ours, theirs in zip(predicted, exported, strict=True):
        assert theirs["class"] == ours["class"]
        assert theirs["probability"] == pytest.approx(ours["probability"], abs=1e-5)
