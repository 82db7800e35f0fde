"""What transformers' Trainer has to tell a tuned model: how long its training is, and how far it has come."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dyntune.model.rates import dispatchers
from dyntune.model.tuned import TunedModel


class CourseCallback(TrainerCallback):
    """Tells the model of a ``transformers.Trainer`` the course of its training: ``callbacks=[CourseCallback()]``.

    Without it gates train as in a loop that does not say its length, see ``TunedModel.begin_training``, and the
    complete model runs in every step, whatever ``complete_every`` is. A training that is resumed measures the pace of
    its gates anew. Before policies have settled (``TokenPolicy.settles``) a model may compute more than was asked for,
    so that no earlier evaluation counts for ``load_best_model_at_end``, nor for the patience of early stopping. A
    Trainer that is interrupted tells nobody: call ``model.end_training()`` before the model is trained in another way.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = _tuned(kwargs.get("model"))
        accumulate = args.gradient_accumulation_steps
        model.begin_training(state.max_steps * accumulate, _peak(model, kwargs.get("optimizer")), accumulate)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = _tuned(kwargs.get("model"))
        # The calls of the model say less: the last update of an epoch may have fewer of them.
        model.backbone.step = state.global_step * args.gradient_accumulation_steps
        if state.global_step < state.max_steps * max((policy.settles for policy in model.policies), default=0.0):
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _tuned(kwargs.get("model")).end_training()


def _tuned(model: Any) -> TunedModel:
    if not isinstance(model, TunedModel):
        raise TypeError(f"CourseCallback is for models from dyntune.tune; the Trainer has a {type(model).__name__}.")
    return model


def _peak(model: TunedModel, optimizer: Any) -> float | None:
    """The peak learning rate at which an optimiser of Adam's kin trains the gates; None for others."""
    own = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
    if not any("adam" in base.__name__.lower() for base in type(own).__mro__):
        return None
    gates = {id(p) for gate in dispatchers(model.backbone).values() for p in gate.parameters()}
    groups = [group for group in own.param_groups if any(id(p) in gates for p in group["params"])]
    return max((group.get("initial_lr", group["lr"]) for group in groups or own.param_groups), default=0.0) or None
