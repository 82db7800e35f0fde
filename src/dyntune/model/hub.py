"""What transformers' Trainer and hubs ask of a model: how it is called, what it saves, where it goes."""

from __future__ import annotations

import abc
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.model.adapter_folder import DESCRIPTION, described
from dyntune.model.objective import training_loss
from dyntune.model.tasks import Task
from dyntune.parts.policies.base import Output, TokenPolicy
from dyntune.parts.policies.gating import LearnedGate


class HubModel(nn.Module, abc.ABC):
    """A tuned model as users of transformers know models: ``transformers.Trainer`` trains it, hubs take it.

    On a host of transformers, ``state_dict`` gives the trained tensors alone, because that is what its Trainer saves;
    with them goes a description in JSON, so that a folder which the Trainer wrote can be loaded as one of ``save``.
    """

    backbone: Backbone
    policies: tuple[TokenPolicy, ...]
    task: Task
    main_input_name: ClassVar[str] = "pixel_values"
    accepts_loss_kwargs: ClassVar[bool] = False
    """The loss is a mean over the batch, which the Trainer has to divide where it accumulates gradients."""

    @abc.abstractmethod
    def run(self, images: Tensor, *, complete: bool = False) -> Output:
        """One forward pass with everything that it decided."""

    @abc.abstractmethod
    def saved_state(self) -> dict[str, Tensor]:
        """What this model holds beyond the pretrained backbone, by its name in files."""

    @abc.abstractmethod
    def named_in_files(self) -> dict[str, Tensor]:
        """Every tensor of the backbone and of what is on it, by its name in files."""

    @abc.abstractmethod
    def describe(self, results: dict[str, Any] | None = None) -> dict[str, Any]:
        """All that is needed to put the saved tensors on the same backbone again, as JSON values."""

    @abc.abstractmethod
    def save(self, folder: str | Path, results: dict[str, Any] | None = None) -> Path:
        """Writes what ``load`` reads to a folder."""

    @property
    def config(self) -> Any:
        """The configuration object of a host of transformers."""
        config = self.backbone.config
        if config is None:
            raise AttributeError(f"{type(self.backbone.host).__name__} has no config")
        return config

    def forward(
        self, images: Tensor | None = None, *, pixel_values: Tensor | None = None, labels: Tensor | None = None
    ) -> Any:
        """Images to logits; or called by keyword, as transformers calls its models, to a loss and logits.

        Args:
            images: ``(B, 3, height, width)``, preprocessed.
            pixel_values: the same, in place of ``images``.
            labels: what the task takes, for classification class indices ``(B,)``. In train mode the loss is that of
                ``training_loss``, in eval mode the task's.

        Returns:
            Logits ``(B, classes)`` for ``images``. For ``pixel_values`` what ``Backbone.answer`` gives: transformers'
            ``ImageClassifierOutput``, on other hosts a dictionary; with ``loss``, None without labels, and ``logits``.
        """
        if images is not None:
            return self.run(images).logits
        if pixel_values is None:
            raise TypeError("the model takes images, or pixel_values=...; none were given.")
        if labels is None:
            return self.backbone.answer(None, self.run(pixel_values).logits)
        if self.training:
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

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Every tensor by name; on a host of transformers, the trained ones by their names in files."""
        if self.backbone.config is None:
            return super().state_dict(*args, **kwargs)
        state: dict[str, Any] = {} if kwargs.get("destination") is None else kwargs["destination"]
        prefix, keep = kwargs.get("prefix", ""), kwargs.get("keep_vars", False)
        own = self.saved_state()
        state |= {prefix + name: p if keep else p.detach() for name, p in own.items()}
        description = json.dumps(described(self.describe(), own)).encode()
        state[prefix + DESCRIPTION] = torch.frombuffer(bytearray(description), dtype=torch.uint8)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The inverse of ``state_dict``."""
        if self.backbone.config is None:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        own = self.saved_state()
        given = {name: tensor for name, tensor in state_dict.items() if name != DESCRIPTION}
        missing = sorted(own.keys() - given.keys())
        own = self.named_in_files() | own  # what the state holds beside the trained tensors may not have changed here
        unexpected = sorted(given.keys() - own.keys())
        if strict and (missing or unexpected):
            raise RuntimeError(f"the state is of another model: missing {missing}, unexpected {unexpected}.")
        with torch.no_grad():
            for name in own.keys() & given.keys():
                own[name].copy_(given[name])
        for path, module in self.backbone.named_modules():
            if isinstance(module, LearnedGate):
                names = {key: self.backbone.saved_name(f"{path}.{key}") for key in module.saved()}
                if names and given.keys() >= {*names.values()}:
                    module.fill({key: given[name] for key, name in names.items()})
        return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)

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
            commit = hub.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )
        return str(commit.commit_url)
