"""The optimiser of a run, and the learning rate of its groups of tensors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from dyntune.backbones.base import Backbone
from dyntune.core.errors import CheckpointError, TrainingError, in_one_line
from dyntune.training.settings import TrainSettings

MOMENTUM = 0.9
"""Of SGD."""


def make_optimizer(
    trained: Sequence[nn.Parameter], settings: TrainSettings, pretrained: Collection[nn.Parameter] = frozenset()
) -> torch.optim.Optimizer:
    """AdamW or SGD with momentum on the trained tensors; on those in half precision, in fp32.

    Args:
        trained: the tensors, in the order in which a saved state lists them.
        settings: kind, learning rate and the backbone's factor on it, weight decay, and whether biases and other 1-D
            tensors decay.
        pretrained: which of them come from the pretrained backbone.

    Raises:
        TrainingError: gradients in half precision are to be scaled, which only those of tensors in fp32 can be.
    """
    rounded = {p: nn.Parameter(p.detach().float()) for p in trained if p.dtype in (torch.bfloat16, torch.float16)}
    if rounded and settings.precision == "fp16":
        raise TrainingError(
            "precision=fp16 scales the gradients of weights in fp32; this model's are in half precision already. Use "
            "precision=fp32 or bf16 with it, or call model.float() before tune."
        )
    slow = {rounded.get(p, p) for p in pretrained}
    trained = [rounded.get(p, p) for p in trained]
    groups: list[dict[str, Any]] = [{"params": list(trained)}]
    if settings.backbone_lr != 1:
        groups = [
            {"params": [p for p in trained if p not in slow]},
            {"params": [p for p in trained if p in slow], "lr_factor": settings.backbone_lr},
        ]
    if not settings.decay_1d:
        groups = [
            part
            for group in groups
            for part in (
                group | {"params": [p for p in group["params"] if p.ndim > 1]},
                group | {"params": [p for p in group["params"] if p.ndim <= 1], "weight_decay": 0.0},
            )
        ]
    if settings.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            groups, lr=settings.lr, momentum=MOMENTUM, weight_decay=settings.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)
    set_learning_rate(optimizer, settings.lr)
    if rounded:
        _follow(optimizer, rounded)
    return optimizer


def _follow(optimizer: torch.optim.Optimizer, rounded: dict[nn.Parameter, nn.Parameter]) -> None:
    """Trains tensors in fp32 of which a model has rounded copies: in these, small changes would be lost.

    Args:
        optimizer: of the tensors in fp32; they are saved and loaded with its state.
        rounded: for each parameter of the model, the tensor that is trained in its place.
    """

    @torch.no_grad()
    def before(*_: Any) -> None:
        for parameter, exact in rounded.items():
            if not torch.equal(parameter, exact.to(parameter.dtype)):  # paced gates take other tensors on their way
                exact.copy_(parameter)
            exact.grad = None if parameter.grad is None else parameter.grad.float()

    @torch.no_grad()
    def after(*_: Any) -> None:
        for parameter, exact in rounded.items():
            parameter.copy_(exact)
            parameter.grad = None
            if optimizer.state[exact]:
                optimizer.state[exact]["exact"] = exact.detach()

    @torch.no_grad()
    def loaded(*_: Any) -> None:
        for exact in rounded.values():
            if "exact" in optimizer.state[exact]:
                exact.copy_(optimizer.state[exact]["exact"])

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    optimizer.register_load_state_dict_post_hook(loaded)


def fill_optimizer(optimizer: Any, saved: dict[str, Any]) -> None:
    """Gives an optimiser the state that it had, checked to be one of its tensors with its settings.

    Args:
        optimizer: as the run makes it, perhaps wrapped.
        saved: what its ``state_dict`` gave.

    Raises:
        CheckpointError: it is another one's, or has a number that is not finite.
    """
    try:
        own, groups = optimizer.state_dict()["param_groups"], saved["param_groups"]
        kept = [{key: value for key, value in group.items() if key not in ("lr", "initial_lr")} for group in own]
        given = [{key: group[key] for key in keys} for group, keys in zip(groups, kept, strict=True)]
        if [_plain(group) for group in given] != [_plain(group) for group in kept]:
            raise ValueError("it has other settings")
        by_number = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
        for number, values in saved["state"].items():
            for name, value in values.items():
                tensor = torch.as_tensor(value)
                if tensor.shape not in (by_number[number].shape, ()) or not bool(tensor.isfinite().all()):
                    raise ValueError(f"{name} of tensor {number} has another shape, or a number that is not finite")
        optimizer.load_state_dict(saved)
    except Exception as error:  # whatever PyTorch meets in what is no state
        raise CheckpointError(
            f"the saved state of the optimiser is not one of this run: {in_one_line(error)}. Start again with another "
            "output folder."
        ) from error


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    """A group of an optimiser with lists for tuples, as a file may have either."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in group.items()}


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of the next step, times each group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def pretrained_parameters(backbone: Backbone) -> set[nn.Parameter]:
    """The backbone's own parameters: without its head, and without what methods and other libraries put on it."""
    new = {*backbone.adopted}
    for module in (
        *backbone.heads,
        *backbone.necks,
        *(change for site in backbone.sites() for change in site.changes.values()),
    ):
        new |= {*module.parameters()}
    return {*backbone.host.parameters()} - new
