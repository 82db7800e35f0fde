"""A tower of transformers with gates in every runtime, and optimised: the logits of the model itself."""

import pytest
import torch
from test_export import RUNTIMES, assert_agrees, between, filled, opened

import dyntune
from dyntune.inference import folded_copy
from dyntune.inference.export.program import export_program
from dyntune.model.tune import build_tuned
from dyntune.parts.policies.dispatcher import Dispatcher

pytest.importorskip("transformers")


@torch.no_grad()
def test_rotated_attention_among_active_tokens_agrees_everywhere(make_hf, randomise, tmp_path):
    host = randomise(dyntune.add_classifier(make_hf("dinov3", num_hidden_layers=1), 5))
    model = filled(host, "dyt:dispatch=layer")
    images = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    for module in model.modules():
        if isinstance(module, Dispatcher):
            torch.nn.init.normal_(module.gate.weight)
    for block in model.backbone.blocks:
        logits = next(gate.logits for gate in model.run(images).gates if gate.unit == block.path)
        block.dispatcher.gate.bias += between(logits)
    program = export_program(folded_copy(model, masks=True), masks=True)
    for runtime in RUNTIMES:
        assert_agrees(opened(runtime, program, tmp_path), model, images, masks=True)
    torch.testing.assert_close(dyntune.optimize(model)(images), model(images), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "changes"), [("siglip-tower", {}), ("siglip2", {"num_patches": 9})])
def test_attention_pools_and_resized_positions_take_any_batch(make_hf, randomise, kind, changes, tmp_path):
    host = randomise(make_hf(kind, **changes))
    model = dyntune.tune(dyntune.add_classifier(host, 5) if "tower" in kind else host, "linear").eval()
    program = export_program(folded_copy(model, masks=False), masks=False)
    for runtime in RUNTIMES:
        assert_agrees(
            opened(runtime, program, tmp_path), model, torch.randn(32, 3, *model.preprocessing.size), masks=False
        )


def test_a_local_folder_is_no_matter_of_who_gets_the_export(make_hf, tmp_path):
    make_hf("vit").save_pretrained(tmp_path / "secret")
    model = build_tuned(f"hf:{tmp_path / 'secret'}", "linear", classes=("a", "b"))
    folder = dyntune.export(model, tmp_path / "export", runtime="torch")
    assert not any("secret" in (folder / name).read_text() for name in ("deploy.json", "README.md"))
