"""The folder of a run: whether a training may begin or go on there, alone, and whether its adapter is the run's own."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import torch

from dyntune.backbones.base import file_name
from dyntune.core.errors import CheckpointError, TrainingError
from dyntune.core.files import alone_in
from dyntune.model.adapter_folder import ASKED, CONFIG, STATE, read_config, read_weights
from dyntune.model.rates import dispatchers
from dyntune.model.tuned import TunedModel
from dyntune.training.state import RunState


def require_room(out: Path, resume: bool) -> None:
    """Refuses a folder in which no training can begin, or go on, before any work is done for it.

    Args:
        out: the folder of the run.
        resume: whether what it holds is to be continued.

    Raises:
        TrainingError: it is a file, or holds a run or something else that is not to be continued.
    """
    if out.exists() and not out.is_dir():
        raise TrainingError(f"{out} is a file; give a folder for the run.")
    if resume or not out.exists():
        return
    if (out / STATE).exists():
        raise TrainingError(f"{out} holds a run already. Continue it with resume (--resume), or give another folder.")
    if any(out.iterdir()):
        begun = " A run began there: continue it with resume (--resume)." if (out / ASKED).exists() else ""
        raise TrainingError(f"{out} is not empty.{begun} Give another folder, or remove it.")


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
