"""What transformers' Trainer has to tell a tuned model: how long its training is."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dyntune.model.tuned import TunedModel


class CourseCallback(TrainerCallback):
    """Tells the model of a ``transformers.Trainer`` the course of its training: ``callbacks=[CourseCallback()]``.

    Without it gates train as in a loop that does not say its length, see ``TunedModel.begin_training``. A training
    that is resumed measures the pace of its gates anew.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = _tuned(kwargs.get("model"))
        accumulate = args.gradient_accumulation_steps
        adam = "adam" in str(args.optim).lower()
        model.begin_training(state.max_steps * accumulate, args.learning_rate if adam else None, accumulate)
        model.backbone.step = state.global_step * accumulate

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _tuned(kwargs.get("model")).end_training()


def _tuned(model: Any) -> TunedModel:
    if not isinstance(model, TunedModel):
        raise TypeError(f"CourseCallback is for models from dyntune.tune; the Trainer has a {type(model).__name__}.")
    return model
