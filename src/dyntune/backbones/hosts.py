"""Hosts by name and by kind: which family of host models takes one, and how it is built."""

from __future__ import annotations

import contextlib
import functools
import json
import reprlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dyntune.backbones.base import Backbone
from dyntune.backbones.hub import cache_alone
from dyntune.backbones.origin import OR_BUILT, OR_BUILT_IN, BackboneSource, fingerprint
from dyntune.core.discovery import discover
from dyntune.core.errors import BackboneError, SpecError
from dyntune.core.fields import Range
from dyntune.core.shapes import shapes_only
from dyntune.data.transforms import LARGEST_SIZE

GROUP = "dyntune.families"
_FILLED = "dyntune_weights"
"""The attribute of a host that says what it was filled with: the fingerprint of that, and the file that was given."""
DATA_PARALLEL = (
    "nn.DataParallel runs copies of a model that know nothing of each other's gates. Leave it out; several GPUs train "
    "together with torchrun: torchrun --nproc-per-node 2 -m dyntune train ..., or on a script with fit."
)
"""What is said to those who use it."""
_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")
_NO_FAMILY = (
    "it is no Vision Transformer that Dyntune knows. Supported: ViT, DeiT, DINO, CLIP, SigLIP, BEiT, EVA and Swin, as "
    "timm's VisionTransformer (vit_base_patch16_224) or of transformers; docs/hosts.md lists all, and the reasons."
)


@functools.cache
def families() -> dict[str, type[Backbone]]:
    """Every family of host models by name: those of the package, then those of other distributions."""
    return discover({"dyntune.backbones.families": Backbone}, GROUP)  # type: ignore[type-abstract]


def wrap(host: nn.Module) -> Backbone:
    """The host model behind the backbone interface.

    Raises:
        BackboneError: no family of hosts fits; says what is supported.
    """
    # Whoever has such a model has imported PEFT, which is slow to import and need not be installed otherwise.
    if any(type(module).__module__.partition(".")[0] == "peft" for module in host.modules()):
        from dyntune.backbones.peft import PeftBackbone

        return PeftBackbone(host, wrap_plain)
    return wrap_plain(host)


def wrap_plain(host: nn.Module) -> Backbone:
    """As ``wrap``, of a host in which no other library's layers are looked for."""
    if type(host).__module__.startswith("transformers.models.timm_wrapper."):
        host = host.timm_model  # type: ignore[assignment]
    advice = wrapper_advice(host)
    if advice:
        raise BackboneError(advice)
    for name, module in host.named_modules():
        if type(module).__module__.startswith(_QUANTIZED):
            raise BackboneError(
                f"{name} is a quantised {type(module).__name__}, which nothing can be trained beside. Tune the model "
                "as it was before; dyntune export --precision int8 quantises what comes out."
            )
    refusals = []
    for family in families().values():
        if family.knows(host):
            refusal = family.refusal(host)
            if refusal is None:
                return family(host)
            refusals.append(f"{refusal}. Supported: {family.supported}.")
    reason = refusals[0] if refusals else _NO_FAMILY
    raise BackboneError(f"{type(host).__name__} is not supported: {reason}")


def wrapper_advice(module: object) -> str | None:
    """What to do with a module that another one of torch's is wrapped in; None if it is none of these."""
    if isinstance(module, nn.DataParallel):
        return DATA_PARALLEL
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return "the model is wrapped in DistributedDataParallel, which fit does itself under torchrun. Give its module."
    if isinstance(module, torch._dynamo.OptimizedModule):
        return "the model is compiled already. Give the one that torch.compile was given, and compile what you get."
    return None


def not_tuned(model: object, what: str) -> SpecError:
    """The error for who gives ``what``, which takes a tuned model, something else."""
    advice = wrapper_advice(model) or "Tune it first: tune(model, method)."
    if what == "training_loss" and isinstance(model, nn.parallel.DistributedDataParallel):
        advice = (
            "Call the wrapper itself, model(pixel_values=images, labels=targets)['loss'], which is that loss in train "
            "mode: with its module each process would train a model of its own, because no gradients are shared."
        )
    if isinstance(model, str | Path):
        advice = f"Load it first: dyntune.load({str(model)!r:.80})."
    elif not isinstance(model, nn.Module):
        advice = "The model comes first."
    return SpecError(f"{what} takes a model from tune or load; given {type(model).__name__}. {advice}")


def create_backbone(
    name: str, *, weights: str | Path | None = None, pretrained: bool = True, **arguments: Any
) -> nn.Module:
    """A host model by name, with weights from a local file, from its hub, or random.

    Args:
        name: timm model name; for families that are not timm's, with their prefix.
        weights: local weight file; a head that does not fit is left out.
        pretrained: without ``weights``, whether to download the ones that are known for ``name``.
        arguments: for whoever builds it, for instance ``num_classes`` and ``img_size``.

    Raises:
        BackboneError: unknown name, no weights to be had, or weights that do not fit.
    """
    builder = _builders(name)[0]
    if pretrained and weights is None and not builder.prefix:
        _require_supported(builder, name, arguments)
    host = builder.create(name, weights=weights, pretrained=pretrained, **arguments)
    if (pretrained or weights is not None) and not any(p.is_meta for p in host.parameters()):
        with contextlib.suppress(BackboneError):  # one that is refused is so where it is used
            given = None if weights is None else str(Path(weights).resolve())
            setattr(host, _FILLED, (host_fingerprint(host), given))
    return host


def _require_supported(builder: type[Backbone], name: str, arguments: dict[str, Any]) -> None:
    """Raises BackboneError for a model that no family takes, before its weights are fetched."""
    try:
        with shapes_only():
            outline = builder.create(name, pretrained=False, **arguments)
    except BackboneError:
        return  # said where it is built
    try:
        wrap_plain(outline)
    except BackboneError as error:
        raise BackboneError(f"{name}: {error}") from error


def host_fingerprint(host: nn.Module, dtype: torch.dtype | None = None) -> str | None:
    """The ``TunedModel.fingerprint`` of a host that nothing is on yet, as if it were converted to ``dtype``."""
    backbone = wrap(host)
    return weights_fingerprint(backbone.plain(), backbone.adopted, dtype)


def weights_fingerprint(
    backbone: Backbone, adopted: Sequence[nn.Parameter], dtype: torch.dtype | None = None
) -> str | None:
    """Digest of the weights that are the same for every adapter: without the head, and what was trained before.

    None where a weight has no content.
    """
    trained = backbone.head_parameters() | {n for n, p in backbone.named_parameters() if any(p is a for a in adopted)}
    left_out = {backbone.saved_name(name) for name in trained}
    weights = [(name, p) for name, p in backbone.weights() if name not in left_out]
    return None if any(p.is_meta for _, p in weights) else fingerprint(weights, dtype)


def checked_origin(source: BackboneSource, host: nn.Module, found: str | None) -> BackboneSource:
    """A source with what is true of a host's weights: its name says nothing of what was loaded since it was built.

    They are what ``create_backbone`` has read if they still are; else they are compared with those that the name stands
    for, as far as these are on this machine.

    Args:
        source: what builds the host.
        host: as it was built.
        found: the fingerprint of its weights; None without content.
    """
    if source.name is None or found is None:
        return source
    filled, file = getattr(host, _FILLED, (None, None))
    if filled == found:
        return replace(source, weights=file, published=file is None)
    dtype = next(host.parameters()).dtype
    for given in dict.fromkeys((file, None)):
        with contextlib.suppress(BackboneError), cache_alone():  # what is not on this machine
            if given is None and source.weights is None and ":" not in source.name:
                known = _published_fingerprints(source.name, json.dumps(source.arguments, sort_keys=True), dtype)
            else:
                known = _fingerprints(source, given, dtype)
            if found in known:
                return replace(source, weights=given, published=given is None)
    return source


@functools.cache
def _published_fingerprints(name: str, arguments: str, dtype: torch.dtype) -> frozenset[str | None]:
    """Those of the weights that timm has for a name: building the model takes seconds, and they stay the same.

    Args:
        name: of a model of timm's own.
        arguments: it is built with, as JSON.
        dtype: see ``_fingerprints``.
    """
    return _fingerprints(BackboneSource(name, json.loads(arguments)), None, dtype)


def _fingerprints(source: BackboneSource, weights: str | None, dtype: torch.dtype) -> frozenset[str | None]:
    """Those of a model that is built again: of its weights as they are, and converted to ``dtype``."""
    again = rebuild(source, weights=weights)
    return frozenset((host_fingerprint(again), host_fingerprint(again, dtype)))


def rebuild(source: BackboneSource, *, weights: str | Path | None = None, pretrained: bool = True) -> nn.Module:
    """Creates a host model again.

    Args:
        source: where it comes from.
        weights: a local weight file to use instead of the recorded one.
        pretrained: False gives random weights, for instance to count costs.

    Raises:
        BackboneError: no such model, or its weights cannot be had or do not fit.
    """
    if source.name is None:
        raise BackboneError(
            "the backbone is not what timm.create_model builds from a name alone (with num_classes, img_size, "
            "global_pool, in_chans or dynamic_img_size), nor what transformers reads from a folder or the hub, so it "
            "cannot be built again. Build it yourself and pass it: dyntune.load(folder, backbone=model)."
        )
    file = (weights or source.weights) if pretrained else None
    try:
        return create_backbone(source.name, weights=file, pretrained=pretrained, **source.arguments)
    except BackboneError as error:
        if OR_BUILT_IN not in str(error):
            raise
        raise BackboneError(str(error).replace(OR_BUILT_IN, OR_BUILT)) from error.__cause__


def check_arguments(name: str | None, arguments: Any) -> dict[str, Any]:
    """The recorded arguments of a backbone, refused unless they are the few that its family records.

    A saved adapter may come from a stranger, and ``timm.create_model`` takes arguments that read files and addresses.

    Raises:
        BackboneError: another argument, or a value that is no plain number, text or list of numbers.
    """
    known = recorded(name or "")
    if not isinstance(arguments, dict) or not set(arguments) <= known:
        raise BackboneError(f"backbone arguments {reprlib.repr(arguments)}: expected only {', '.join(sorted(known))}.")
    for key, value in arguments.items():
        numbers = isinstance(value, list) and all(type(item) is int for item in value)
        sizes = value if numbers else [value] if type(value) is int else []
        allowed = Range(0) if key == "num_classes" else Range(1, LARGEST_SIZE)
        if any(size not in allowed for size in sizes):
            raise BackboneError(f"backbone argument {key}={value}: expected {allowed}.")
        if not numbers and type(value) not in (int, bool, str):
            raise BackboneError(
                f"backbone argument {key}={reprlib.repr(value)}: expected a number, a text or a list of numbers."
            )
    return arguments


def recorded(name: str) -> set[str]:
    """Names of the arguments that the families which build models of such names record."""
    return {argument for family in _builders(name) for argument in family.recorded(name)}


def _builders(name: str) -> list[type[Backbone]]:
    """The families that build models of such names: that of the name's prefix, or those of timm's names."""
    every = list(families().values())
    prefixed = [family for family in every if family.prefix and name.startswith(family.prefix)]
    return prefixed or [family for family in every if not family.prefix]
