"""An exported model beside the tuned model that it was made from: does it still say the same?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dyntune.core.errors import DataError, ExportError
from dyntune.core.words import counted
from dyntune.data.transforms import preprocessed
from dyntune.inference.export.folder import OpenedModel
from dyntune.model.tuned import TunedModel


@dataclass(frozen=True)
class Check:
    """What exporting has changed, on a set of labelled images.

    Args:
        images: how many there were.
        batch_size: the most of them in one forward pass.
        accuracy_before: of the tuned model, in eager PyTorch.
        accuracy_after: of the exported model.
        agreement: share of images that both put into the same class.
        largest_difference: between two logits of the same image and class.
        largest_logit: of the tuned model, in absolute value, as the scale of that difference.
        gate_agreement: share of patches that both compute, or both skip, over all gates; None without gates.
        gate_agreement_per_unit: the same for each gated unit, by path.
    """

    images: int
    batch_size: int
    accuracy_before: float
    accuracy_after: float
    agreement: float
    largest_difference: float
    largest_logit: float
    gate_agreement: float | None
    gate_agreement_per_unit: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def require(self, least: float) -> None:
        """Checks that predictions agree often enough.

        Raises:
            ExportError: ``agreement`` is below ``least``.
        """
        if self.agreement < least:
            raise ExportError(
                f"the exported model agrees with the tuned one on {self.agreement:.2%} of "
                f"{counted(self.images, 'image')}, which is less than {least:.2%} (accuracy {self.accuracy_before:.2%} "
                f"before, {self.accuracy_after:.2%} after). Take --precision fp32, or accept it with a lower "
                "--min-agreement."
            )


@torch.no_grad()
def check(
    before: TunedModel,
    after: OpenedModel,
    data: Dataset[Any] | Iterable[tuple[Tensor, Tensor]],
    *,
    with_masks: OpenedModel | None = None,
    batch_size: int = 1,
    watch: Callable[[int], object] | None = None,
) -> Check:
    """Compares an exported model with the model that it was made from.

    Args:
        before: the tuned model, at the rate that it was exported with; put in eval mode for the run. It may be on
            another device and in another precision than the exported one.
        after: the exported model.
        data: a data set of (image, label), or an iterable of batches.
        with_masks: the same model, exported with masks, where ``after`` has none: its gates are compared.
        batch_size: images per forward pass, for a data set. With int8 in ONNX, logits depend on it.
        watch: is told after each batch how many images are done.

    Raises:
        DataError: there is no image.
        ExportError: logits are not finite.
    """
    batches: Iterable[tuple[Tensor, Tensor]] = (
        DataLoader(preprocessed(data, before.preprocessing), batch_size) if isinstance(data, Dataset) else data
    )
    seeing = with_masks or after
    task, outputs = before.task, before.backbone.classes
    scores_before, scores_after = task.metric(outputs), task.metric(outputs)
    images = most = 0
    same = difference = largest = 0.0
    gates: dict[str, float] = {}
    training, weight = before.training, next(before.parameters())
    before.eval()
    try:
        for batch, labels in batches:
            output, own = before.run(batch.to(weight)), batch.cpu().float()
            expected, logits, labels = output.logits.cpu().float(), after(own), labels.cpu()
            for side, values in (("tuned", expected), ("exported", logits)):
                if not values.isfinite().all():
                    raise ExportError(
                        f"the {side} model gives logits that are not finite, on images {images} to "
                        f"{images + len(batch) - 1}, so there is nothing to compare. Look for NaN or infinite weights, "
                        "or take --precision fp32."
                    )
            images += len(batch)
            most = max(most, len(batch))
            same += float(task.agreement(expected, logits).sum())
            scores_before.update(expected, labels)
            scores_after.update(logits, labels)
            difference = max(difference, float((expected - logits).abs().max()))
            largest = max(largest, float(expected.abs().max()))
            masks = seeing.run(own)[1] if seeing.gates else None
            if masks is not None:
                for unit, mask, gate in zip(seeing.gates, masks.unbind(1), output.gates, strict=True):
                    agree = mask == (gate.on_patches > 0.5).cpu()
                    gates[unit] = gates.get(unit, 0.0) + len(batch) * float(agree.float().mean())
            if watch:
                watch(images)
    finally:
        before.train(training)
    if not images:
        raise DataError("there is no image to check on.")
    shares = {unit: total / images for unit, total in gates.items()}
    return Check(
        images=images,
        batch_size=most,
        accuracy_before=scores_before.figures()[task.merit],
        accuracy_after=scores_after.figures()[task.merit],
        agreement=same / images,
        largest_difference=difference,
        largest_logit=largest,
        gate_agreement=sum(shares.values()) / len(shares) if shares else None,
        gate_agreement_per_unit=shares,
    )
