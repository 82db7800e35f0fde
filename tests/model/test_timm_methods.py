"""timm's methods on a tuned model give what timm's give on its models; the host in it does not run behind its back."""

import copy
import pickle
import weakref

import pytest
import torch

import dyntune
from dyntune.backbones.families.frames import ClipClassifier
from dyntune.backbones.hosts import wrap
from dyntune.core.errors import BackboneError, SpecError


def clips_for(host, batch):
    return torch.randn((batch, host.frames, 3, 32, 32), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_an_untouched_model_has_the_tokens_and_embeddings_of_its_host(make_host, images_for, any_host_name):
    host = make_host(any_host_name)
    images = images_for(host, 2)
    tokens = host.forward_features(images)
    embedding, logits = host.forward_head(tokens, pre_logits=True), host.forward_head(tokens)
    features, classifier = host.num_features, host.get_classifier()
    model = dyntune.tune(host, "linear").eval()
    torch.testing.assert_close(model.forward_features(images), tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), embedding, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.forward_head(tokens), logits, atol=1e-5, rtol=1e-5)
    assert (model.num_features, model.num_classes) == (features, 5) and model.get_classifier() == classifier


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "siglip", "average", "distilled", "dinov3", "naflex"])
@pytest.mark.parametrize("spec", ["dyt", "vpt", "lora+tome:r=3", "res-tuning-bypass", "adaptformer+evit:layers=1"])
def test_logits_are_the_head_on_the_tokens(make_host, images_for, randomise, kind, spec):
    host = make_host(kind)
    images, shape = images_for(host, 2), host.forward_features(images_for(host, 2)).shape
    if "evit" in spec and kind in ("siglip", "naflex"):
        return  # they have no class token to rank patches by
    model = dyntune.tune(host, spec).eval()
    randomise(model.backbone.host.get_classifier() if kind != "distilled" else model.backbone.host.head, 3)
    for module in model.modules():
        if hasattr(module, "up_proj"):
            randomise(module.up_proj, 4)
    tokens = model.forward_features(images)
    torch.testing.assert_close(model.forward_head(tokens), model(images), atol=1e-5, rtol=1e-5)
    if "evit" in spec:
        assert tokens.shape[1] < shape[1], "those that were dropped are gone"
    else:
        assert tokens.shape == shape


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "registers", "siglip", "dinov3", "swin", "beit"])
def test_features_of_several_blocks_are_those_of_the_host(make_host, images_for, kind):
    host = make_host(kind)
    images = images_for(host, 2)
    options = [{"norm": True}, {"indices": 1, "intermediates_only": True}, {"indices": [0, 1]}, {"output_fmt": "NLC"}]
    if kind == "swin":
        options.pop()  # it has no such form
    expected = [host.forward_intermediates(images, **given) for given in options]
    model = dyntune.tune(host, "linear").eval()
    for given, theirs in zip(options, expected, strict=True):
        torch.testing.assert_close(model.forward_intermediates(images, **given), theirs, atol=1e-5, rtol=1e-5)
    if kind == "registers":
        (features, prefix), *_ = model.forward_intermediates(images, return_prefix_tokens=True, intermediates_only=True)
        assert features.shape == (2, 32, 4, 4) and prefix.shape == (2, 5, 32)


@torch.no_grad()
def test_features_of_blocks_have_what_is_on_the_host_in_them(make_host, images_for, randomise):
    host = make_host()
    images = images_for(host, 2)
    plain = host.forward_intermediates(images, intermediates_only=True)
    model = randomise(dyntune.tune(host, "vpt", "adaptformer", "tome:r=3"), 3).eval()
    tokens, found = model.forward_intermediates(images, norm=True)
    assert [tuple(features.shape) for features in found] == [(2, 32, 4, 4)] * 3
    torch.testing.assert_close(found[-1].flatten(2).mT, tokens[:, 1:])
    torch.testing.assert_close(found[-1], model.features(images))
    assert (found[0] - plain[0]).abs().max() > 1e-2
    with pytest.raises(SpecError, match=r"indices=.*expected numbers of 3 blocks"):
        model.forward_intermediates(images, [3])
    with pytest.raises(SpecError, match="stream of its own"):
        dyntune.tune(make_host(), "res-tuning-bypass").forward_intermediates(images)


@torch.no_grad()
def test_frames_have_their_tokens_side_by_side(make_host, randomise):
    for temporal in ("mean", "attentive"):
        host = ClipClassifier(make_host("plain", depth=2), 3, temporal).eval()
        clips = clips_for(host, 2)
        model = dyntune.tune(host, "adaptformer").eval()
        tokens = model.forward_features(clips)
        assert tokens.shape == (2, 3, 17, 32)
        torch.testing.assert_close(model.forward_head(tokens), model(clips))
        assert model.forward_head(tokens, pre_logits=True).shape == (2, 32)
        with pytest.raises(BackboneError, match=r"tokens of each frame, \(B, 3, N, C\)"):
            model.forward_head(tokens[:, 0])
        for module in (host, host.vit):
            with pytest.raises(BackboneError, match="without what is put on it"):
                module(clips)


def test_the_host_refuses_to_run_without_what_is_on_it(make_host, images_for):
    host = make_host()
    images = images_for(host, 2)
    model = dyntune.tune(host, "dyt:rate=0.6").eval()
    model.set_rate(0.5, images)  # which tries on a copy
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), dyntune.optimize(model)
    for own in (host, *(twin.backbone.host for twin in twins)):
        with pytest.raises(BackboneError, match=r"VisionTransformer\.forward .*\(dyt:rate=0\.6\).*model\(images\)"):
            own(images)
        with pytest.raises(BackboneError, match=r"model\.forward_features\(images\)"):
            own.forward_features(images)
        for name in ("forward_intermediates", "get_intermediate_layers"):
            with pytest.raises(BackboneError, match=r"model\.forward_intermediates\(images"):
                getattr(own, name)(images)


@torch.no_grad()
def test_a_host_runs_once_it_belongs_to_nobody(make_host, images_for):
    host = make_host()
    images = images_for(host, 2)
    before, tokens = host(images), host.forward_features(images)
    model = dyntune.tune(host, "linear")
    assert torch.equal(copy.deepcopy(host)(images), before), "a copy is nobody's"
    assert torch.equal(copy.deepcopy(host).forward_features(images), tokens)
    assert model.merge() is host
    assert torch.equal(host(images), before) and "forward" not in vars(host)
    model = dyntune.tune(host, "dyt")
    del model
    assert torch.equal(host(images), before) and "forward" not in vars(host)
    reference = weakref.ref(host)
    model = dyntune.tune(host, "dyt")
    other = dyntune.tune(copy.deepcopy(model).backbone.host, "linear")
    del model, host
    assert reference() is None, "nothing but its model held it"
    with pytest.raises(BackboneError, match="given"):
        other.forward_head(tokens[0])


@torch.no_grad()
def test_the_towers_of_transformers_and_the_models_of_peft_refuse_too(make_hf, make_host, images_for):
    host = make_hf("vit")
    images = torch.randn(2, 3, 32, 32)
    expected = host.vit(images).last_hidden_state
    model = dyntune.tune(host, "linear").eval()
    torch.testing.assert_close(model.forward_features(images), expected, atol=1e-5, rtol=1e-5)
    for module in (host, host.vit):
        with pytest.raises(BackboneError, match="without what is put on it"):
            module(images)
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(make_host(), peft.LoraConfig(target_modules=["qkv"], r=2))
    model = dyntune.tune(wrapped, "dispatch").eval()
    with pytest.raises(BackboneError, match="without what is put on it"):
        wrapped(images)
    torch.testing.assert_close(model.forward_head(model.forward_features(images)), model(images))
    assert wrap(copy.deepcopy(model.backbone).plain().host).host(images).shape == (2, 5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "distilled", "swin", "naflex", "vit", "deit-distilled", "frames"])
def test_a_new_classifier_is_trained_saved_and_loaded(make_host, make_hf, images_for, tmp_path, kind):
    def build(classes=5):
        if kind in ("vit", "deit-distilled"):
            host = make_hf(kind)
            if classes != 5:
                wrap(host).reset_classifier(classes)
            return host
        torch.manual_seed(0)
        if kind == "frames":
            return ClipClassifier(make_host("plain", depth=2, num_classes=classes), 3, "mean").eval()
        return make_host(kind, num_classes=classes)

    host = build()
    images = clips_for(host, 2) if kind == "frames" else torch.randn(2, 3, 32, 32)
    model = dyntune.tune(host, "linear")
    model.classes = tuple("abcde")
    model.reset_classifier(3)
    assert model.num_classes == 3 and model.classes is None
    assert set(model.tuned_state()) == model.backbone.head_parameters() != set()
    logits = model.eval()(images)
    assert logits.shape == (2, 3)
    loaded = dyntune.load(model.save(tmp_path), backbone=_with(host, build(3)))
    torch.testing.assert_close(loaded(images), logits)
    with pytest.raises(BackboneError, match="belongs to another"):
        dyntune.tune(host, "linear")
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert not model.tuned_state() and model.eval()(images).shape == (2, 32)


def _with(host, other):
    """Another host with the same weights but for the classifier."""
    own = {name: t for name, t in host.state_dict().items() if "head" not in name and "classifier" not in name}
    other.load_state_dict(own, strict=False)
    return other


def test_a_run_with_a_new_classifier_is_built_again_by_its_name(tmp_path):
    host = dyntune.backbones.hosts.create_backbone("vit_mini_patch4_32.dyntune", num_classes=10)
    model = dyntune.tune(host, "adaptformer")
    model.reset_classifier(4)
    model.save(tmp_path)
    assert dyntune.load(tmp_path).num_classes == 4
    with pytest.raises(SpecError, match=r"global_pool='avg'.*is 'token'"):
        model.reset_classifier(4, "avg")
    with pytest.raises(SpecError, match="num_classes=-1"):
        model.reset_classifier(-1)


def test_a_classifier_that_has_no_place_is_refused(make_hf, make_host):
    with pytest.raises(BackboneError, match=r"no classifier to replace.*add_classifier"):
        dyntune.tune(make_hf("dinov3"), "lora").reset_classifier(3)
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["qkv"], r=2, modules_to_save=["head"])
    with pytest.raises(BackboneError, match="modules_to_save"):
        dyntune.tune(peft.get_peft_model(make_host(), config), "dispatch").reset_classifier(3)
