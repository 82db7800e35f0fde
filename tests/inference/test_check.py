"""The check counts what exporting has changed: predictions, accuracy, gates, logits."""

import copy

import pytest
import torch

from dyntune.core.errors import DataError, ExportError
from dyntune.inference.export.check import check
from dyntune.inference.export.folder import OpenedModel
from dyntune.inference.export.runtimes.base import Session

GATES = ["blocks.0.mlp", "blocks.1.mlp"]


class Spoiled(Session):
    """The tuned model, but every fourth image gets another class, and half of the first gate's patches the opposite."""

    def __init__(self, tuned):
        self.tuned = tuned

    def compute(self, images):
        output = self.tuned.run(images)
        logits = output.logits.clone()
        logits[::4] = logits[::4].roll(1, dims=1)
        masks = torch.stack([gate.values > 0.5 for gate in output.gates], dim=1)
        half = masks.shape[2] // 2
        masks[:, 0, :half] = ~masks[:, 0, :half]
        return logits, masks


def opened(tuned, gates=GATES):
    return OpenedModel({"spec": tuned.spec, "gates": gates}, Spoiled(tuned), tuned.preprocessing, tuned.classes)


@torch.no_grad()
def test_known_differences_are_counted(tuned, some_images):
    logits = tuned(some_images)
    labels = logits.argmax(-1)
    batches = [(some_images[:8], labels[:8]), (some_images[8:], labels[8:])]
    result = check(tuned, opened(tuned), batches)
    assert (result.images, result.batch_size, result.accuracy_before) == (24, 16, 1.0)
    assert result.accuracy_after == result.agreement == 0.75
    assert result.gate_agreement_per_unit == {"blocks.0.mlp": 0.5, "blocks.1.mlp": 1.0}
    assert result.gate_agreement == 0.75
    changed = logits[::4] - logits[::4].roll(1, dims=1)
    assert result.largest_difference == pytest.approx(float(changed.abs().max()))
    assert result.largest_logit == pytest.approx(float(logits.abs().max()))
    result.require(0.75)
    with pytest.raises(ExportError, match=r"75\.00% of 24 images, which is less than 80\.00%"):
        result.require(0.8)


def test_gates_come_from_a_second_model_where_the_first_gives_no_masks(tuned, some_images):
    batches = [(some_images, torch.zeros(24, dtype=torch.long))]
    assert check(tuned, opened(tuned, gates=[]), batches).gate_agreement is None
    seeing = check(tuned, opened(tuned, gates=[]), batches, with_masks=opened(tuned))
    assert seeing.gate_agreement == 0.75


def test_an_exact_export_changes_nothing(exported, tuned, some_images):
    from dyntune.inference.export.folder import open_export

    tuned.train()
    result = check(tuned, open_export(exported()), [(some_images, torch.zeros(24, dtype=torch.long))])
    assert tuned.training
    tuned.eval()
    assert (result.agreement, result.gate_agreement) == (1.0, 1.0)
    assert result.accuracy_before == result.accuracy_after
    assert result.largest_difference < 1e-4


@torch.no_grad()
def test_a_tuned_model_in_bf16_is_compared_in_its_own_precision(tuned, some_images):
    half = copy.deepcopy(tuned).bfloat16()
    result = check(half, opened(tuned, gates=[]), [(some_images, torch.zeros(24, dtype=torch.long))])
    expected = half(some_images.bfloat16()).float()
    assert result.largest_logit == pytest.approx(float(expected.abs().max()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["tuned", "exported"])
def test_logits_that_are_not_finite_are_an_error(tuned, some_images, side, bad):
    spoiled = copy.deepcopy(tuned)
    with torch.no_grad():
        spoiled.backbone.heads[0].bias[0] = bad
    before, after = (spoiled, tuned) if side == "tuned" else (tuned, spoiled)
    with pytest.raises(ExportError, match=f"the {side} model gives logits that are not finite, on images 0 to 23"):
        check(before, opened(after), [(some_images, torch.zeros(24, dtype=torch.long))])


def test_no_image_is_an_error(tuned):
    with pytest.raises(DataError, match="no image"):
        check(tuned, opened(tuned), [])
