"""Evaluation: the figures of a model's task, activation rates, and the MACs that the run really executed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from dyntune.core.errors import DataError
from dyntune.core.modes import evaluating
from dyntune.data.base import LabelledImages
from dyntune.data.clips import Sampling
from dyntune.data.others import Samples, is_dataset, require_images
from dyntune.data.transforms import preprocessed
from dyntune.model.activation import MeanActivation
from dyntune.model.macs import MacCounter
from dyntune.model.tasks import Classification, Metric, Task
from dyntune.model.tasks.classification import require_head
from dyntune.model.tuned import ExecutionName, TunedModel, require_tuned
from dyntune.training.inputs import data_for, require_labels, require_same_classes

log = logging.getLogger("dyntune")


@dataclass
class _Users:
    """How many threads evaluate a model, and what puts its modules back into their modes."""

    modes: ExitStack
    count: int = 0


_LOCK = threading.Lock()
_EVALUATED: WeakKeyDictionary[TunedModel, _Users] = WeakKeyDictionary()


@dataclass(frozen=True)
class Evaluation:
    """What a model does on a set of images.

    Args:
        images: how many there were; videos, where each is one whatever its views.
        figures: of the model's task, by name; for classification ``accuracy`` and ``loss``.
        activation: mean share of active patches; 1 for a model without gates.
        activation_per_unit: the same for each gated unit, by path; empty for a model without gates.
        macs: MACs per image that ran, without the head; None if they were not counted.
        tokens_per_unit: tokens of an image, prefix included, that enter each unit in front of which a policy has merged
            or dropped some, by path.
        merit: which of ``figures`` is the task's figure of merit.
    """

    images: int
    figures: dict[str, float]
    activation: float
    activation_per_unit: dict[str, float]
    macs: float | None
    tokens_per_unit: dict[str, int] = field(default_factory=dict)
    merit: str = Classification.merit

    def __repr__(self) -> str:
        known = [f"{self.merit} {self.score:.2%}"]
        known += [f"{name} {value:.4g}" for name, value in self.figures.items() if name != self.merit]
        known += [f"{self.activation:.1%} of the patches active"] if self.activation_per_unit else []
        known += [] if self.macs is None else [f"{self.macs:,.0f} MACs per image"]
        return f"Evaluation({self.images:,} images: {', '.join(known)})"

    @property
    def score(self) -> float:
        """The task's figure of merit, from 0 to 1."""
        return self.figures[self.merit]

    @property
    def accuracy(self) -> float:
        """Of classification: share of images whose highest logit is the right class."""
        return self.figures["accuracy"]

    @property
    def loss(self) -> float:
        """Of classification: mean cross-entropy."""
        return self.figures["loss"]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = asdict(self)
        del values["merit"]
        return {"images": values.pop("images"), **values.pop("figures"), **values}


def as_tensors(dataset: Dataset[Any], model: TunedModel) -> LabelledImages | Samples:
    """PIL images, or all views of videos, with the model's preprocessing put on; tensors as they are."""
    return preprocessed(dataset, model.preprocessing, every_view=True)


def in_views(batch: Tensor, clip: Sampling | None) -> tuple[Tensor, int]:
    """A batch as models take it, and how many in a row of it belong together.

    Args:
        batch: inputs; or of videos that are seen in V views, ``(B, V, T, 3, height, width)``.
        clip: how clips are taken from videos; None for images.

    Returns:
        Inputs ``(B V, ...)``, and V: their chunks, as many, are no larger than a batch that is seen in one view.
    """
    return (batch, 1) if clip is None or batch.ndim < 6 else (batch.flatten(0, 1), batch.shape[1])


def over_views(outputs: Tensor, views: int, task: Task, clip: Sampling | None) -> Tensor:
    """Outputs ``(B V, ...)`` as those of B inputs, averaged over their V views."""
    return outputs if views == 1 or clip is None else task.averaged(outputs.unflatten(0, (-1, views)), clip.average)


@torch.no_grad()
def evaluate(
    model: TunedModel,
    data: Dataset[Any] | Iterable[tuple[Tensor, Tensor]],
    *,
    batch_size: int = 64,
    workers: int = 0,
    count_macs: bool = True,
    execution: ExecutionName = "compact",
    metric: Metric | None = None,
    watch: Callable[[int, dict[str, float]], object] | None = None,
) -> Evaluation:
    """Runs a model on labelled images, on the device that it is on.

    Args:
        model: put in eval mode for the run, and back afterwards.
        data: a data set of (image, target), as for ``fit``, or an iterable of batches.
        batch_size: images per forward pass; of videos in several views, clips.
        workers: processes that read images.
        count_macs: whether to count what runs; each operator then passes through Python, which costs some time.
        execution: ``compact`` skips tokens, ``masked`` computes all.
        metric: counts the outputs, in place of a fresh one of the model's task.
        watch: is told after each batch how many images are done, and the task's figures on them.

    Raises:
        DataError: there is no image, the data are of no such kind, a label is not one of the classes, or the classes
            are the model's in another order.
        TrainingError: the model has no head.
    """
    require_tuned(model, "evaluate")
    if metric is None and isinstance(model.task, Classification):
        require_head(model.backbone, "nothing to evaluate")
    require_images(data, "the data set")
    batches: Iterable[Any] = data  # type: ignore[assignment]
    if is_dataset(data) and not isinstance(data, IterableDataset):
        images_of = data_for(model, data, "the data set")
        require_same_classes(model, images_of, "the data set")
        require_labels(model, images_of, beforehand=False)
        batches = DataLoader(
            as_tensors(images_of, model),
            batch_size,
            num_workers=workers,
            generator=torch.Generator(),  # of its own: evaluating must not change what a training loop draws
        )
    elif isinstance(data, DataLoader) and isinstance(data.dataset, LabelledImages) and data.dataset.transform is None:
        raise DataError("the batches would be of PIL images. Give the data set itself, which is preprocessed then.")
    device = next(model.parameters()).device
    metric = metric or model.task.metric(model.backbone.classes)
    images = spoilt = 0
    active = MeanActivation()
    tokens: dict[str, int] = {}
    counter = MacCounter() if count_macs else None
    with _in_eval_mode(model):
        for number, given in enumerate(batches):
            batch, targets = _pair(given, number)
            batch, views = in_views(batch, model.preprocessing.clip)
            targets, logits = targets.to(device), []
            for piece in batch.chunk(views):
                with counter or nullcontext(), counter.watching(model.backbone) if counter else nullcontext():
                    output = model.run(piece.to(device), execution=execution)
                logits.append(output.logits.float())
                active.add(output.gates, len(piece))
            outputs = over_views(torch.cat(logits), views, model.task, model.preprocessing.clip)
            metric.update(outputs, targets)
            spoilt += int((~outputs.reshape(len(outputs), -1).isfinite().all(1)).sum())
            images += len(targets)
            tokens = {reduction.unit: reduction.count for reduction in output.reductions}
            if watch:
                watch(images, metric.figures())
    if not images:
        raise DataError("there is no image to evaluate on.")
    if spoilt:
        log.warning(
            "the outputs for %d of %d inputs are not finite, so that the figures say nothing about them. The model's "
            "numbers are too large for its precision: use fp32, or weights from before the step that spoilt them.",
            spoilt,
            images,
        )
    return Evaluation(
        images=images,
        figures=metric.figures(),
        activation=active.mean,
        activation_per_unit=active.per_unit,
        macs=(counter.macs - counter.head_macs) / images if counter else None,
        tokens_per_unit=tokens,
        merit=model.task.merit,
    )


@contextmanager
def _in_eval_mode(model: TunedModel) -> Iterator[None]:
    """Puts a model's modules back into their modes when the last of the threads that evaluate it is done."""
    with _LOCK:
        users = _EVALUATED.setdefault(model, _Users(ExitStack()))
        if not users.count:
            users.modes.enter_context(evaluating(model))
        users.count += 1
        model.eval()
    try:
        yield
    finally:
        with _LOCK:
            users.count -= 1
            if not users.count:
                del _EVALUATED[model]
                users.modes.close()


def _pair(batch: Any, number: int) -> tuple[Tensor, Tensor]:
    """Images and targets of a batch; raises DataError for one of another kind."""
    if isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        images, targets = batch
        if images.is_floating_point() and images.dtype != torch.float64:
            return images, targets
    raise DataError(
        f"batch {number} is not one of images and targets. Expected (images, targets), float32 tensors (batch, 3, "
        "height, width), of clips (batch, frames, 3, height, width), that are preprocessed, and a target for each; or "
        "give the data set itself."
    )
