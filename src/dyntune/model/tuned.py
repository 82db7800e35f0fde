"""A backbone with tuning methods and token policies on it: what ``tune`` returns and ``load`` gives back."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset

from dyntune.backbones.base import Backbone
from dyntune.backbones.hooks import warn_of_unheard
from dyntune.backbones.hosts import checked_origin, not_tuned, weights_fingerprint, wrap
from dyntune.backbones.origin import BackboneSource
from dyntune.backbones.owners import claim, release, require_free
from dyntune.core.errors import BackboneError, CheckpointError, DyntuneError, SpecError, in_one_line
from dyntune.core.texts import listed
from dyntune.core.tokens import Tokens
from dyntune.core.words import counted
from dyntune.data.transforms import Preprocessing
from dyntune.model.adapter_folder import require_no_run, write_adapter
from dyntune.model.assembly import install, settled
from dyntune.model.calibrate import set_rate
from dyntune.model.executions import Compact, Execution, Masked, Sampled
from dyntune.model.folding import fold
from dyntune.model.forward import run
from dyntune.model.hub import HubModel
from dyntune.model.macs import Trace, trace
from dyntune.model.rates import Calibration
from dyntune.model.state import TunedState, kept_buffers
from dyntune.model.tasks import Classification, Task
from dyntune.model.timm_methods import TimmMethods
from dyntune.parts.methods.base import TuningMethod
from dyntune.parts.policies.base import Output
from dyntune.parts.policies.gating import gating
from dyntune.parts.registry import expand
from dyntune.parts.spec import Part, format_spec

log = logging.getLogger("dyntune")

ExecutionName = Literal["masked", "compact"]
_EXECUTIONS: dict[str, Execution] = {"masked": Masked(), "compact": Compact()}
_TRAINING, _INFERENCE = Sampled(), _EXECUTIONS["compact"]


class TunedModel(TimmMethods, HubModel):
    """A pretrained model with tuning methods and token policies installed; made by ``tune`` or ``load``.

    In train mode what gates skip is computed too, or a share of it (``explore`` of ``dispatch``), so that the gates
    learn; in eval mode it is not. Both give the same logits.

    Args:
        host: the pretrained model; it is adapted in place.
        parts: tuning methods, token policies and presets, in the order in which they are installed.

    Attributes:
        parts: the parts as they are installed: in place of one that searches its settings, what it has found.
        task: what the outputs mean and how they are learned.
        classes: names of the classes in label order, or None if not known.
        preprocessing: what images must go through before they reach the model.
        dense_macs: MACs per image of the untouched backbone without its head.
        dense_block_macs: the share of each block in them.
        fingerprint: digest of the untouched backbone's weights without its head; None without weights (meta device).
        calibration: thresholds for other activation rates, from ``dyntune.calibrate``; saved with the adapter.
        unmerged: after ``merge``, what could not be folded, by spec, with the reason; None before.
    """

    from_pretrained: ClassVar[Callable[..., TunedModel]]
    """``from_pretrained(folder or hub repository, ...)``: set where it is defined, in ``model/load.py``."""

    def __init__(self, host: nn.Module, parts: Sequence[Part]) -> None:
        super().__init__()
        require_free(host)
        self.backbone = wrap(host)
        plain = self.backbone.plain()
        called: set[nn.Module] = set()
        dense = _traced(plain, called)
        warn_of_unheard(plain.host, called)
        if len(dense.logits) == 2 and any(True for head in self.backbone.heads for _ in head.parameters()):
            self.backbone.outputs = dense.logits[-1]
        self.dense_macs, self.dense_block_macs = dense.macs, dense.block_macs
        self.fingerprint = weights_fingerprint(plain, self.backbone.adopted)
        adopted = {id(p) for p in self.backbone.adopted}
        # Those of the host's own that PEFT trains, such as biases, are still the published ones.
        whole = adopted.isdisjoint(map(id, plain.parameters()))
        self._published = self.fingerprint if whole else weights_fingerprint(plain, ())
        self._origin = plain.origin()
        self._origin.remember()
        self._origin_checked = False
        self.preprocessing: Preprocessing = plain.preprocessing()
        self.task: Task = Classification()
        names = plain.class_names
        # A classifier that was replaced has other outputs than its configuration has names.
        self._classes = None if names is None or plain.classes != len(names) else names
        self.parts = settled(host, parts, self.dense_macs)
        self.methods = tuple(part for part in expand(self.parts) if isinstance(part, TuningMethod))
        self.policies = install(self.backbone, self.parts)
        self._state = TunedState(self.backbone)
        self.calibration: Calibration | None = None
        self.unmerged: dict[str, str] | None = None
        self._missed = False
        claim(self, self.backbone)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes in label order, or None if not known."""
        return self._classes

    @classes.setter
    def classes(self, names: Sequence[str] | None) -> None:
        if isinstance(names, str | Mapping):
            raise SpecError(
                f"classes is a {type(names).__name__}: expected a list of names in the order of their labels, such as "
                "['cat', 'dog'], or None."
            )
        names = None if names is None else tuple(names)
        odd = next((name for name in names or () if not isinstance(name, str)), None)
        if odd is not None:
            raise SpecError(
                f"a class is called {odd!r}, a {type(odd).__name__}: expected a text for each class, such as "
                "[str(name) for name in names]."
            )
        self._classes = names
        if names is not None and self.backbone.config is not None:
            self.config.id2label = dict(enumerate(names))
            self.config.label2id = {name: number for number, name in enumerate(names)}

    @property
    def backbone_name(self) -> str | None:
        """The name by which the backbone can be built; None where there is none. It says nothing of its weights."""
        return self._origin.name

    @property
    def origin(self) -> BackboneSource:
        """Where the backbone and its weights come from; looked into when it is asked for the first time.

        For a backbone that Dyntune has not built itself that takes as long as building it.
        """
        if not self._origin_checked:
            self.origin = checked_origin(self._origin, self.backbone.plain().host, self._published)
            self.origin.remember()
        return self._origin

    @origin.setter
    def origin(self, source: BackboneSource) -> None:
        self._origin, self._origin_checked = source, True

    @property
    def spec(self) -> str:
        """The parts as one spec string, for instance ``dyt:rate=0.7``."""
        return "+".join(format_spec(part) for part in self.parts)

    def __repr__(self) -> str:
        head = self.backbone.head_parameters()
        trained, of_head = (
            sum(p.numel() for name, p in self.tuned_state().items() if (name in head) == wanted)
            for wanted in (False, True)
        )
        known = [f"{trained:,} trained parameters and {of_head:,} of the head"]
        if self.classes:
            known.append(f"{len(self.classes)} classes: {listed(self.classes)}")
        elif self.backbone.classes:
            known.append(f"{self.backbone.classes} classes without names")
        if self.calibration is not None:
            known.append(f"calibrated for rates from {self.calibration.rates[0]:g} to {self.calibration.rates[-1]:g}")
        known += ["merged"] if self.unmerged is not None else []
        backbone = self.backbone_name or type(self.backbone.host).__name__
        return f"TunedModel({self.spec} on {backbone}: {'; '.join(known)})"

    @property
    def target_rate(self) -> float:
        """Share of patches that gated units are meant to compute, the mean over those units; 1 without gates."""
        gated = ((unit, gating(self.policies, unit)) for unit in self.backbone.all_units())
        rates = [policy.target_rate(unit) for unit, policy in gated if policy is not None]
        return sum(rates) / len(rates) if rates else 1.0

    def set_rate(self, rate: float | None, data: Dataset[Any] | Tensor | None = None) -> None:
        """Chooses the share of patches that gated units compute, without training: shifts the gates' thresholds.

        Threads may call it, and run the model meanwhile: images on their way may meet old thresholds in front and new
        ones behind.

        Args:
            rate: mean over the gated units, between 0 (no patch) and 1 (all); None for the trained thresholds.
            data: images to calibrate on for this call: ``(N, 3, height, width)``, preprocessed, or a data set of
                (image, label). Without it ``calibration`` is used; 0, 1 and None need neither.

        Raises:
            SpecError: the model has no learned gates, or is not calibrated for this rate.
        """
        set_rate(self, rate, data)

    def begin_training(self, steps: int, lr: float | None, accumulate: int = 1) -> None:
        """Tells a training loop of your own, before its first step, to what follows the course of the whole training.

        ``fit`` does so itself. Without it the gates of ``dispatch`` start alike, learn at the pace of the learning
        rate, and are trained towards their rate from the first step, with noise to the last, which short trainings do
        not always survive; and ``complete_every`` needs ``training_loss(..., step=n)``.

        Args:
            steps: how often ``training_loss`` will be called in train mode.
            lr: peak learning rate of Adam or its kin; None for others, whose steps depend on the size of gradients.
            accumulate: calls per change of the weights.
        """
        if not all(isinstance(count, Integral) and count >= 1 for count in (steps, accumulate)):
            raise SpecError(
                f"expected whole numbers of at least 1 as steps and accumulate; given {steps!r} and {accumulate!r}."
            )
        if lr is not None and not (isinstance(lr, Real) and 0 < lr < math.inf):
            raise SpecError(f"expected a peak learning rate above 0, or None where it says nothing; given {lr!r}.")
        # Thresholds that were shifted, and the shifts, belong to the weights that there are.
        self.set_rate(None)
        self.calibration = None
        self.backbone.begin_training(steps, None if lr is None else lr * math.ceil(steps / accumulate))

    def end_training(self) -> None:
        """Tells that the training is over, after its last step; another may begin."""
        self.backbone.end_training()

    def run(
        self,
        images: Tensor,
        *,
        complete: bool = False,
        execution: ExecutionName | Execution | None = None,
        watch: Callable[[Tokens], None] | None = None,
    ) -> Output:
        """One forward pass with everything that it decided.

        Args:
            images: ``(B, 3, height, width)``, preprocessed.
            complete: computes every token, ignoring the policies (DyT's "complete model").
            execution: ``"masked"``, ``"compact"``, or an execution of your own; by default compact in eval mode, and
                in train mode masked, with fewer tokens where a policy explores.
            watch: called with the tokens that enter the first block, and with those that leave each.
        """
        how = execution or (_TRAINING if self.training else _INFERENCE)
        if not isinstance(how, Execution):
            if how not in _EXECUTIONS:
                raise SpecError(f"execution must be one of {', '.join(_EXECUTIONS)}; given {how!r}.")
            how = _EXECUTIONS[how]
        return run(self.backbone, () if complete else self.policies, images, how, watch)

    def features(self, images: Tensor) -> Tensor:
        """Features of every image patch behind the last norm, for dense tasks: ``(B, C, rows, columns)``.

        Patches that were merged share the features of their token. A host with stages has features of the last one's
        cells, fewer rows and columns.

        Raises:
            DyntuneError: a policy has dropped patches.
        """
        tokens = self.run(images).tokens
        assert tokens is not None  # run() gives them
        return tokens.on_grid()

    def tuned_state(self) -> dict[str, Tensor]:
        """The trained tensors, by name: those of the methods, and whatever else requires a gradient. Not copied."""
        return self._state.trained()

    def course_tensors(self) -> dict[str, Tensor]:
        """What training changes, by name: the trained tensors, and statistics that modules keep. Not copied."""
        return self.tuned_state() | dict(kept_buffers(self.backbone))

    def extra_state(self) -> dict[str, Tensor]:
        """What has been changed, or is trained, beside the methods: unfrozen tensors, replaced weights, statistics.

        Tensors that PyTorch counts no change of since they were compared last are not read again. It does not count
        what is done to ``tensor.data``, which ``save`` therefore looks for, outside of a training.
        """
        return self._state.extra()

    def adopt(self, extra: dict[str, bool]) -> None:
        """Counts tensors among what is trained and saved that the methods would leave as they are.

        Args:
            extra: whether a gradient trains them, by their names in files.

        Raises:
            CheckpointError: there is no such tensor.
        """
        self._state.adopt(extra)

    def named_in_files(self) -> dict[str, Tensor]:
        """Every tensor of the backbone and of what is on it, by its name in files. Not copied."""
        return self._state.in_files()

    def replaced_head(self, before: set[str], classes: int) -> None:
        self._state.replace_head(before)
        claim(self, self.backbone)
        self.backbone.outputs = classes
        if "num_classes" in self._origin.arguments:
            self._origin = replace(self._origin, arguments=self._origin.arguments | {"num_classes": classes})
        if self._classes is not None and len(self._classes) != classes:
            self._classes = None

    def require_savable(self) -> None:
        """Raises CheckpointError where a saved adapter could not be loaded again, or would lack what is trained."""
        if self.unmerged is not None:
            raise CheckpointError(
                "the model is merged: what folds is part of the backbone's weights now. Save it before merging, or "
                "save the whole model"
                + (
                    ": torch.save(model, FILE)."
                    if self.unmerged
                    else " with safetensors.torch.save_model(model.backbone.host, FILE)."
                )
            )
        names = self._state.unfit(self)
        if names:
            raise CheckpointError(
                f"{listed(names)}: added, removed or "
                "resized after tune(), so that a saved adapter could not be put on its backbone again. Change the "
                "model before it is tuned; or save it all yourself: torch.save(model, FILE)."
            )
        if self.classes is not None and self.backbone.classes not in (0, len(self.classes)):
            raise CheckpointError(
                f"the model's head has {counted(self.backbone.classes, 'output')}, but classes has "
                f"{counted(len(self.classes), 'name')}. "
                "Give a name for each, or model.classes = None."
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        claim(self, self.backbone)  # a copy has parameters of its own

    def saved_names(self) -> dict[str, str]:
        return self._state.saved_names()

    def saved_state(self) -> dict[str, Tensor]:
        """What this model holds beyond the pretrained backbone: the trained tensors, and what belongs to them."""
        return self._state.saved()

    @property
    def folds(self) -> bool:
        """Whether every part folds into the backbone's weights, so that ``merge`` should leave it alone."""
        return not self.policies and all(method.stays is None for method in self.methods)

    def merge(self) -> nn.Module:
        """Folds what can be folded into the backbone's weights, in place; logits stay the same, MACs fall.

        LoRA, SSF and FacT vanish, and so does the factor on an adapter's output; what has to stay is named with the
        reason in ``unmerged`` and in a log message. Save the model before: a merged one cannot be saved as an adapter.

        Returns:
            The plain backbone where nothing else remains, for instance timm's VisionTransformer, else this model.
        """
        if self.unmerged is None:
            for spec, reason in self.fold().items():
                log.warning("%s is not merged: %s.", spec, reason)
        if self.unmerged:
            return self
        release(self.backbone)  # nothing of this model is left
        return self.backbone.host

    def fold(self) -> dict[str, str]:
        """As ``merge``, without a word; gives ``unmerged``."""
        if self.unmerged is None:
            self.unmerged = fold(self.backbone, self.parts)
        return self.unmerged

    def save(
        self,
        folder: str | Path,
        results: dict[str, Any] | None = None,
        *,
        classes: Sequence[str] | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Writes adapter, dispatchers and head to ``folder``: JSON, safetensors and a model card.

        Args:
            folder: made if it is not there; an adapter in it that was saved alone is replaced.
            results: measured figures to keep with the adapter, for instance ``{"val_accuracy": 0.93}``.
            classes: names of the classes in label order, such as ``data.classes``, for a model that has none; ``fit``
                gives it those of its data.
            overwrite: replace the adapter of a run too, which can then not be resumed.

        Returns:
            The folder.

        Raises:
            CheckpointError: the model is merged, or what is trained could not be loaded again; a tensor is not finite;
                or ``folder`` is a file, or holds a run.
        """
        if classes is not None:
            self.classes = classes
        self.require_savable()
        self._miss_names()
        if self.backbone.steps is None:
            self._state.look_again()
        if not overwrite:
            require_no_run(Path(folder))
        tensors = self.saved_state()
        spoilt = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
        if spoilt:
            raise CheckpointError(
                f"{', '.join(spoilt[:5])}: not finite, so that the model would predict nothing. Nothing was saved; "
                "go back to weights from before the step that spoilt them."
            )
        write_adapter(Path(folder), tensors, self.describe(results))
        return Path(folder)

    def _miss_names(self) -> None:
        """Says once that what is saved does not know what its classes are called."""
        if self.classes or not self.backbone.classes or self._missed or not isinstance(self.task, Classification):
            return
        self._missed = True
        log.warning(
            "the model has no names for its %d classes, so that predictions will show numbers. Give them: "
            "model.save(folder, classes=data.classes), or model.classes = data.classes.",
            self.backbone.classes,
        )

    def describe(self, results: dict[str, Any] | None = None) -> dict[str, Any]:
        """All that is needed to put the saved tensors on the same backbone again, as JSON values.

        Args:
            results: measured figures to keep with them.
        """
        extra = self.extra_state()
        return {
            "spec": self.spec,
            "parts": [part.to_dict() for part in expand(self.parts)],
            "backbone": {
                **self.origin.to_dict(),
                "fingerprint": self.fingerprint,
                "dtype": str(next(self.backbone.parameters()).dtype).removeprefix("torch."),
                "complete": self.backbone.names_of_all() <= {*self.saved_names().values()},
            },
            "extra": {self.backbone.saved_name(name): tensor.requires_grad for name, tensor in extra.items()},
            "peft": self.backbone.recipe(),
            "preprocessing": self.preprocessing.to_dict(),
            "task": self.task.name,
            "classes": self.classes,
            # NumPy's and PyTorch's numbers are figures like others.
            "results": {name: value.item() if _is_number(value) else value for name, value in (results or {}).items()},
            "calibration": self.calibration and self.calibration.to_dict(),
        }


def _is_number(value: object) -> bool:
    return isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0)


def require_tuned(model: object, what: str) -> None:
    """Raises SpecError unless ``model`` is one that ``tune`` or ``load`` has made."""
    if not isinstance(model, TunedModel):
        raise not_tuned(model, what)


def _traced(backbone: Backbone, called: set[nn.Module]) -> Trace:
    """What a host computes, and in ``called`` what of it; BackboneError where it does not, as with another head."""
    try:
        return trace(backbone, (), called)
    except DyntuneError:
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, IndexError) as error:
        raise BackboneError(
            f"the model cannot compute an input of the shape {backbone.input_shape}: {type(error).__name__}: "
            f"{in_one_line(error)}. Give one whose parts go together, and whose lazy layers have run once."
        ) from error
