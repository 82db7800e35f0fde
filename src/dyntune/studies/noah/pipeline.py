"""Supernet, search and retraining in one folder; everything goes on where it was stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from torch.utils.data import DataLoader, Dataset

from dyntune.core.errors import CheckpointError, TrainingError, in_one_line
from dyntune.core.fields import Range
from dyntune.core.files import load_json, seal_holds, sealed, write_json
from dyntune.core.words import counted
from dyntune.model.tuned import TunedModel
from dyntune.parts.methods.noah import Noah, Selection, Subnet
from dyntune.studies import pictures
from dyntune.studies.noah.evolution import Candidate, SearchSettings, evolve, require_possible, winner
from dyntune.studies.noah.progress import SearchProgress, SilentSearch
from dyntune.training.accelerator import launched_processes
from dyntune.training.evaluate import as_tensors, evaluate
from dyntune.training.identity import ASKED, identity_changes, run_identity
from dyntune.training.interrupt import TrainingInterrupted, stop_requests
from dyntune.training.progress import Progress
from dyntune.training.randomness import caller_randomness_kept, seed_all
from dyntune.training.run_folder import require_room, run_alone
from dyntune.training.settings import TrainSettings
from dyntune.training.trainer import FitResult, fit

SEARCH = "search.json"
SUPERNET = "supernet"
_CACHED_BYTES = 2**30
"""Validation images up to this size are kept in memory, because every candidate is evaluated on them."""

Build = Callable[[Noah], TunedModel]
"""Puts the part on a fresh pretrained backbone with a new head for the data's classes."""


@dataclass(frozen=True)
class NoahResult:
    """What the whole procedure came to.

    Args:
        model: retrained, in eval mode.
        part: with the sizes that were found.
        fit: of the retraining.
        best: the candidate that was retrained; None where the sizes were given.
        seconds: time spent on supernet, search and retraining, earlier calls included.
    """

    model: TunedModel
    part: Noah
    fit: FitResult
    best: Candidate | None
    seconds: float


@dataclass(frozen=True)
class SearchResult:
    """What supernet and search came to.

    Args:
        best: the best candidate.
        candidates: all of them, in the order in which they were evaluated.
        seconds: time spent on both, earlier calls included.
    """

    best: Candidate
    candidates: tuple[Candidate, ...]
    seconds: float


def train_noah(
    part: Noah,
    build: Build,
    train: Dataset[Any],
    val: Dataset[Any],
    train_val: Dataset[Any],
    out: str | Path,
    settings: TrainSettings,
    *,
    supernet_epochs: Annotated[int, Range(1)] = 500,
    supernet_lr: float = 5e-4,
    search: SearchSettings | None = None,
    select_on: Dataset[Any] | None = None,
    progress: Callable[[str], Progress] | None = None,
    search_progress: Callable[[SearchSettings], SearchProgress] | None = None,
) -> NoahResult:
    """Trains a supernet, searches it, and trains what was found from the pretrained backbone on.

    ``out`` becomes the folder of that last run, as ``fit`` writes it; ``out/supernet`` is the supernet's, and
    ``search.json``, ``search.png`` and ``search.svg`` are the search's. Called again with the same arguments, it goes
    on where it was stopped, and comes to the same weights, bit for bit on a CPU. A part that has sizes is just trained.

    Args:
        part: the supernet, that is without sizes.
        build: makes a tuned model from a part, always from the same weights; called with the random numbers seeded.
        train: what the supernet is trained on.
        val: what candidates are evaluated on.
        train_val: what the found sub-network is trained on, usually both.
        out: the folder.
        settings: of the last training; the supernet's are the same but for the following two.
        supernet_epochs: passes of the supernet over its training images.
        supernet_lr: peak learning rate of the supernet.
        search: sizes and limits of the search.
        select_on: what the last training picks its epoch on; without it, it keeps the last one.
        progress: makes the display of a training from its title, which is ``noah supernet`` or ``noah``.
        search_progress: makes the display of the search.

    Raises:
        TrainingError: options do not make sense, ``out`` holds another run, or nothing is within the limits.
        TrainingInterrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    out = Path(out)
    found: SearchResult | None = None
    if not part.searched:
        require_no_other_run(out)
        supernet = _supernet_settings(settings, supernet_epochs, supernet_lr)
        found = search_noah(
            part, build, train, val, out, supernet, search, progress=progress, search_progress=search_progress
        )
        part = part.with_sizes(found.best.subnet)
    model = _built(build, part, settings.seed)
    display = progress("noah") if progress else False
    result = fit(
        model, train_val, select_on, out=out, resume=True, progress=display, calibrate=False, settings=settings
    )
    seconds = result.seconds + (found.seconds if found else 0.0)
    return NoahResult(model, part, result, found.best if found else None, seconds)


def require_no_other_run(out: Path) -> None:
    """Refuses a folder whose run did not begin with a search, before any work is done for it.

    Raises:
        TrainingError: it holds such a run, or is a file.
    """
    require_room(out, resume=True)
    if (out / ASKED).exists() and not (out / SEARCH).exists():
        raise TrainingError(f"{out} holds a run already, and no search. Give another folder, or remove it.")


def search_noah(
    part: Noah,
    build: Build,
    train: Dataset[Any],
    val: Dataset[Any],
    out: str | Path,
    settings: TrainSettings,
    search: SearchSettings | None = None,
    *,
    progress: Callable[[str], Progress] | None = None,
    search_progress: Callable[[SearchSettings], SearchProgress] | None = None,
) -> SearchResult:
    """Trains a supernet and searches it; see ``train_noah``.

    Args:
        settings: of the supernet's training.
    """
    if launched_processes() > 1:
        raise TrainingError("the search of noah runs in one process; start it without accelerate launch or torchrun.")
    if part.searched:
        raise TrainingError("noah has sizes already, so there is nothing to search; leave them out.")
    with run_alone(Path(out)):
        return _search(
            part, build, train, val, Path(out), settings, search or SearchSettings(), progress, search_progress
        )


def _search(
    part: Noah,
    build: Build,
    train: Dataset[Any],
    val: Dataset[Any],
    out: Path,
    settings: TrainSettings,
    search: SearchSettings,
    progress: Callable[[str], Progress] | None,
    search_progress: Callable[[SearchSettings], SearchProgress] | None,
) -> SearchResult:
    """``search_noah`` in a folder that is this process's own."""
    model = _built(build, part, settings.seed)
    width, space = model.backbone.blocks[0].width, part.space(len(model.backbone.blocks))
    require_possible(space, search, width)
    record = _Record(out / SEARCH, {**run_identity(model, settings, val, 1), **asdict(search)})
    display = progress("noah supernet") if progress else False
    try:
        trained = fit(
            model, train, out=out / SUPERNET, resume=True, progress=display, calibrate=False, settings=settings
        )
    except TrainingInterrupted:
        raise
    except TrainingError as error:
        raise TrainingError(f"supernet: {error}") from error
    score = _scorer(model, val, settings)
    found: list[Candidate] = []
    with stop_requests() as stop, search_progress(search) if search_progress else SilentSearch() as shown:
        for candidate in evolve(space, search, width, settings.seed, lambda subnet: record.score(subnet, score)):
            found.append(candidate)
            record.keep(candidate)
            shown.candidate(candidate, winner(found))
            if stop.is_set():
                raise TrainingInterrupted(
                    f"stopped after {counted(len(found), 'candidate')}, saved in {out}. Start the same again to go on."
                )
    figure = pictures.search_figure(found, search.limit, search.least)
    for suffix in (".png", ".svg"):
        pictures.save_figure(figure, out / f"search{suffix}")
    return SearchResult(winner(found), tuple(found), trained.seconds + record.seconds)


class _Record:
    """The candidates of a search on disk; the search itself is replayed, so they are all that it must remember.

    Raises:
        TrainingError: the file is of another search.
        CheckpointError: the file is damaged.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.identity = json.loads(json.dumps(identity))
        self.rows: list[dict[str, Any]] = []
        self.scores: dict[Subnet, float] = {}
        self.seconds = 0.0
        if not path.exists():
            self._write()
            return
        try:
            kept = load_json(path)
            if not seal_holds(kept):
                raise ValueError("digests differ")
            changed = identity_changes(kept["identity"], self.identity)
            self.rows, self.seconds = kept["candidates"], kept["seconds"]
            self.scores = {_subnet(row): row["accuracy"] for row in self.rows}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({in_one_line(error)}). Remove it to search again."
            ) from error
        if changed:
            raise TrainingError(
                f"the search in {path.parent} was started differently: {'; '.join(changed)}. Use the same options, or "
                f"another folder; a copy of {SUPERNET} in it saves training the supernet again."
            )

    def score(self, subnet: Subnet, evaluate: Callable[[Subnet], float]) -> float:
        """What a sub-network scored, or scores now."""
        if subnet in self.scores:
            return self.scores[subnet]
        began = time.perf_counter()
        score = evaluate(subnet)
        self.seconds += time.perf_counter() - began
        return score

    def keep(self, candidate: Candidate) -> None:
        """Writes a candidate down, unless it is there already."""
        if candidate.subnet not in self.scores:
            self.scores[candidate.subnet] = candidate.accuracy
            row = asdict(candidate)
            self.rows.append({**row.pop("subnet"), **row})
            self._write()

    def _write(self) -> None:
        kept = {"identity": self.identity, "seconds": self.seconds, "candidates": self.rows}
        write_json(self.path, sealed(kept))


def _subnet(row: dict[str, Any]) -> Subnet:
    return Subnet(tuple(row["prompts"]), tuple(row["ranks"]), tuple(row["bottlenecks"]))


def _supernet_settings(settings: TrainSettings, epochs: int, lr: float) -> TrainSettings:
    """The retraining's settings with another length and learning rate; the warm-up is as long, if there is room."""
    warmup = settings.warmup_epochs if settings.warmup_epochs is None else min(settings.warmup_epochs, epochs)
    return replace(
        settings,
        epochs=epochs,
        lr=lr,
        min_lr=min(settings.min_lr, lr),
        warmup_lr=min(settings.warmup_lr, lr),
        warmup_epochs=warmup,
        cooldown_epochs=0,
        select="last",
    )


def _built(build: Build, part: Noah, seed: int) -> TunedModel:
    """The model, with initial values that depend on the seed alone."""
    with caller_randomness_kept():
        seed_all(seed)
        return build(part)


def _scorer(model: TunedModel, val: Dataset[Any], settings: TrainSettings) -> Callable[[Subnet], float]:
    """Accuracy of a sub-network of ``model`` on the validation images."""
    images = as_tensors(val, model)
    loader: Any = DataLoader(images, settings.batch_size, num_workers=settings.workers)
    if len(images) * images[0][0].nbytes <= _CACHED_BYTES:
        loader = list(loader)
    selection: Selection = model.backbone.shared["noah"]  # type: ignore[assignment]

    def score(subnet: Subnet) -> float:
        selection.set_subnet(subnet)
        return evaluate(model, loader, count_macs=False).accuracy

    return score
