"""Putting tuning methods and token policies on a pretrained model, one that is given or one that a name stands for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dyntune.backbones.hosts import create_backbone
from dyntune.core.errors import SpecError
from dyntune.model.tasks import Task
from dyntune.model.tuned import TunedModel
from dyntune.parts.registry import resolve
from dyntune.parts.spec import Part


def tune(model: nn.Module, *parts: str | Part, **options: Any) -> TunedModel:
    """Puts tuning methods and token policies on a pretrained model.

    The model is adapted in place, so give each tuned model a backbone of its own. Its parameters are frozen but for
    the head and what a method unfreezes, and modules are added, in the order of the parts. What these start at is drawn
    from PyTorch's random numbers: ``torch.manual_seed`` before the model is made gives the same adapter each time.

    Args:
        model: a vision transformer of timm or transformers with its classifier, or one that PEFT's ``get_peft_model``
            has wrapped.
        parts: spec strings (``"dyt:rate=0.5"``, ``"adaptformer"``, ``"dispatch:where=mlp,rate=0.5"``) or typed
            configurations (``DyT(rate=0.5)``).
        options: none; whoever gives one is told where it belongs.

    Raises:
        BackboneError: the model is not supported, or a part is not defined on it.
        SpecError: a part's name, option or value is wrong, no part is given, or the host's configuration is for another
            problem than one label for each image.
    """
    if options:
        given = ",".join(f"{name}={value}" for name, value in options.items())
        first = parts[0] if parts and isinstance(parts[0], str) else "dyt"
        raise SpecError(
            f"options belong to a part, not to tune: tune(model, {first + (',' if ':' in first else ':') + given!r}), "
            "or a typed configuration such as dyntune.DyT(rate=0.5)."
        )
    if any(isinstance(part, nn.Module) for part in parts):
        raise SpecError("tune takes the model first, then its methods: tune(vit, method, ...).")
    if isinstance(model, str):
        raise SpecError(f"tune takes a model, not a name: tune(timm.create_model({model!r}, pretrained=True), ...).")
    if isinstance(model, TunedModel):
        raise SpecError("the model is tuned already; give all parts at once: tune(vit, part, part).")
    resolved = resolve(parts)
    if not resolved:
        raise SpecError('no tuning method given; for instance tune(model, "dyt:rate=0.5") or tune(model, "linear").')
    tuned = TunedModel(model, resolved)
    problem = getattr(tuned.backbone.config, "problem_type", None)
    if problem not in (None, "single_label_classification"):
        raise SpecError(
            f"the host's configuration has problem_type={problem!r}; expected one label for each image, of which the "
            "training loss is the cross-entropy. For such images set model.config.problem_type = None before tune. For "
            "another loss do that too, and set the task of the tuned model (TunedModel.task) to one of your own."
        )
    return tuned


def build_tuned(
    name: str,
    *parts: str | Part,
    classes: Sequence[str],
    weights: str | Path | None = None,
    task: Task | None = None,
    **arguments: Any,
) -> TunedModel:
    """A pretrained backbone by name with a new head and parts on it: what ``dyntune train`` begins with.

    The head starts as the task says.

    Args:
        name: timm model name; ``hf:`` and a folder or repository for models of transformers.
        parts: as for ``tune``.
        classes: names of the classes in label order; the head has an output for each.
        weights: local weight file of the backbone.
        task: what the outputs mean; classification if not given.
        arguments: for whoever builds it, for instance ``img_size``.
    """
    if not arguments.get("drop_path_rate", True):
        del arguments["drop_path_rate"]  # none is the default, and not every host can have some
    host = create_backbone(name, weights=weights, num_classes=len(classes), **arguments)
    model = tune(host, *parts)
    model.task = task or model.task
    for head in model.backbone.heads:
        model.task.initialise(head)
    model.classes = tuple(classes)
    return model
