"""What transformers' Trainer and hubs ask of a model: how it is called, what it saves, where it goes."""

from __future__ import annotations

import abc
import functools
import json
import logging
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.core.errors import TrainingError
from dyntune.core.files import parse_json
from dyntune.model.adapter_folder import DESCRIPTION, TRAINER_WEIGHTS, described, without_paths
from dyntune.model.objective import training_loss
from dyntune.model.tasks import Task
from dyntune.parts.policies.base import Output, TokenPolicy

log = logging.getLogger("dyntune")
_STEP = 4096
"""Bytes that a description in a state is a multiple of."""
_PLAIN = {"return_dict": True}
"""Arguments of transformers' models whose value for an answer of loss and logits is not False."""


class HubModel(nn.Module, abc.ABC):
    """A tuned model as users of transformers know models: ``transformers.Trainer`` trains it, hubs take it.

    ``state_dict`` gives the trained tensors alone, by their names in files, because that is what a Trainer saves; with
    them goes a description in JSON, so that a folder which the Trainer wrote can be loaded as one of ``save``. A merged
    model has the state of any module.
    """

    backbone: Backbone
    policies: tuple[TokenPolicy, ...]
    task: Task
    unmerged: dict[str, str] | None
    main_input_name: ClassVar[str] = "pixel_values"
    accepts_loss_kwargs: ClassVar[bool] = False
    """The loss is a mean over the batch, which the Trainer has to divide where it accumulates gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_write_state)
        self.register_load_state_dict_pre_hook(_read_state)

    @abc.abstractmethod
    def run(self, images: Tensor, *, complete: bool = False) -> Output:
        """One forward pass with everything that it decided."""

    @abc.abstractmethod
    def saved_names(self) -> dict[str, str]:
        """What this model holds beyond the pretrained backbone: its names in the backbone, and in files."""

    @abc.abstractmethod
    def named_in_files(self) -> dict[str, Tensor]:
        """Every tensor of the backbone and of what is on it, by its name in files."""

    @abc.abstractmethod
    def describe(self, results: dict[str, Any] | None = None) -> dict[str, Any]:
        """All that is needed to put the saved tensors on the same backbone again, as JSON values."""

    @abc.abstractmethod
    def save(self, folder: str | Path, results: dict[str, Any] | None = None, *, overwrite: bool = False) -> Path:
        """Writes what ``load`` reads to a folder."""

    @property
    def config(self) -> Any:
        """The configuration object of a host of transformers."""
        config = self.backbone.config
        if config is None:
            raise AttributeError(f"{type(self.backbone.host).__name__} has no config")
        return config

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return next(self.backbone.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the backbone's weights."""
        return next(self.backbone.parameters()).dtype

    def forward(
        self,
        images: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """Images to logits; or called by keyword, as transformers calls its models, to a loss and logits.

        Args:
            images: ``(B, 3, height, width)``, preprocessed.
            pixel_values: the same, in place of ``images``.
            labels: what the task takes, for classification class indices ``(B,)``. In train mode the loss is that of
                ``training_loss``, in eval mode the task's.
            others: what models of transformers take beside these is refused, but where it asks for nothing more.

        Returns:
            Logits ``(B, classes)`` for ``images``. For ``pixel_values`` what ``Backbone.answer`` gives: transformers'
            ``ImageClassifierOutput``, on other hosts a dictionary; with ``loss``, None without labels, and ``logits``.
        """
        asked = [
            f"{name}={value!r}"
            for name, value in others.items()
            if value is not None and value is not _PLAIN.get(name, False)
        ]
        if asked:
            raise TypeError(
                f"the model takes images, or pixel_values and labels; given {', '.join(asked)}. Its answer has loss "
                "and logits alone; run(images) gives what policies decide, features(images) those of patches."
            )
        if images is not None:
            if labels is not None:
                raise TypeError("images come without labels: give pixel_values=..., labels=... for a loss and logits.")
            return self.run(images).logits
        if pixel_values is None:
            raise TypeError("the model takes images, or pixel_values=...; none were given.")
        if labels is None:
            if self.training and self.backbone.steps is not None and any(p.follows_length for p in self.policies):
                _without_terms()
            return self.backbone.answer(None, self.run(pixel_values).logits)
        if self.training:
            if getattr(self, "_is_replica", False) and self.policies:
                raise TrainingError(
                    "torch.nn.DataParallel trains copies of the model, which forget what its policies count. Start one "
                    "process for each GPU (torchrun --nproc-per-node 2 train.py), or show it one GPU alone "
                    "(CUDA_VISIBLE_DEVICES=0)."
                )
            loss = training_loss(self, pixel_values, labels)
            return self.backbone.answer(loss.total, loss.output.logits)
        logits = self.run(pixel_values).logits
        return self.backbone.answer(self.task.loss(logits, labels), logits)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Lets every block be recomputed in the backward pass, to save memory.

        Args:
            options: what the Trainer passes on, other things in each version; nothing depends on them.
        """
        self.backbone.switch_gradient_checkpointing(True)

    def activation_checkpointing_disable(self) -> None:
        """Lets blocks be remembered."""
        self.backbone.switch_gradient_checkpointing(False)

    # Their names before transformers 5.24, whose Trainer warns of them.
    gradient_checkpointing_enable = activation_checkpointing_enable
    gradient_checkpointing_disable = activation_checkpointing_disable

    def save_pretrained(self, save_directory: str | Path) -> Path:
        """``save``, under the name that transformers and hubs have for it."""
        return self.save(save_directory)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload an adapter of Dyntune",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Saves the model and uploads the folder to Hugging Face's hub, without the backbone's weights.

        Args:
            repo_id: ``owner/name``; made if it is not there.
            commit_message: what the history says.
            private: whether a new repository is.
            token: see ``huggingface_hub``.
            revision: branch to write to.
            create_pr: propose the change instead of making it.

        Returns:
            The address of the commit.
        """
        from huggingface_hub import HfApi

        hub = HfApi(token=token)
        repository = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            if without_paths(Path(folder)):
                log.warning(
                    "the backbone was read from this machine: what is uploaded does not say from where, and whoever "
                    "loads it gives the backbone (load(folder, backbone=model)) or its weights (weights=FILE)."
                )
            commit = hub.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                # Beside what is uploaded, what a Trainer has pushed would be a second adapter.
                delete_patterns=[TRAINER_WEIGHTS] if _holds_trainers(hub, repository, revision) else None,
            )
        return str(commit.commit_url)


@functools.cache
def _without_terms() -> None:
    """Says once that a loss which is computed elsewhere holds no rate."""
    log.warning(
        "the model was asked for logits in a training, without labels: a loss made of these alone "
        "(label_smoothing_factor and compute_loss_func of a Trainer) lacks the terms that hold the activation rate."
    )


def _holds_trainers(hub: Any, repository: str, revision: str | None) -> bool:
    """Whether a repository has an adapter that a Trainer has pushed there."""
    from huggingface_hub.errors import HfHubHTTPError, SafetensorsParsingError

    try:
        if not hub.file_exists(repository, TRAINER_WEIGHTS, revision=revision):
            return False
        held = hub.parse_safetensors_file_metadata(repository, TRAINER_WEIGHTS, revision=revision)
    except (HfHubHTTPError, SafetensorsParsingError):
        return False  # of a revision that is not there yet, or of another kind
    return DESCRIPTION in held.tensors


def _write_state(model: HubModel, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any]) -> None:
    """Leaves of a state what the model holds beyond its backbone, and describes it."""
    if model.unmerged is not None:
        return
    start = f"{prefix}backbone."
    own = {saved: state[start + name] for name, saved in model.saved_names().items()}
    for name in [name for name in state if name.startswith(start)]:
        del state[name]
    description = json.dumps(described(model.describe(), own)).encode()
    # Of the same length after small changes, for whoever averages states or copies one into another.
    description += b" " * (-len(description) % _STEP)
    state.update((prefix + saved, tensor) for saved, tensor in own.items())
    state[prefix + DESCRIPTION] = torch.frombuffer(bytearray(description), dtype=torch.uint8)


def _read_state(
    model: HubModel,
    state: dict[str, Tensor],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Gives the tensors of a state the names that modules have; what it does not hold stays as it is."""
    if model.unmerged is not None:
        return
    start = f"{prefix}backbone."
    for name in [name for name in state if name.startswith(start)]:
        unexpected.append(name)
        del state[name]
    description = state.pop(prefix + DESCRIPTION, None)
    if description is not None:
        theirs = _description(description)
        if theirs is None:
            log.warning("what the state says of the model that it is of cannot be read.")
        else:
            _warn_of_another(model, theirs)
    own = model.backbone.state_dict(keep_vars=True)
    expected = model.saved_names()
    for name in own:
        saved = prefix + model.backbone.saved_name(name)  # a state may hold more than what has changed here
        if saved in state:
            own[name] = state.pop(saved)
        elif name in expected:
            missing.append(saved)
    state.update((start + name, tensor) for name, tensor in own.items())


def _description(tensor: Tensor) -> dict[str, Any] | None:
    """What a state says of the model that it is of; None where it cannot be read."""
    try:
        found = parse_json(bytes(tensor.tolist()))
    except (ValueError, TypeError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("backbone"), dict) else None


def _warn_of_another(model: HubModel, theirs: dict[str, Any]) -> None:
    """Says where a state fits by its names and shapes, and was trained as another model."""
    ours = json.loads(json.dumps(model.describe()))
    if theirs.get("parts") != ours["parts"]:
        log.warning("the state is of a model with %s; it goes into one with %s.", theirs.get("spec"), ours["spec"])
    elif theirs.get("backbone", {}).get("fingerprint") != ours["backbone"]["fingerprint"]:
        log.warning("the state was trained on other weights of the backbone than those of this model.")
