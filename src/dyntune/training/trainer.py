"""The training loop: one for every method, data set and number of processes, on Hugging Face Accelerate."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from dyntune.core.errors import CheckpointError, DivergenceError, TrainingError
from dyntune.core.files import write_json
from dyntune.core.limits import limits_named
from dyntune.core.words import counted
from dyntune.model.activation import activation_rates
from dyntune.model.objective import Criterion, look_at_units, training_loss
from dyntune.model.rates import dispatchers
from dyntune.model.tuned import TunedModel, require_tuned
from dyntune.model.worth import IMAGES
from dyntune.training.accelerator import apart, make_accelerator
from dyntune.training.calibration import after_training, calibrate_run, wanted_calibration
from dyntune.training.checkpoint import Checkpoint
from dyntune.training.closed_gates import ClosedGate, closed_gates
from dyntune.training.evaluate import Evaluation, as_tensors, evaluate
from dyntune.training.header import training_header
from dyntune.training.identity import ASKED, run_identity
from dyntune.training.inputs import data_for, require_labels, require_matching_head, training_images
from dyntune.training.interrupt import TrainingInterrupted, stop_requests
from dyntune.training.logs import RunLog
from dyntune.training.optimizer import make_optimizer, pretrained_parameters, set_learning_rate
from dyntune.training.progress import Progress, ProgressBar, Silent, display
from dyntune.training.randomness import EpochSampler, SeededDataset, caller_randomness_kept, seed_all
from dyntune.training.run_folder import require_room, run_alone
from dyntune.training.seen import Seen
from dyntune.training.settings import TrainSettings
from dyntune.training.state import STATE
from dyntune.training.teacher import ready_teacher, warn_about_teacher

log = logging.getLogger("dyntune")
ACTIVATION = "val_activation"
"""What a saved adapter calls the share of the patches that its gates computed on the validation split."""
_ADVICE = "Try a tenth of the learning rate, clip_norm=1, a longer warm-up, or fp32 or bf16 instead of fp16."


@dataclass(frozen=True)
class FitResult:
    """What a run came to.

    Args:
        best_accuracy: accuracy, or the figure of merit of another task, of the saved epoch on the split that picked it;
            None without such a split.
        best_epoch: the saved epoch, counted from 1.
        steps: steps of the whole run.
        seconds: time spent on the run, evaluation and earlier calls included.
        closed: gates that have closed although the model needs what is behind them; a warning says so too.
    """

    best_accuracy: float | None
    best_epoch: int
    steps: int
    seconds: float
    closed: tuple[ClosedGate, ...] = ()

    def __repr__(self) -> str:
        best = "" if self.best_accuracy is None else f"best {self.best_accuracy:.2%} in "
        return f"FitResult({best}epoch {self.best_epoch}, {self.steps:,} steps, {self.seconds:.0f} s)"


def fit(
    model: TunedModel,
    train_set: Dataset[Any],
    val_set: Dataset[Any] | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | bool | None = None,
    calibrate: bool | Dataset[Any] | None = True,
    settings: TrainSettings | None = None,
    teacher: nn.Module | None = None,
    **options: Any,
) -> FitResult:
    """Trains a tuned model in place; afterwards it holds the weights of the best epoch and is in eval mode.

    With ``out``, the folder holds the adapter of the best epoch (for ``load``), that of the last one in ``last``,
    ``log.jsonl``, TensorBoard files, which images the run has seen, and the state that ``resume`` continues from: a run
    that was stopped at any moment comes to the same weights, bit for bit on a CPU, as one that was not.

    Args:
        model: from ``tune``.
        train_set: a data set that is read by index and gives (image, target) pairs, for classification (image, label);
            PIL images are preprocessed as the backbone expects, tensors must be. Parts of data sets, torchvision's,
            and those of Hugging Face with an image and a label in each row do too.
        val_set: what the best epoch is picked on; without it the last epoch is kept.
        out: the run's folder; None keeps nothing on disk.
        resume: continue what ``out`` holds, or start if there is nothing.
        progress: shows what goes on: True or False, or what is told of it. By default a bar, or a line for each epoch,
            appears in a terminal or a notebook and nothing elsewhere.
        calibrate: whether learned gates are calibrated at the end, so that ``set_rate`` can choose other rates; or the
            images to do that on, by default those of ``val_set`` or else of ``train_set``. It is saved with the run; a
            complete run that is resumed keeps what it has, unless other images are given. None is False.
        settings: all options at once.
        teacher: a model of the same task, tuned or a plain backbone, for policies that learn from one (DynamicViT);
            others ignore it. It is moved to the device, put into eval mode, never trained and not saved. Without it
            the loss of those policies lacks its distillation terms, which a warning says.
        options: single options of ``TrainSettings``, for instance ``epochs=10, lr=1e-3``.

    Raises:
        DataError: a data set is of no such kind, or a label is not one of the classes.
        DivergenceError: the loss, or a trained tensor, is not finite.
        TrainingError: options do not make sense, or ``out`` holds another run.
        TrainingInterrupted: Ctrl-C or SIGTERM; the state is saved, where ``out`` is given.
    """
    require_tuned(model, "fit")
    if settings is not None and options:
        raise TrainingError("give settings=... or single options, not both.")
    chosen = settings or TrainSettings.of(**options)
    folder = None if out is None else Path(out).expanduser()
    wanted = wanted_calibration(model, calibrate, train_set if val_set is None else val_set)
    shown = display(progress, model.spec)
    with apart(), limits_named():
        run = _Run(model, train_set, val_set, folder, chosen, shown, teacher)
        # A caller with a display of its own says it there; who asked for nothing hears nothing.
        if run._main and (progress is None or progress is True):
            header = training_header(model, train_set, val_set, chosen)
            if isinstance(shown, ProgressBar):
                shown.say(str(header))
            for warning in () if isinstance(shown, ProgressBar) else header.warnings:
                log.warning("%s", warning)
        result = run.train(resume)
        closed = run.look_at_gates(wanted) if run._main else ()
        model.calibration, closed = broadcast_object_list([model.calibration, closed])
        return replace(result, closed=closed)


class _Step(nn.Module):
    """One training step's forward as a single call, which is what distributed wrappers need."""

    teacher: nn.Module | None

    def __init__(self, model: TunedModel, criterion: Criterion, teacher: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion
        # Not registered: it is not trained, keeps its mode, and no wrapper shall wait for its gradients.
        object.__setattr__(self, "teacher", teacher)

    def forward(self, images: Tensor, targets: Tensor, epoch: float, step: int) -> dict[str, Any]:
        loss = training_loss(self.model, images, targets, self.criterion, teacher=self.teacher, epoch=epoch, step=step)
        return {
            "total": loss.total,
            "terms": {name: term.detach() for name, term in loss.terms.items()},
            "logits": loss.output.logits.detach(),
            "activation": activation_rates(loss.output.gates),
        }


class _Run:
    """One call of ``fit``."""

    def __init__(
        self,
        model: TunedModel,
        train_set: Any,
        val_set: Any,
        out: Path | None,
        settings: TrainSettings,
        progress: Progress,
        teacher: nn.Module | None,
    ) -> None:
        self.model, self.out, self.settings = model, out, settings
        train_set = data_for(model, train_set, "the training set")
        val_set = None if val_set is None else data_for(model, val_set, "the validation set")
        require_matching_head(model, train_set)
        # A run that goes on is compared with how it began first.
        self.look_at_labels = functools.partial(require_labels, model, train_set, val_set)
        if out is None or not (out / STATE).exists():
            self.look_at_labels()
        self._require_savable()
        self.select = settings.select if val_set is not None else "last"
        self.images = (train_set, None if self.select == "last" else val_set)
        self.accelerator = make_accelerator(settings)
        self.progress = progress if self._main else Silent()
        size = len(train_set)
        if not size:
            raise TrainingError("the training set is empty.")
        world = self.accelerator.num_processes
        if settings.drop_last and size < settings.batch_size * world:
            raise TrainingError(
                f"drop_last leaves no step: {counted(size, 'training image')}, {settings.batch_size * world} per step. "
                "Use smaller batches, or do without drop_last."
            )
        multiple = settings.batch_size * world if world > 1 or settings.drop_last else 1
        self.sampler = EpochSampler(size, settings.seed, multiple, drop=settings.drop_last)
        self.held_out: Dataset[Any] = train_set if val_set is None else val_set
        self.data = SeededDataset(training_images(train_set, model, settings), settings.seed)
        loader = DataLoader(
            self.data,
            batch_size=settings.batch_size,
            sampler=self.sampler,
            num_workers=settings.workers,
            generator=torch.Generator(),  # of its own, so that starting workers draws nothing from the global one
            pin_memory=self.accelerator.device.type == "cuda",
        )
        self.val_loader: DataLoader[Any] | None = None
        if val_set is not None:
            images = as_tensors(val_set, model)
            share = range(self.accelerator.process_index, len(images), world)
            self.val_loader = DataLoader(Subset(images, share), settings.batch_size, num_workers=settings.workers)
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise TrainingError("nothing to train: every parameter is frozen. Leave requires_grad as tune() set it.")
        model.to(self.accelerator.device)  # before the optimiser makes tensors of its own
        optimizer = make_optimizer(trained, settings, pretrained_parameters(model.backbone))
        if self._main:
            warn_about_teacher(model, teacher)
        teacher = ready_teacher(model, teacher, self.accelerator.device)
        criterion = functools.partial(model.task.loss, settings=settings)
        self.step_module, self.optimizer, self.loader = self.accelerator.prepare(
            _Step(model, criterion, teacher), optimizer, loader
        )
        self.steps_per_epoch = len(self.loader)
        self.gated = bool(dispatchers(model.backbone))
        identity = run_identity(model, settings, train_set, world, teacher, self.images[1])
        self.checkpoint = Checkpoint(model, self.optimizer, self.accelerator.scaler, identity)

    def train(self, resume: bool) -> FitResult:
        with caller_randomness_kept(), self._checkpointing(), self._course(), self._alone():
            epoch, step = self._begin(resume)
            if step or epoch:
                self.look_at_labels()
            if epoch == self.settings.epochs and self._main:
                log.warning("the run in %s is complete: there is nothing to train", self.out)
            # Thresholds that were shifted, and the shifts, belong to the weights that training leaves behind.
            self.model.set_rate(None)
            self.model.calibration = None
            self.started = time.perf_counter() - self.checkpoint.seconds
            written = RunLog(self.out, epoch * self.steps_per_epoch + step) if self.out and self._main else None
            try:
                with stop_requests() as stop, self.progress:
                    if not (step or epoch):
                        self._look_at_units()
                    for current in range(epoch, self.settings.epochs):
                        self._epoch(current, step if current == epoch else 0, written, stop)
                        if self._agreed(stop.is_set()):
                            if current + 1 == self.settings.epochs:
                                self._finish()
                            raise TrainingInterrupted(self._farewell(current + 1, 0))
            finally:
                if written:
                    written.close()
            self._finish()
            seconds = time.perf_counter() - self.started if epoch < self.settings.epochs else self.checkpoint.seconds
        return FitResult(
            best_accuracy=self.checkpoint.best if math.isfinite(self.checkpoint.best) else None,
            best_epoch=self.checkpoint.best_epoch,
            steps=self.settings.epochs * self.steps_per_epoch,
            seconds=seconds,
        )

    def _look_at_units(self) -> None:
        """Lets policies look at the model before the first step."""
        self.model.train()
        with self.accelerator.autocast():
            look_at_units(self.model, functools.cache(self._first_images))

    def _first_images(self) -> Tensor:
        """Those that the first steps will show, more than a small batch holds."""
        # Looking keeps no graph, so that four batches, each image twice, take less memory than a step keeps of one.
        # With gradient checkpointing a step keeps less, but which images are looked at decides the weights.
        first = itertools.islice(self.sampler, min(IMAGES, 4 * self.settings.batch_size))
        return torch.stack([self.data[index][0] for index in first]).to(self.accelerator.device)

    def _finish(self) -> None:
        """Gives the model the weights of the best epoch."""
        self.checkpoint.restore_best()
        self.model.eval()

    def look_at_gates(self, calibrate: bool | Dataset[Any]) -> tuple[ClosedGate, ...]:
        """After the training: tells of gates that have closed, which it gives, and calibrates them.

        Args:
            calibrate: see ``wanted_calibration``.
        """
        closed: tuple[ClosedGate, ...] = ()
        batch_size = min(32, self.settings.batch_size)  # what is known to fit
        with after_training("nobody has looked whether gates have closed"):
            closed = closed_gates(self.model, self.held_out, batch_size)
        for gate in closed:
            log.warning("%s", gate)
        if calibrate is not False:
            images, again = (self.held_out, False) if calibrate is True else (calibrate, True)
            with after_training("the gates are not calibrated, so that set_rate needs images"):
                calibrate_run(self.model, images, self.out, self.progress, batch_size, again=again)
        return closed

    @contextmanager
    def _course(self) -> Iterator[None]:
        """Tells the model's modules how far the training goes, and that it is over."""
        settings = self.settings
        updates = settings.epochs * math.ceil(self.steps_per_epoch / settings.accumulate)
        # Steps of SGD have the size of the gradients, so that nobody can say how far they go.
        travel = settings.lr * updates if settings.optimizer == "adamw" else None
        self.model.backbone.begin_training(settings.epochs * self.steps_per_epoch, travel)
        try:
            yield
        finally:
            self.model.end_training()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps other processes out of the run's folder."""
        if self.out is None or not self._main or (self.out.exists() and not self.out.is_dir()):
            yield
            return
        with run_alone(self.out):
            yield

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """Gradient checkpointing where the settings ask for it; afterwards the backbone's switch is as it was."""
        backbone = self.model.backbone
        before = backbone.gradient_checkpointing
        backbone.switch_gradient_checkpointing(before or self.settings.gradient_checkpointing)
        try:
            yield
        finally:
            backbone.switch_gradient_checkpointing(before)

    @property
    def _main(self) -> bool:
        return self.accelerator.is_main_process

    def _require_savable(self) -> None:
        """Refuses to train into a folder what could not be saved there; without one, says so."""
        try:
            self.model.require_savable()
        except CheckpointError as error:
            if self.out is not None:
                raise TrainingError(f"what is trained could not be saved: {error}") from error
            log.warning("what is trained cannot be saved: %s", error)

    def _begin(self, resume: bool) -> tuple[int, int]:
        """Where to start: epoch and step in it; fills model and optimiser when there is something to resume."""
        if self.out is None:
            if resume:
                raise TrainingError("resume needs the folder of the run: give out=FOLDER.")
            return 0, 0
        require_room(self.out, resume)
        started = (self.out / STATE).exists()
        self.accelerator.wait_for_everyone()  # every process has looked before one of them writes
        if not started:
            if self._main:
                write_json(self.out / ASKED, self.checkpoint.identity)
                Seen.by(*self.images).write(self.out)
            return 0, 0
        return self.checkpoint.resume(self.out, self.settings.epochs, self.steps_per_epoch)

    def _epoch(self, epoch: int, first: int, log: RunLog | None, stop: threading.Event) -> None:
        settings, accelerator, task = self.settings, self.accelerator, self.model.task
        self.sampler.epoch = self.data.epoch = epoch
        self.sampler.skip = first * settings.batch_size * accelerator.num_processes
        self.step_module.train()
        self.progress.epoch(epoch, settings.epochs, self.steps_per_epoch, first)
        began = time.perf_counter()
        batches = (
            self.loader if first < self.steps_per_epoch else ()
        )  # stopped between the last step and its evaluation
        for step, (images, targets) in enumerate(batches, start=first):
            seed_all(settings.seed, epoch, 0, step, accelerator.process_index)
            steps = epoch * self.steps_per_epoch + step
            done = epoch + step / self.steps_per_epoch
            lr = settings.learning_rate(done, self.steps_per_epoch)
            set_learning_rate(self.optimizer, lr)
            images, mixed = task.mix(images, targets, self.model.backbone.classes, settings)
            with accelerator.accumulate(self.step_module):
                result = self.step_module(images, mixed, done, steps)
                self._require_finite(result, epoch, step, lr)
                accelerator.backward(result["total"] * self._window_share(step))
                if accelerator.sync_gradients and settings.clip_norm is not None:
                    accelerator.clip_grad_norm_(self.step_module.parameters(), settings.clip_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            figures = {
                "loss": float(result["total"].detach()),
                **{f"loss_{name}": float(term) for name, term in result["terms"].items()},
                task.merit: task.score(result["logits"], targets),
                **({"activation": float(result["activation"].mean())} if len(result["activation"]) else {}),
                "images_per_second": len(images) * accelerator.num_processes / (time.perf_counter() - began),
            }
            began = time.perf_counter()
            self.progress.step(figures)
            if log and (steps + 1) % settings.log_every == 0:
                log.write("train", steps + 1, {"epoch": epoch + 1, "lr": lr, **figures})
            # Only between two updates: gradients that wait for an update are not part of the state.
            if accelerator.sync_gradients and self._agreed(stop.is_set()):
                self._require_finite_weights(epoch)
                self._write_state(epoch, step + 1)
                raise TrainingInterrupted(self._farewell(epoch, step + 1))
        self._finish_epoch(epoch, log)

    def _window_share(self, step: int) -> float:
        """Factor on the loss of an epoch's last window of accumulated steps, which may be shorter than the others."""
        window = self.settings.accumulate
        return window / min(window, self.steps_per_epoch - step // window * window)

    def _agreed(self, mine: bool) -> bool:
        """Whether any process says yes; all of them must ask at the same point."""
        if self.accelerator.num_processes == 1:
            return mine
        votes = torch.tensor([float(mine)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(votes, "sum").item())

    def _finish_epoch(self, epoch: int, log: RunLog | None) -> None:
        """Evaluates if it is time, keeps the epoch if it is the best so far (of equals, the later one), and saves."""
        self._require_finite_weights(epoch)
        score: float | None = None
        skipping: dict[str, float] = {}
        due = (epoch + 1) % self.settings.eval_every == 0 or epoch + 1 == self.settings.epochs
        if self.val_loader is not None and due:
            evaluation = self._evaluate()
            score = evaluation.score
            if not math.isfinite(score):
                raise TrainingError(
                    f"{self.model.task.merit}, by which {self.model.task.name} picks the epoch, is {score:g}. Epochs "
                    "cannot be compared by that: have the task's metric give a finite figure, or give no validation "
                    "images."
                )
            if self.gated:
                skipping = {ACTIVATION: round(evaluation.activation, 6)}
            self.progress.evaluated(evaluation)
            if log:
                figures = {**evaluation.figures, "activation": evaluation.activation}
                log.write("val", (epoch + 1) * self.steps_per_epoch, {"epoch": epoch + 1, **figures})
        merit = f"val_{self.model.task.merit}"
        measured = {"epoch": epoch + 1, **({} if score is None else {merit: round(score, 6)}), **skipping}
        # Before, a policy may still do more than it will do in the end: such an epoch is not what was asked for.
        settled = (epoch + 1) / self.settings.epochs >= max((p.settles for p in self.model.policies), default=0.0)
        best_so_far = score is not None and score >= self.checkpoint.best
        if self.val_loader is None or self.select == "last" or best_so_far or not settled:
            self.checkpoint.keep(epoch + 1, score if settled else None)
            if self.out and self._main:
                self.model.save(self.out, measured, overwrite=True)
        if self.out and self._main:
            self.model.save(self.out / "last", measured, overwrite=True)
        self._write_state(epoch + 1, 0)
        if self.out:
            self.progress.saved(epoch + 1, self.out)

    def _evaluate(self) -> Evaluation:
        """This process's share of the validation images, put together with the others'."""
        loader = cast("DataLoader[Any]", self.val_loader)
        metric = self.model.task.metric(self.model.backbone.classes)
        own: Evaluation | None = None
        if len(loader.dataset):  # type: ignore[arg-type]
            with self.accelerator.autocast():
                own = evaluate(self.model, loader, count_macs=False, metric=metric)
        if self.accelerator.num_processes == 1:
            if own is None:
                raise TrainingError("the validation set is empty.")
            return own
        counted = [own.images, own.activation * own.images] if own else [0, 0]
        sums = torch.cat([torch.tensor(counted, dtype=metric.sums.dtype), metric.sums]).to(self.accelerator.device)
        sums = self.accelerator.reduce(sums, "sum").cpu()
        images, active = sums[:2].tolist()
        metric.sums = sums[2:]
        return Evaluation(int(images), metric.figures(), active / images, {}, None, merit=self.model.task.merit)

    def _require_finite(self, result: dict[str, Any], epoch: int, step: int, lr: float) -> None:
        if not self._agreed(not bool(torch.isfinite(result["total"]))):
            return
        terms = ", ".join(f"{name} {float(term):g}" for name, term in result["terms"].items())
        kept = f"The last good checkpoint is in {self.out}. " if self.out and (self.out / STATE).exists() else ""
        raise DivergenceError(
            f"the loss is not finite ({terms}) in epoch {epoch + 1}, step {step + 1}, at learning rate {lr:g}. "
            f"{kept}{_ADVICE}"
        )

    def _require_finite_weights(self, epoch: int) -> None:
        """Refuses to save weights that an update has spoilt, so that what is on disk stays good."""
        spoilt = [name for name, p in self.model.tuned_state().items() if not bool(torch.isfinite(p).all())]
        if self._agreed(bool(spoilt)):
            kept = f"The last good checkpoint is in {self.out}. " if self.out and (self.out / STATE).exists() else ""
            where = spoilt[0] if spoilt else "another process's weights"
            raise DivergenceError(f"{where} is not finite after an update in epoch {epoch + 1}. {kept}{_ADVICE}")

    def _write_state(self, epoch: int, step: int) -> None:
        if self.out and self._main:
            self.checkpoint.write(self.out, epoch, step, time.perf_counter() - self.started)

    def _farewell(self, epoch: int, step: int) -> str:
        where = f"stopped in epoch {epoch + 1} after step {step} of {self.steps_per_epoch}"
        if epoch == self.settings.epochs:
            where = "stopped behind the last epoch: the weights are those of the best, the gates are not calibrated"
        return f"{where}; the state is saved in {self.out}: resume goes on from it." if self.out else f"{where}."
