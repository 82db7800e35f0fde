"""The folder of a run: whether a training may begin or go on there, alone, and whether its adapter is the run's own."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dyntune.backbones.base import file_name
from dyntune.core.errors import CheckpointError, TrainingError
from dyntune.core.files import alone_in
from dyntune.model.adapter_folder import (
    ASKED,
    CONFIG,
    FORMER_CONFIG,
    STATE,
    TRAINER_WEIGHTS,
    read_config,
    read_weights,
)
from dyntune.model.rates import dispatchers
from dyntune.model.tuned import TunedModel
from dyntune.training.accelerator import launched_processes
from dyntune.training.identity import identity_changes, run_identity
from dyntune.training.inputs import data_for
from dyntune.training.settings import TrainSettings
from dyntune.training.state import RunState


def require_room(out: Path, resume: bool) -> None:
    """Refuses a folder in which no training can begin, or go on, before any work is done for it.

    Args:
        out: the folder of the run.
        resume: whether what it holds is to be continued.

    Raises:
        TrainingError: it is a file, or holds a run or something else that is not to be continued, or an adapter that
            no run can go on with.
    """
    file = next((place for place in (out, *out.parents) if place.exists() and not place.is_dir()), None)
    if file is not None:
        raise TrainingError(f"{file} is a file; give a folder for the run.")
    if not out.exists():
        return
    if (out / STATE).exists():
        if not resume:
            raise TrainingError(
                f"{out} holds a run already. Continue it with resume (--resume), or give another folder."
            )
        return
    if any((out / name).exists() for name in (CONFIG, FORMER_CONFIG, TRAINER_WEIGHTS)) and not _just_begun(out):
        raise TrainingError(
            f"{out} holds an adapter, and no state of a run that could go on ({STATE} is missing): a training there "
            "would replace it. Give another folder, or remove it."
        )
    if not resume and any(out.iterdir()):
        begun = " A run began there: continue it with resume (--resume)." if (out / ASKED).exists() else ""
        raise TrainingError(f"{out} is not empty.{begun} Give another folder, or remove it.")


def _just_begun(out: Path) -> bool:
    """Whether a run was stopped there between the adapter of its first epoch, which is written first, and its state."""
    try:
        return (out / ASKED).exists() and all(
            (read_config(folder).get("results") or {}).get("epoch") == 1
            for folder in (out, out / "last")
            if (folder / CONFIG).exists()
        )
    except CheckpointError:
        return False


def require_same_run(out: Path, state: RunState, identity: dict[str, Any], steps: int, model: TunedModel) -> None:
    """Refuses to go on with a run that was started differently.

    Args:
        out: the folder of the run.
        state: where it is.
        identity: ``run_identity`` of what is to go on with it.
        steps: of an epoch.
        model: that is trained.

    Raises:
        TrainingError: settings, data or model are others; says which.
        CheckpointError: the state does not say which run it is of.
    """
    done = state.epoch * steps + state.step
    follows = any(policy.follows_length for policy in model.policies)
    try:
        changed = identity_changes(state.identity, identity, done, steps, follows)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{out / STATE} does not say which run it is of ({error!r}). Start again with another folder."
        ) from error
    if changed:
        raise TrainingError(
            f"the run in {out} was started differently: {'; '.join(changed)}. Use the same options, or another folder."
        )


def require_continuable(
    out: Path,
    model: TunedModel,
    train_set: Any,
    settings: TrainSettings,
    teacher: nn.Module | None,
    val_set: Any,
) -> None:
    """As ``require_same_run``, for those who say something before they call ``fit`` with ``resume``.

    Args:
        out: the folder of the run; nothing is refused where there is none.
        model: as for ``fit``.
        train_set: as for ``fit``.
        settings: as for ``fit``.
        teacher: as for ``fit``.
        val_set: as for ``fit``.
    """
    if not (out / STATE).exists():
        return
    processes, data = launched_processes(), data_for(model, train_set, "the training set")
    chosen = None if val_set is None or settings.select == "last" else data_for(model, val_set, "the validation set")
    identity = run_identity(model, settings, data, processes, teacher, chosen)
    batches = len(data) / (settings.batch_size * processes)
    steps = math.floor(batches) if settings.drop_last else math.ceil(batches)
    require_same_run(out, RunState.read(out), identity, steps, model)


def run_alone(out: Path) -> AbstractContextManager[None]:
    """Keeps other processes out of the folder of a run."""
    return alone_in(
        out,
        TrainingError(f"another process is training in {out}. Wait for its end, stop it, or give another folder."),
    )


def require_own_adapter(model: TunedModel, state: RunState, out: Path) -> None:
    """Checks that the adapter in the folder of a run is the one that the run has saved there.

    Args:
        model: of the run.
        state: where the run is.
        out: its folder.

    Raises:
        CheckpointError: something else was saved over it, or it is gone.
    """
    if not state.best_epoch:
        return
    try:
        config = read_config(out)
        saved = read_weights(out, config)
    except CheckpointError as error:
        raise CheckpointError(f"the run in {out} cannot go on without the adapter that it saved: {error}") from error
    if (config.get("results") or {}).get("epoch") == state.epoch + 1:
        return  # the run ended between the adapter of an epoch and its state
    gates = {id(p) for gate in dispatchers(model.backbone).values() for p in gate.parameters()}
    for name, parameter in model.tuned_state().items():
        if id(parameter) in gates:  # saved as they are read, which differs from what is trained
            continue
        kept, found = state.best_tensors.get(file_name(name)), saved.get(model.backbone.saved_name(name))
        if kept is None or found is None or not torch.equal(kept, found):
            raise CheckpointError(
                f"the adapter in {out} is not the one that the run there has saved: something was saved over it since. "
                f"Train in another folder; or, if it is that adapter that you want, remove {STATE} and {ASKED} beside "
                f"{CONFIG}."
            )
