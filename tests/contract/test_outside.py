"""The main job with what another distribution adds: it is trained, saved, loaded, asked, counted and exported.

CONTRIBUTING.md walks through the files in ``tests/outside``.
"""

import json
from importlib.util import find_spec

import pytest
import torch
from typer.testing import CliRunner

import dyntune
from dyntune.commands.main import app
from dyntune.parts.policies.base import TokenPolicy
from dyntune.parts.registry import registered

QUICK = ("--epochs", "1", "--batch-size", "18", "--workers", "0", "--device", "cpu")


def dyntune_says(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("model", "method"),
    [
        ("vit_two_blocks", "shift"),
        ("vit_two_blocks", "adaptformer+norm-gate:rate=0.4"),
        ("vit_two_blocks", "adaptformer+thinning"),
        ("rotary:tiny", "dyt:rate=0.5,dispatch=attn-mlp"),
    ],
)
def test_it_does_the_main_job(outside, photos, two_blocks, tmp_path, model, method):
    run = tmp_path / "run"
    weights = ("--weights", two_blocks) if model == "vit_two_blocks" else ()
    cost = dyntune_says("cost", "--model", model, "--method", method)
    trained = dyntune_says("train", photos, "--model", model, "--method", method, "--out", run, *weights, *QUICK)
    assert trained["macs"] == cost["macs"]
    assert trained["trainable_params"] == cost["trainable_params"]
    evaluated = dyntune_says("eval", run, photos)
    assert evaluated["images"] == 12
    photo = next((photos / "test").rglob("*.png"))
    predicted = dyntune_says("predict", run, photo)["predictions"][0]["top"]
    runtime = "onnx" if model.startswith("rotary") and find_spec("onnxscript") else "torch"
    dyntune_says("export", run, "--runtime", runtime, "--out", tmp_path / "exported")
    exported = dyntune_says("predict", tmp_path / "exported", photo, "--trust")["predictions"][0]["top"]
    assert [top["class"] for top in exported] == [top["class"] for top in predicted]
    for ours, theirs in zip(predicted, exported, strict=True):
        assert theirs["probability"] == pytest.approx(ours["probability"], abs=1e-5)


@torch.no_grad()
def test_what_it_does_is_what_it_says(outside, make_host, images_for):
    images = images_for(make_host(), 2)
    shifted = dyntune.tune(make_host(), "shift").eval()
    for block in shifted.backbone.blocks:
        block.mlp.parallel["shift"].value.normal_()
    assert not torch.allclose(shifted(images), make_host()(images))
    gated = dyntune.tune(make_host(), "norm-gate").eval().run(images)
    assert [gate.unit for gate in gated.gates] == ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"]
    thinned = dyntune.tune(make_host(), "thinning").eval().run(images)
    assert [reduction.count for reduction in thinned.reductions] == [1 + 8]


def test_a_gate_from_outside_takes_other_rates(outside, make_host, images_for):
    """Rates are calibrated on any gate with logits."""
    model = dyntune.tune(make_host(), "norm-gate").eval()
    images = images_for(model.backbone.host, 16)
    model.set_rate(0.25, images)
    shares = [gate.values.mean().item() for gate in model.run(images).gates]
    assert sum(shares) / len(shares) == pytest.approx(0.25, abs=0.05)


def test_what_cannot_be_loaded_is_left_out_with_a_warning(tmp_path, monkeypatch, caplog, outside):
    (tmp_path / "broken-1.0.dist-info").mkdir()
    (tmp_path / "broken-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (tmp_path / "broken-1.0.dist-info/entry_points.txt").write_text(
        "[dyntune.parts]\nbroken = broken_module:Part\nstrange = collections:OrderedDict\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    registered.cache_clear()
    assert {"shift", "lora"} <= set(registered())
    assert caplog.text.count("broken = broken_module:Part of the group dyntune.parts is left out: No module named") == 1
    assert (
        "strange = collections:OrderedDict of the group dyntune.parts is left out: it is no TuningMethod" in caplog.text
    )


def test_its_parts_are_known_as_long_as_it_is_installed(outside, monkeypatch):
    assert {"shift", "norm-gate", "thinning"} <= set(registered())
    assert list(registered())[-1] == "dyt"
    with pytest.raises(dyntune.DyntuneError, match="norm-gate"):
        dyntune.tune(torch.nn.Linear(1, 1), "norm-gat")
    monkeypatch.undo()
    registered.cache_clear()
    assert not {"shift", "norm-gate", "thinning"} & set(registered())


def test_a_policy_with_half_of_the_hooks_is_refused(make_host):
    class Half(TokenPolicy):
        def install(self, backbone):
            pass

        def gates(self, unit):
            return unit.kind == "mlp"

    with pytest.raises(dyntune.DyntuneError, match=r"gates\(\) but does not derive from GatingPolicy"):
        dyntune.tune(make_host(), Half())
