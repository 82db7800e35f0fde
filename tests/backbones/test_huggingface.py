"""Vision towers of transformers: read, named, built and prepared for; the numbers are of a straight-line reading."""

import copy
import json
import re
import shutil
import zlib

import pytest
import safetensors.torch
import torch
from torch import nn

import dyntune
from dyntune.backbones.hosts import create_backbone, rebuild, wrap
from dyntune.backbones.huggingface_models import TowerClassifier, add_classifier
from dyntune.core.errors import BackboneError, CheckpointError
from dyntune.data.transforms import Preprocessing

transformers = pytest.importorskip("transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")

KINDS = (
    "vit",
    "deit",
    "deit-distilled",
    "dinov2",
    "dinov2-registers",
    "dinov3",
    "clip",
    "clip-tower",
    "siglip",
    "siglip-tower",
    "siglip2",
)
SIZES = {"dinov3": (24, 40)}


def tuned(host, *parts):
    return dyntune.tune(host, *parts).eval()


def images_of(kind, batch=2, seed=5):
    return torch.randn(batch, 3, *SIZES.get(kind, (32, 32)), generator=torch.Generator().manual_seed(seed))


def own_logits(host, kind, images):
    """What the host's own forward pass gives for images of 32 x 32 pixels, patches of 8 x 8."""
    if kind == "siglip2":
        patches = images.reshape(-1, 3, 4, 8, 4, 8).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, 192)
        shapes = torch.tensor([[4, 4]]).expand(len(images), -1)
        return host(
            pixel_values=patches,
            pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long),
            spatial_shapes=shapes,
        ).logits
    output = host(images)
    return output.logits if hasattr(output, "logits") else output.pooler_output


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_interface_computes_what_the_host_computes(make_hf, randomise, kind):
    host = randomise(make_hf(kind))
    images = torch.randn(2, 3, 32, 32)
    expected = own_logits(host, kind, images)
    torch.testing.assert_close(wrap(host).host_logits(images), expected, atol=1e-5, rtol=1e-5)
    model = tuned(host, "linear")
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
    tokens = model.forward_features(images)
    assert tokens.shape[::2] == (2, 32) and tokens.shape[1] >= 16
    torch.testing.assert_close(model.forward_head(tokens), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pool", ["token", "avg", "token+avg"])
@pytest.mark.parametrize("kind", ["dinov3", "clip-tower", "siglip-tower"])
def test_a_classifier_on_a_tower_is_part_of_the_host(make_hf, randomise, kind, pool):
    host = randomise(dyntune.add_classifier(make_hf(kind), 7, pool))
    images = torch.randn(2, 3, 32, 32)
    expected = host(images, labels=torch.tensor([1, 2]))
    assert expected.logits.shape == (2, 7) and expected.loss.ndim == 0
    model = tuned(host, "linear")
    torch.testing.assert_close(model(images), expected.logits, atol=1e-5, rtol=1e-5)
    assert model.backbone.classes == 7


def test_a_classifier_goes_on_towers_alone(make_hf):
    with pytest.raises(BackboneError, match=r"DINOv3ViTModel.*given ViTForImageClassification"):
        dyntune.add_classifier(make_hf("vit"), 3)
    with pytest.raises(BackboneError, match="expected token, avg or token"):
        dyntune.add_classifier(make_hf("dinov3"), 3, "max")


COMMON = {
    r"patch_embed\.proj": "embeddings.patch_embeddings.projection",
    r"attn\.(q|k|v)\b": r"attention.\1_proj",
    r"attn\.proj": "attention.o_proj",
    "head": "classifier",
}
NEW_NAMES = {
    "vit": ("vit.", "layers", COMMON | {"norm1": "layernorm_before", "norm2": "layernorm_after", "norm$": "layernorm"}),
    "dinov2-registers": (
        "dinov2_with_registers.",
        "encoder.layer",
        COMMON | {r"scale(\d)": r"layer_scale\1", "norm$": "layernorm"},
    ),
    "dinov3": (
        "",
        "model.layer",
        COMMON
        | {r"patch_embed\.proj": "embeddings.patch_embeddings", r"scale(\d)": r"layer_scale\1"}
        | {"mlp.gate": "mlp.gate_proj", "mlp.fc1": "mlp.up_proj", "fc2": "down_proj"},
    ),
    "siglip": (
        "vision_model.",
        "encoder.layers",
        {
            r"attn\.(q|k|v)\b": r"self_attn.\1_proj",
            r"attn\.proj": "self_attn.out_proj",
            r"norm(\d)": r"layer_norm\1",
            "norm$": "post_layernorm",
            "head": "classifier",
            "attn_pool": "head",
            r"patch_embed\.proj": "embeddings.patch_embedding",
        },
    ),
}
"""From the names in files to those of transformers 5.24, by which the values below were made."""


def name_in_5_24(kind, saved):
    prefix, blocks, words = NEW_NAMES[kind]
    name, _, tensor = saved.removeprefix("host.").rpartition(".")
    name = re.sub(r"^blocks\b", blocks, name)
    for pattern, word in words.items():
        changed = re.sub(rf"(?<![\w]){pattern}", word, name)
        if name.startswith(("embeddings", "attn_pool")) and not changed.startswith("head"):
            continue
        name = changed
    full = ".".join(filter(None, (name, tensor)))
    return full if full.startswith("classifier") else prefix + full


def values(seed, name, parameter):
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    fan_in = parameter[0].numel() if parameter.ndim > 1 and parameter.shape[0] > 1 else 4
    drawn = torch.randn(parameter.shape, generator=generator) * fan_in**-0.5
    return drawn if parameter.ndim > 1 or name.endswith("bias") else drawn + 1


@torch.no_grad()
def known(make_hf, kind, spec="linear", seed=0):
    """A model with the values of the table, in fp64."""
    host = make_hf(kind)
    if kind in SIZES:
        host.dyntune_image_size = SIZES[kind]
    backbone = wrap(host)
    for name, parameter in backbone.named_parameters():
        parameter.copy_(values(7, name_in_5_24(kind, backbone.saved_name(name)), parameter))
    model = tuned(host.double(), spec)
    for name, parameter in model.backbone.named_parameters():
        if name.startswith("blocks."):
            saved = model.backbone.saved_name(name)
            parameter.copy_(values(seed, saved, parameter))
    return model


MLP, LAYER = "dyt:bottleneck=8,scale=0.1", "dyt:dispatch=layer,bottleneck=8,scale=0.1"
EVIT = "evit:keep=0.5,layers=1,fuse=false"
KNOWN = [
    ("vit", "linear", 0, 5.498450, (1.625877, 0.659483, -0.547727), None),
    ("vit", MLP, 16, 4.702310, (1.480029, 0.590452, -0.713429), [[8, 7], [8, 7], [3, 5]]),
    ("vit", LAYER, 12, 4.926490, (0.985838, 0.775902, -0.543456), [[14, 12], [12, 11], [14, 13]]),
    ("dinov2-registers", "linear", 0, -4.785720, (-0.765608, -0.943766, -0.574372), None),
    ("dinov2-registers", MLP, 15, -1.767351, (-0.819697, -0.957815, -0.394804), [[10, 11], [9, 7], [9, 14]]),
    ("dinov2-registers", LAYER, 11, -0.258010, (-0.844006, 0.081795, -0.169995), [[7, 4], [7, 11], [10, 13]]),
    ("dinov2-registers", "tome:r=3", 0, -5.191175, (-0.746311, -0.966970, -0.594693), [18, 15, 12]),
    ("dinov2-registers", EVIT, 0, -5.263995, (-0.755990, -0.808880, -0.694757), [13]),
    ("dinov3", "linear", 0, -1.122339, (1.857138, 0.935582, 0.363983), None),
    ("dinov3", MLP, 12, -0.523220, (1.567225, 1.411157, 0.249968), [[7, 9], [4, 2], [13, 10]]),
    ("dinov3", LAYER, 11, 0.027151, (1.292634, 1.446650, 0.312068), [[11, 13], [4, 3], [4, 4]]),
    ("siglip", "linear", 0, -0.859319, (-0.825201, -1.551098, 0.675462), None),
    ("siglip", MLP, 11, 1.037029, (-0.956008, -1.131887, 0.876614), [[10, 13], [13, 4], [13, 6]]),
    ("siglip", LAYER, 12, 1.842513, (-0.176784, -0.374715, 1.300724), [[8, 12], [5, 14], [12, 6]]),
    ("siglip", "tome:r=3", 0, -1.201290, (-0.825582, -1.653458, 0.571508), [13, 10, 7]),
]
"""Host, parts, seed of the parts, sum of the logits, the first three, and active patches or tokens."""


@torch.no_grad()
@pytest.mark.parametrize(("kind", "spec", "seed", "total", "first", "counts"), KNOWN)
def test_logits_and_gates_are_those_of_a_straight_line_reading(make_hf, kind, spec, seed, total, first, counts):
    output = known(make_hf, kind, spec, seed).run(images_of(kind).double())
    assert output.logits.sum().item() == pytest.approx(total, abs=3e-6)
    assert output.logits[0, :3].tolist() == pytest.approx(first, abs=2e-6)
    if output.gates:
        assert [gate.values.sum(1).int().tolist() for gate in output.gates] == counts
    elif counts:
        assert [reduction.count for reduction in output.reductions] == counts


FIGURES = {
    "vit": (85_798_656, 102_912, 205_824, 17_581_972_224, 12_059_247_360, 8_745_523_968, 17_640_069_888),
    "dinov2": (85_725_696 - 768, 102_912, 205_824, 23_185_899_264, 15_972_499_200, 11_432_034_048, 23_261_691_648),
    "siglip": (85_797_120, 102_912, 205_824, 17_489_697_792, 11_966_825_472, 8_656_714_752, 17_547_500_544),
    "siglip-tower": (92_884_224, 110_592, 205_824, 17_727_111_936, 12_204_239_616, 8_894_128_896, 17_784_914_688),
}
"""Parameters that take part, trained ones of BitFit and SSF, MACs dense, of DyT on MLPs and on layers, of LoRA."""


@pytest.mark.parametrize("kind", FIGURES)
def test_costs_of_base_sized_towers(kind):
    t = transformers

    def host():
        with torch.device("meta"):
            if kind == "vit":
                return t.ViTForImageClassification(t.ViTConfig(num_labels=10))
            if kind == "dinov2":
                config = t.Dinov2Config(image_size=224, patch_size=14, num_labels=10)
                return t.Dinov2ForImageClassification(config)
            if kind == "siglip":
                return t.SiglipForImageClassification(t.SiglipConfig(num_labels=10))
            return t.SiglipVisionModel(t.SiglipVisionConfig())

    def cost(spec):
        with torch.device("meta"):
            model = dyntune.tune(host(), spec)
        return dyntune.cost(model), model

    parameters, bitfit, ssf, dense, mlp, layer, lora = FIGURES[kind]
    figures, model = cost("dyt:recipe=published,bottleneck=8")
    added = figures.trainable_params + figures.head_params + sum(p.numel() for p in model.backbone.idle)
    assert figures.total_params - added == parameters
    assert figures.trainable_params == 165_996
    assert (figures.dense_macs, figures.macs) == (dense, mlp)
    assert cost("dyt:recipe=published,dispatch=layer,bottleneck=8")[0].macs == layer
    assert cost("bitfit")[0].trainable_params == bitfit
    assert cost("ssf")[0].trainable_params == ssf
    for targets in ("qkv", "q/v"):
        figures = cost(f"lora:targets={targets}")[0]
        assert (figures.macs, figures.trainable_params) == (lora, 294_912)


@torch.no_grad()
@pytest.mark.parametrize("spec", ["dyt", "lora", "lora:targets=q/v+dispatch", "ssf+lora", "fact-tt", "noah"])
def test_an_adapter_of_timms_twin_fits_and_gives_the_same_logits(make_hf, make_host, randomise, tmp_path, spec):
    """Three maps or one to queries, keys and values: parts have the same tensors, under the same names."""
    timm_host, host = make_host("plain"), make_hf("vit", layer_norm_eps=1e-6)
    theirs = timm_host.state_dict()
    backbone = wrap(host)
    for name, parameter in backbone.named_parameters():
        name = backbone.saved_name(name).removeprefix("host.")
        values = {
            "embeddings.cls_token": "cls_token",
            "embeddings.position_embeddings": "pos_embed",
        }
        part = re.fullmatch(r"(blocks\.\d+\.attn)\.([qkv])\.(.*)", name)
        if part:
            whole = theirs[f"{part[1]}.qkv.{part[3]}"]
            parameter.copy_(whole.chunk(3)["qkv".index(part[2])])
        else:
            parameter.copy_(theirs[values.get(name, name)])
    torch.manual_seed(0)
    model = tuned(timm_host, spec)
    for tensor in model.saved_state().values():
        tensor += 0.1 * torch.randn_like(tensor)
    images = torch.randn(4, 3, 32, 32)
    twin = dyntune.load(model.save(tmp_path), backbone=host, check_backbone=False)
    expected = model.run(images)
    torch.testing.assert_close(twin(images), expected.logits, atol=1e-5, rtol=1e-5)
    merged, own = twin.merge(), model.merge()
    expected = own(images)
    found = merged(images)
    torch.testing.assert_close(getattr(found, "logits", found), expected, atol=1e-5, rtol=1e-5)


def holder(**children):
    module = nn.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module


def as_in_transformers_4(host):
    """The same modules called and nested as in transformers 4.57; the host itself cannot be run any more."""
    tower = next(child for name, child in host.named_children() if name in ("vit", "dinov2"))
    blocks = tower.layers if hasattr(tower, "layers") else tower.encoder.layer
    if hasattr(getattr(blocks[0].attention, "attention", None), "query"):
        pytest.skip("this transformers has the older names")
    for index, block in enumerate(blocks):
        attn = block.attention
        inner = holder(query=attn.q_proj, key=attn.k_proj, value=attn.v_proj)
        inner.dropout_prob = attn.attention_dropout
        attention = holder(attention=inner, output=holder(dense=attn.o_proj, dropout=nn.Dropout(0.0)))
        if hasattr(block, "norm1"):
            block.attention = attention
            if hasattr(block.mlp, "gate_proj"):
                block.mlp = FusedSwiGLU(block.mlp)
        else:
            older = holder(
                attention=attention,
                intermediate=holder(dense=block.mlp.fc1),
                output=holder(dense=block.mlp.fc2, dropout=nn.Dropout(0.0)),
                layernorm_before=block.layernorm_before,
                layernorm_after=block.layernorm_after,
            )
            blocks[index] = older
    if hasattr(tower, "layers"):
        tower.encoder = holder(layer=tower.layers)
        del tower.layers
    return host


class FusedSwiGLU(nn.Module):
    """DINOv2's gated MLP with one map to gate and hidden layer."""

    def __init__(self, mlp):
        super().__init__()
        hidden, width = mlp.gate_proj.weight.shape
        self.weights_in, self.weights_out = nn.Linear(width, 2 * hidden), mlp.down_proj
        with torch.no_grad():
            self.weights_in.weight.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
            self.weights_in.bias.copy_(torch.cat([mlp.gate_proj.bias, mlp.up_proj.bias]))

    def forward(self, x):
        gate, hidden = self.weights_in(x).chunk(2, dim=-1)
        return self.weights_out(nn.functional.silu(gate) * hidden)


@torch.no_grad()
@pytest.mark.parametrize("direction", ["to newer", "to older"])
@pytest.mark.parametrize(
    ("kind", "spec", "changes"),
    [
        ("vit", "dyt+lora:targets=q/v/fc1", {}),
        ("vit", "full", {}),
        ("dinov2", "dyt+ssf", {}),
        ("dinov2", "dyt+lora:targets=q/v", {"use_swiglu_ffn": True}),
    ],
)
def test_runs_are_read_with_another_version_of_transformers(
    make_hf, randomise, tmp_path, kind, spec, changes, direction
):
    newer, older = randomise(make_hf(kind, **changes)), as_in_transformers_4(randomise(make_hf(kind, **changes)))
    first, second = (newer, older) if direction == "to older" else (older, newer)
    model = tuned(first, spec)
    for tensor in model.saved_state().values():
        tensor += 0.1
    images = torch.randn(2, 3, 32, 32)
    loaded = dyntune.load(model.save(tmp_path), backbone=second)
    torch.testing.assert_close(loaded(images), model(images), atol=1e-5, rtol=1e-5)
    assert loaded.fingerprint == model.fingerprint
    names = safetensors.torch.load_file(tmp_path / "dyntune.safetensors")
    assert not any(re.search(r"\b(vit|dinov2|layers?|encoder|query|q_proj|attention)\b", name) for name in names)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip-tower", "siglip-tower"])
def test_bare_towers_are_the_same_inside_another_module(make_hf, randomise, tmp_path, kind):
    """transformers 4.57 has what is the tower itself since 5.6 as its ``vision_model``."""
    tower = randomise(make_hf(kind))
    inner = tower.vision_model if hasattr(tower, "vision_model") else tower
    outer = type(tower).__new__(type(tower))
    nn.Module.__init__(outer)
    outer.config, outer.vision_model = tower.config, randomise(make_hf(kind))
    if hasattr(outer.vision_model, "vision_model"):
        outer.vision_model = outer.vision_model.vision_model
    model = tuned(inner, "dyt+lora:targets=q")
    loaded = dyntune.load(model.save(tmp_path), backbone=outer.eval())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(images), model(images), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_a_tower_without_attention_pool_takes_the_mean(make_hf):
    tower = make_hf("siglip-tower", vision_use_head=False).eval()
    for give in (lambda: dyntune.tune(tower, "dyt"), lambda: add_classifier(tower, 3)):
        with pytest.raises(BackboneError, match=r"no attention pool \(vision_use_head=False\).*pool='avg'"):
            give()
    images = torch.randn(2, 3, 32, 32)
    features = tower(images).last_hidden_state.mean(1)
    model = dyntune.tune(add_classifier(tower, 3, "avg"), "linear").eval()
    torch.testing.assert_close(model(images), model.backbone.heads[0](features), atol=1e-5, rtol=1e-5)


def test_what_takes_no_part_is_never_trained(make_hf):
    for kind, idle in (("vit", 0), ("dinov2", 1), ("clip", 2), ("siglip", 11), ("siglip-tower", 0), ("clip-tower", 0)):
        model = dyntune.tune(make_hf(kind), "full")
        unread = model.backbone.idle
        assert len(unread) == idle and not any(p.requires_grad for p in unread)
        assert model.describe()["backbone"]["complete"]


@torch.no_grad()
def test_positions_are_not_drawn_at_random_in_training(make_hf, randomise):
    host = randomise(make_hf("dinov3"))
    images = torch.randn(2, 3, 32, 32)
    model = dyntune.tune(host, "linear").train()
    own = copy.deepcopy(host).train()
    assert not torch.equal(own(images).pooler_output, own(images).pooler_output)
    assert torch.equal(model(images), model(images))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip"])
def test_the_last_block_is_computed_for_the_class_token_alone_where_the_head_reads_no_other(make_hf, randomise, kind):
    model = tuned(randomise(make_hf(kind)), "adaptformer")
    images = torch.randn(2, 3, 32, 32)
    fast = dyntune.optimize(model)
    torch.testing.assert_close(fast(images), model(images), atol=1e-4, rtol=1e-4)
    with dyntune.MacCounter() as dense:
        model(images[:1])
    with dyntune.MacCounter() as counter:
        fast(images[:1])
    assert (counter.macs < dense.macs) == (kind == "vit")


def test_models_of_other_kinds_are_refused_in_words(make_hf):
    t = transformers
    tiny = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    clip = t.CLIPModel(t.CLIPConfig(vision_config=tiny | {"image_size": 32, "patch_size": 8}, text_config=tiny))
    bert = t.BertModel(t.BertConfig(**tiny, vocab_size=30))
    vit = t.ViTModel(t.ViTConfig(**tiny, image_size=32, patch_size=8))
    for host, said in ((clip, "model.vision_model"), (bert, "another kind"), (vit, "ForImageClassification")):
        with pytest.raises(BackboneError, match=said):
            dyntune.tune(host, "dyt")
    tuned(clip.vision_model, "dyt")
    host = make_hf("vit")
    host.is_quantized = True
    with pytest.raises(BackboneError, match="quantised"):
        dyntune.tune(host, "dyt")


@torch.no_grad()
def test_a_timm_model_inside_transformers_is_a_timm_model():
    pytest.importorskip("transformers.models.timm_wrapper")
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", model_args={"img_size": 32}, num_labels=3
    )
    host = transformers.TimmWrapperForImageClassification(config).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = host(images).logits
    model = tuned(host, "linear")
    assert type(model.backbone.host).__name__ == "VisionTransformer"
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_folded_bias_of_the_keys_is_named_in_the_configuration(make_hf, randomise, tmp_path):
    """Without the entry transformers builds no such bias, and leaves the one in the file out."""
    host = randomise(make_hf("dinov3"))
    assert not host.config.key_bias
    model = tuned(host, "ssf")
    randomise(model.backbone)
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    model.merge().save_pretrained(tmp_path)
    again = transformers.DINOv3ViTModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again(images).pooler_output, expected, atol=1e-5, rtol=1e-5)


# Built by name.

PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 28},
    "do_center_crop": True,
    "crop_size": {"height": 24, "width": 24},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.4],
}


@pytest.fixture
def folder(make_hf, randomise, tmp_path):
    """``folder(kind)``: a model that ``save_pretrained`` has written, with an image processor beside it."""

    def write(kind, labels=(), **changes):
        host = randomise(make_hf(kind, **changes))
        if labels:
            host.config.id2label = dict(enumerate(labels))
            host.config.label2id = {name: number for number, name in enumerate(labels)}
        host.save_pretrained(tmp_path / kind)
        (tmp_path / kind / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
        return tmp_path / kind

    return write


@torch.no_grad()
def test_size_statistics_and_labels_are_those_beside_the_weights(folder):
    path = folder("dinov2", labels="abcde")
    model = tuned(transformers.AutoModelForImageClassification.from_pretrained(path), "dyt")
    assert model.classes == tuple("abcde")
    assert model.preprocessing == Preprocessing((24, 24), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), "bicubic")
    assert model.backbone.image_shape == (3, 24, 24) and model.backbone.grid == (3, 3)
    assert dyntune.cost(model).macs == dyntune.cost(tuned(create_backbone(f"hf:{path}"), "dyt")).macs
    # A ViT takes its own size alone, whatever its processor says; labels that are numbers are no names.
    model = tuned(create_backbone(f"hf:{folder('vit')}"), "dyt")
    assert model.preprocessing.size == (32, 32) and model.classes is None


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "clip", "siglip", "dinov2-registers"])
def test_another_image_size_is_kept_with_the_run(folder, tmp_path, kind):
    host = create_backbone(f"hf:{folder(kind)}", num_classes=3, img_size=48)
    model = tuned(host, "dyt")
    if kind != "dinov2-registers":
        with pytest.raises(BackboneError, match=r"images of 48 x 48 pixels; given \(32, 32\)"):
            model(torch.randn(2, 3, 32, 32))
    assert model.backbone.grid == (6, 6) and model.preprocessing.size == (48, 48)
    images = torch.randn(2, 3, 48, 48)
    resizing = kind in ("vit", "siglip")
    inputs = {"interpolate_pos_encoding": True} if resizing else {}
    own = copy.deepcopy(host)(images, **inputs) if kind != "clip" else None
    if own is not None:
        complete = model.run(images, complete=True).logits
        plain = tuned(create_backbone(f"hf:{folder(kind)}", num_classes=3, img_size=48), "linear")
        plain.backbone.host.load_state_dict(host.state_dict(), strict=False)
        assert complete.shape == own.logits.shape
        torch.testing.assert_close(plain(images), own.logits, atol=1e-5, rtol=1e-5)
    loaded = dyntune.load(model.save(tmp_path / "run"))
    assert torch.equal(loaded(images), model(images)) and loaded.backbone.grid == (6, 6)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "dinov3", "siglip-tower", "siglip"])
def test_a_run_is_built_again_from_the_folder_of_its_backbone(folder, tmp_path, kind):
    path = folder(kind)
    torch.manual_seed(0)
    model = tuned(create_backbone(f"hf:{path}", num_classes=3), "dyt")
    assert isinstance(model.backbone.host, TowerClassifier) == (kind in ("dinov3", "siglip-tower"))
    loaded = dyntune.load(model.save(tmp_path / "run"))
    images = torch.randn(2, 3, *model.backbone.image_shape[1:])
    assert torch.equal(loaded(images), model(images))
    assert loaded.origin == model.origin and loaded.backbone.classes == 3
    moved = path.rename(tmp_path / "moved")
    with pytest.raises(BackboneError, match=r"model\.safetensors"):
        dyntune.load(tmp_path / "run")
    for weights in (moved, moved / "model.safetensors"):
        assert torch.equal(dyntune.load(tmp_path / "run", weights=weights)(images), model(images))
    assert rebuild(loaded.origin.with_weights(moved)) is not None


@torch.no_grad()
def test_a_head_of_another_size_is_new_and_one_of_the_same_size_is_kept(folder):
    path = folder("vit")
    kept, new = create_backbone(f"hf:{path}"), create_backbone(f"hf:{path}", num_classes=3)
    state = safetensors.torch.load_file(path / "model.safetensors")
    assert torch.equal(kept.classifier.weight, state["classifier.weight"])
    assert new.classifier.weight.shape == (3, 32)
    assert create_backbone(f"hf:{path}", num_classes=0).classifier.state_dict() == {}
    assert torch.equal(new.vit.embeddings.cls_token, kept.vit.embeddings.cls_token)
    random = create_backbone(f"hf:{path}", num_classes=3, pretrained=False)
    assert not torch.equal(random.vit.embeddings.cls_token, kept.vit.embeddings.cls_token)


def test_files_in_half_precision_are_trained_in_full(folder, make_hf):
    path = folder("vit")
    create_backbone(f"hf:{path}").to(torch.bfloat16).save_pretrained(path)
    assert {p.dtype for p in create_backbone(f"hf:{path}").parameters()} == {torch.float32}


def test_files_that_lack_tensors_are_refused(folder):
    """transformers would leave these at random values, with a warning."""
    path = folder("vit")
    state = safetensors.torch.load_file(path / "model.safetensors")
    del state["vit.embeddings.cls_token"]
    safetensors.torch.save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"lacks 1 tensors.*cls_token"):
        create_backbone(f"hf:{path}")


def test_what_cannot_be_had_is_said_in_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError) as error:
        create_backbone("hf:nobody/no-such-vit")
    said = str(error.value)
    assert "\n" not in said
    for word in ("'nobody/no-such-vit'", "config.json, model.safetensors", "--model hf:FOLDER", "weights=FOLDER"):
        assert word in said
    with pytest.raises(BackboneError, match=r"cannot read .* Expected a folder with config.json"):
        create_backbone(f"hf:{tmp_path}")
    with pytest.raises(BackboneError, match="no weights at"):
        create_backbone("hf:nobody/no-such-vit", weights=tmp_path / "nowhere")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BackboneError, match=r"'bert'; supported are vit, deit"):
        create_backbone(f"hf:{tmp_path / 'bert'}")
    with pytest.raises(BackboneError, match="no drop path"):
        create_backbone(f"hf:{folder('vit')}", drop_path_rate=0.1)
    assert create_backbone(f"hf:{folder('dinov2')}", drop_path_rate=0.1).config.drop_path_rate == 0.1


def test_a_stranger_cannot_pass_arguments(folder, tmp_path):
    run = tuned(create_backbone(f"hf:{folder('vit')}"), "dyt").save(tmp_path / "run")
    config = json.loads((run / "dyntune.json").read_text())
    config["backbone"]["arguments"]["trust_remote_code"] = True
    (run / "dyntune.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="backbone arguments"):
        dyntune.load(run)


def test_another_scale_of_pixels_is_one_of_mean_and_deviation(folder):
    path = folder("vit")

    def preprocessing(**changes):
        (path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | changes))
        return tuned(create_backbone(f"hf:{path}"), "linear").preprocessing

    assert preprocessing(rescale_factor=1 / 127.5).mean == pytest.approx((0.2, 0.25, 0.3))
    assert preprocessing(do_rescale=False).std == pytest.approx((0.2 / 255, 0.3 / 255, 0.4 / 255))
    nothing = preprocessing(do_rescale=None, do_normalize=None, image_mean=None, image_std=None)
    assert nothing.mean == nothing.std == (0.5,) * 3
    assert preprocessing(image_mean=0.25).mean == (0.25,) * 3
    for wrong, said in (
        ({"rescale_factor": 0}, "multiplies pixels by 0"),
        ({"rescale_factor": "1/255"}, "multiplies pixels by '1/255'"),
        ({"image_std": "half"}, "has image_std='half'; expected a number"),
        ({"image_mean": [0.5]}, r"has image_mean=\[0.5\]"),
    ):
        with pytest.raises(BackboneError, match=said):
            preprocessing(**wrong)
    # transformers 5 writes what a processor of images and texts consists of to one file.
    (path / "processor_config.json").write_text(json.dumps({"image_processor": PROCESSOR | {"image_mean": [0.1] * 3}}))
    assert preprocessing().mean == (0.1,) * 3


def test_labels_may_be_numbered_by_texts(folder):
    names = {str(number): name for number, name in enumerate("abcde")}
    host = transformers.AutoModelForImageClassification.from_pretrained(folder("vit"), id2label=names)
    host.config.id2label = names
    assert tuned(host, "linear").classes == tuple("abcde")


def test_a_processor_that_is_not_in_the_cache_is_fetched_or_told(make_hf, folder, monkeypatch, caplog):
    host = make_hf("vit")
    host.name_or_path, asked = "me/far", []

    def download(repository, file, revision=None):
        asked.append(file)
        if repository == "me/far" and file == "preprocessor_config.json":
            return str(folder("vit") / file)
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert tuned(host, "linear").preprocessing.mean == (0.4, 0.5, 0.6)
    assert asked == ["preprocessor_config.json"] and not caplog.messages
    other = make_hf("vit")
    other.name_or_path = "me/farther"
    assert tuned(other, "linear").preprocessing.mean == (0.5,) * 3
    assert "me/farther" in caplog.text


@torch.no_grad()
def test_a_repository_in_the_cache_is_read_at_its_revision_without_a_network(folder, tmp_path, monkeypatch):
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path / "cache"), raising=False)
    commits = "0" * 40, "1" * 40
    repository = tmp_path / "cache" / "models--me--vit"
    (repository / "refs").mkdir(parents=True)
    for commit, mean in zip(commits, (0.1, 0.2), strict=True):
        snapshot = shutil.copytree(folder("vit"), repository / "snapshots" / commit)
        (snapshot / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | {"image_mean": [mean] * 3}))
        (repository / "refs" / "main").write_text(commit)
    model = tuned(create_backbone("hf:me/vit", num_classes=3, revision=commits[0]), "dyt")
    assert model.origin.arguments == {"num_classes": 3, "revision": commits[0]}
    assert model.preprocessing.mean == (0.1, 0.1, 0.1)
    assert create_backbone("hf:me/vit").dyntune_revision == commits[1]
    images = torch.randn(2, 3, 32, 32)
    run = model.save(tmp_path / "run")
    assert torch.equal(dyntune.load(run)(images), model(images))
    assert "base_model: me/vit" in (run / "README.md").read_text()
