"""Loading a model from the folder of its adapter: the backbone is built, and the adapter put on it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn

from dyntune.backbones.base import Backbone
from dyntune.backbones.hosts import create_backbone, host_fingerprint, rebuild, wrap, wrap_plain
from dyntune.backbones.hub import quickly
from dyntune.backbones.huggingface_models import PREFIX, folder_of
from dyntune.backbones.origin import BackboneSource
from dyntune.backbones.owners import require_free
from dyntune.core.errors import BackboneError, CheckpointError, SpecError, how_to_install, in_one_line
from dyntune.core.shapes import shapes_only
from dyntune.model.adapter_config import AdapterConfig
from dyntune.model.adapter_folder import (
    CARD,
    CONFIG,
    FORMER_CONFIG,
    FORMER_WEIGHTS,
    TRAINER_WEIGHTS,
    WEIGHTS,
    read_config,
    read_weights,
    require_unchanged,
)
from dyntune.model.assembly import empty_copy, install
from dyntune.model.tasks import Task
from dyntune.model.tuned import TunedModel
from dyntune.parts.registry import resolve


@contextmanager
def _in_fp32() -> Iterator[None]:
    """Builds models in fp32, as when they were adapted, whatever the program that calls has as its default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@_in_fp32()
def load(
    folder: str | Path,
    *,
    backbone: nn.Module | None = None,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    check_backbone: bool = True,
    policy: str | None = None,
    task: Task | None = None,
    trust: bool = False,
    tokens: str | None = None,
) -> TunedModel:
    """Builds the backbone of a saved adapter and puts the adapter on; the model comes in eval mode.

    Args:
        folder: what ``save`` wrote.
        backbone: the pretrained model, if it shall not be built from its name; it is adapted in place.
        weights: local weight file of the backbone, for models of transformers or its folder, instead of the source that
            was recorded.
        device: where the model goes.
        check_backbone: refuse a backbone whose weights differ from those that the adapter was trained on.
        policy: a token policy without parameters to put on top, for instance ``"tome:r=8"``. The gates then see other
            tokens than they were calibrated on, so a saved calibration is left out.
        task: what the outputs mean, for an adapter that was trained for another task than classification.
        trust: whether you trust who made the folder: a backbone of a hub, a folder or a file is looked for where it
            says only if you do, or if such a model was built from there on this machine before. timm's own models
            need none.
        tokens: the former name of ``policy``.

    Raises:
        CheckpointError: the folder is incomplete, damaged or of a newer format, does not fit the backbone, or needs
            ``trust``.
        BackboneError: the backbone cannot be built or belongs to another tuned model, or ``policy`` is not defined on
            the model.
        SpecError: ``policy`` has parameters, which nobody has trained.
    """
    if tokens is not None:
        warnings.warn("load(tokens=...) is now called load(policy=...).", DeprecationWarning, stacklevel=2)
        policy = policy or tokens
    if not isinstance(folder, str | os.PathLike):
        raise CheckpointError(f"load takes the folder that save wrote; given {type(folder).__name__}.")
    folder = Path(folder)
    if isinstance(backbone, TunedModel):
        raise CheckpointError("backbone is a tuned model already; give the plain model, one for each adapter.")
    if backbone is not None:
        require_free(backbone)
    config = read_config(folder)
    tensors = read_weights(folder, config)
    saved = AdapterConfig.of(folder, config, task)
    origin = saved.origin if weights is None else saved.origin.with_weights(weights)
    if backbone is None:
        _require_known(saved.origin, weights, folder, trust)
    extra = resolve([policy]) if policy else ()
    try:
        empty = _without_content(saved, backbone, origin, folder)
    except CheckpointError:
        raise
    except Exception as error:  # whatever sizes that are none make timm and PyTorch say
        if isinstance(error, BackboneError) and (backbone is not None or origin.name is None or origin.places):
            raise  # not for what the file says: it is not there, or is of another kind
        raise CheckpointError(f"{folder / CONFIG} does not describe a model: {in_one_line(error)}.") from error
    if empty is not None:
        saved.check(empty, tensors, folder)
    require_unchanged(folder, config)
    # Full tuning saves every weight, so the pretrained ones need not be had.
    if backbone is None and origin.name is not None and not origin.known and not saved.complete:
        host, origin = _published(saved, folder), replace(origin, published=True)
    else:
        host = backbone or rebuild(origin, pretrained=not saved.complete)
    given = {saved.fingerprint} if saved.complete else {host_fingerprint(host, dtype) for dtype in (None, saved.dtype)}
    host = host.to(saved.dtype)
    if saved.peft is not None:
        host = _with_peft(host, saved.peft, folder)
        given.add(host_fingerprint(host))
    if check_backbone and saved.fingerprint not in given:
        raise CheckpointError(
            f"the adapter in {folder} was trained on other weights of {origin.name or 'its backbone'} than those given "
            f"(fingerprint {saved.fingerprint}, given {' or '.join(sorted(map(str, given)))}), so it would predict "
            "wrongly. Give the weights it was trained on (weights=FILE, --weights FILE or backbone=model), or "
            "check_backbone=False to load it anyway."
        )
    if saved.fingerprint not in given:
        origin = replace(origin, weights=None, published=False)
    model = TunedModel(host, (*saved.parts, *extra))
    if empty is None:
        saved.check(model.backbone, tensors, folder)
    if any(model.backbone.saved_name(name) not in tensors for name in model.tuned_state()):
        raise SpecError(
            f"{policy} has parameters, which the adapter in {folder} was not trained with. Train it with this policy, "
            "or put on one without parameters (tome, evit)."
        )
    model.adopt(saved.extra)
    own = model.named_in_files() | model.saved_state()
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    if backbone is None:
        origin.remember()
    model.origin = origin
    model.preprocessing = saved.preprocessing
    model.task = saved.task
    model.classes = saved.classes
    model.calibration = None if extra else saved.calibration
    return model.to(device).eval()


def from_pretrained(
    place: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str = "",
    **options: Any,
) -> TunedModel:
    """``load`` from a folder, or from a repository of Hugging Face's hub that ``push_to_hub`` has filled.

    Args:
        place: the folder, or ``owner/name``.
        revision: of the repository.
        token: see ``huggingface_hub``.
        subfolder: where in the folder or the repository the adapter is.
        options: as for ``load``.

    Raises:
        CheckpointError: there is no such folder, and the repository cannot be had; or a folder is given with a
            revision.
    """
    if not str(place):
        raise CheckpointError("from_pretrained takes a folder, or owner/name of a repository; the name is empty.")
    if Path(place).is_dir():
        if revision is not None:
            raise CheckpointError(f"{place} is a folder, which has no revision {revision!r}. Leave revision out.")
        return load(Path(place) / subfolder, **options)
    from huggingface_hub import snapshot_download

    names = (CONFIG, WEIGHTS, CARD, FORMER_CONFIG, FORMER_WEIGHTS[0], TRAINER_WEIGHTS)
    files = [(PurePosixPath(subfolder) / name).as_posix() for name in names]
    with quickly() as unreachable:
        try:
            folder = snapshot_download(str(place), revision=revision, token=token, allow_patterns=files)
        except Exception as error:
            # huggingface_hub and the network stack each have their own error types for this.
            raise CheckpointError(
                f"no folder {place}, and no repository of that name can be had: {unreachable or in_one_line(error)}. "
                f"Without a network, fetch {CONFIG} and {WEIGHTS} of it into a folder elsewhere, and give that."
            ) from error
    return load(Path(folder) / subfolder, **options)


TunedModel.from_pretrained = staticmethod(from_pretrained)


def _require_known(saved: BackboneSource, weights: str | Path | None, folder: Path, trust: bool) -> None:
    """Raises CheckpointError where a folder of somebody else would decide what is fetched, or read outside of it."""
    source = saved if weights is None else saved.with_weights(None)
    complete = (saved.name or "").startswith(PREFIX) and folder_of(weights) is not None  # the name is not followed then
    unknown = () if trust or complete else source.unknown(folder)
    if unknown:
        raise CheckpointError(
            f"{folder} asks for a backbone from {' and '.join(map(repr, unknown))}, from where none was built on this "
            "machine before, and a folder that somebody else may have made does not decide what is fetched or read. If "
            "you trust who made it, say so once: load(folder, trust=True), dyntune predict FOLDER IMAGE --trust. Else "
            "build the backbone yourself, and give it: load(folder, backbone=model)."
        )


def _published(saved: AdapterConfig, folder: Path) -> nn.Module:
    """The backbone with the weights of its name, which could not be compared when the adapter was saved.

    Raises:
        CheckpointError: the adapter was trained on others, or they cannot be had.
    """
    missing: BackboneError | None = None
    reason = "are not those published under its name"
    try:
        host = rebuild(saved.origin)
        if saved.fingerprint in {host_fingerprint(host, dtype) for dtype in (None, saved.dtype)}:
            return host
    except BackboneError as error:
        missing = error
        reason = f"were not known to be those published under its name, which cannot be had ({in_one_line(error)})"
    raise CheckpointError(
        f"the adapter in {folder} was trained on weights of {saved.origin.architecture} that {reason}, so that nobody "
        "knows where to have them. Give them: load(folder, backbone=model), or weights=FILE (--weights FILE)."
    ) from missing


def _without_content(
    saved: AdapterConfig, given: nn.Module | None, origin: BackboneSource, folder: Path
) -> Backbone | None:
    """The backbone with the saved parts on it, as shapes alone: whatever sizes a file names, they take no memory.

    None where that cannot be had: some of PEFT's layers compute with their values when they are made.
    """
    with shapes_only():
        if given is not None:
            host = empty_copy(given)
        elif origin.name is None:
            host = rebuild(origin)  # says what to do
        else:
            host = create_backbone(origin.name, weights=origin.weights, pretrained=False, **origin.arguments)
        host = host.to(saved.dtype)
        if saved.peft is not None:
            try:
                host = _with_peft(host, saved.peft, folder)
            except CheckpointError as error:
                if isinstance(error.__cause__, BackboneError) and _needs_content(error.__cause__.__cause__):
                    return None
                raise
        backbone = wrap(host)
        install(backbone, saved.parts)
    return backbone


def _needs_content(error: BaseException | None) -> bool:
    """Whether something failed because a tensor had a shape alone."""
    return isinstance(error, RuntimeError) and "meta tensors" in str(error).lower()


def _with_peft(host: nn.Module, recipe: Any, folder: Path) -> nn.Module:
    """The host with the layers of Hugging Face's PEFT that the adapter was trained with."""
    try:
        from dyntune.backbones.peft_config import with_layers
    except ImportError as error:
        raise CheckpointError(
            f"the adapter in {folder} was trained with layers of PEFT, which is not installed or not complete "
            f"({error}). Install it: {how_to_install('peft')}."
        ) from error
    try:
        return with_layers(host, recipe, wrap_plain)
    except BackboneError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
