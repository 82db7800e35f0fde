"""Configurations of Hugging Face's PEFT: which of them are supported, as JSON values, and made into layers again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from enum import Enum
from importlib.metadata import version
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dyntune.backbones.base import Backbone
from dyntune.core.errors import BackboneError

TYPES = (
    "BEFT",
    "BOFT",
    "DEFT",
    "DELORA",
    "FOURIERFT",
    "GLORA",
    "HIRA",
    "HRA",
    "IA3",
    "LN_TUNING",
    "LOHA",
    "LOKR",
    "LORA",
    "MISS",
    "OFT",
    "PEANUT",
    "RANDLORA",
    "ROAD",
    "SUPERTUNING",
    "UNILORA",
    "VBLORA",
    "VERA",
)
"""What ``peft_type`` may be: methods that change each token by itself, even where there is none, keep their state in
the layers that they wrap, and are trained by gradient alone."""

_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the backbone's own weights as they are."""

_OTHER_MODELS = (
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "megatron_config",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "use_bdlora",
    "use_qalora",
)
"""Options that need another kind of model, PEFT's own forward pass, or a change of the backbone's weights."""


def with_layers(host: nn.Module, recipe: Any, wrap: Callable[[nn.Module], Backbone]) -> nn.Module:
    """Puts PEFT's layers on a plain host again, with new values, as ``PeftBackbone.recipe`` says.

    The recipe may come from a stranger: only the types and options that a ``PeftBackbone`` takes are passed to PEFT,
    none of which names a file, an address or a module.

    Args:
        host: the plain model.
        recipe: what ``PeftBackbone.recipe`` has given.
        wrap: puts a plain host behind the interface.

    Raises:
        BackboneError: the recipe is none, was written by another PEFT, or does not fit the host.
    """
    if any(isinstance(module, BaseTunerLayer) for module in host.modules()) or isinstance(host, peft.PeftModel):
        raise BackboneError("PEFT's layers are rebuilt from the folder; give the plain model: backbone=timm_model.")
    host_name = wrap(host).host_name
    try:
        configs = {
            str(name): _config(_on_host(options, host_name), recipe["version"])
            for name, options in recipe["adapters"].items()
        }
        (first, config), *others = configs.items()
        model = peft.get_peft_model(host, config, first, autocast_adapter_dtype=bool(recipe["upcast"]))
        for name, config in others:
            model.add_adapter(name, config)
        if others:
            model.base_model.set_adapter(list(configs))
    except BackboneError:
        raise
    except Exception as error:
        # PEFT checks options with errors of many types.
        raise BackboneError(f"PEFT's layers cannot be rebuilt: {type(error).__name__}: {error}.") from error
    return model


def _on_host(options: dict[str, Any], host_name: Callable[[str], str]) -> dict[str, Any]:
    """An adapter's options with the names that the host has for modules."""
    named = dict(options)
    for option, value in options.items():
        if option in ("target_modules", "feedforward_modules", "modules_to_save") and isinstance(value, list):
            named[option] = [host_name(name) for name in value]
        elif option.endswith("_pattern") and isinstance(value, dict):
            named[option] = {host_name(name): own for name, own in value.items()}
    return named


def _config(options: dict[str, Any], written_by: Any) -> Any:
    """PEFT's configuration object for plain JSON values."""
    kind = options.pop("peft_type", None)
    if kind not in TYPES or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise BackboneError(_unsupported(kind))
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    known = {field.name for field in fields(cls)}
    unknown = sorted(name for name, value in options.items() if name not in known and value)
    if unknown:
        raise BackboneError(
            f"PEFT {version('peft')} does not know the options {', '.join(unknown)} of {kind}; the adapter was saved "
            f"with PEFT {written_by}. Install that version or a newer one: pip install 'peft>={written_by}'."
        )
    config = cls(**_options({name: value for name, value in options.items() if name in known}))
    check_config(config)
    if isinstance(getattr(config, "init_lora_weights", None), str):
        config.init_lora_weights = True  # the values are about to be loaded
    return config


def config_to_json(config: Any) -> dict[str, Any]:
    """The options of a PEFT configuration that decide which layers it adds, as JSON values."""
    return _to_json(_options(config.to_dict()))


def _options(config: dict[str, Any]) -> dict[str, Any]:
    """The options that decide which layers PEFT adds; not those about files, other libraries or initial values."""
    about_others = ("base_model_name_or_path", "revision", "auto_mapping", "task_type", "peft_version", "megatron_core")
    return {name: value for name, value in config.items() if name not in about_others and not name.endswith("_config")}


def check_config(config: Any) -> None:
    """Raises BackboneError for a PEFT configuration that is not supported."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise BackboneError(
            f"PEFT's {kind} inserts tokens in a forward pass of its own, which a vision transformer's cannot replace. "
            "Use the method vpt, or a PEFT method that changes layers, such as LoRA."
        )
    if kind not in TYPES:
        raise BackboneError(_unsupported(kind))
    init = getattr(config, "init_lora_weights", True)
    if init not in _INITS:
        raise BackboneError(
            f"init_lora_weights={init!r} rewrites the backbone's own weights, so the saved adapter would not fit the "
            "pretrained backbone. Use init_lora_weights=True, or let PEFT convert the adapter: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    for option in _OTHER_MODELS:
        if getattr(config, option, None):
            raise BackboneError(f"PEFT's option {option} is not supported; leave it out.")


def _unsupported(kind: Any) -> str:
    return f"PEFT's {kind} is not supported. Supported: {', '.join(TYPES)}."


def _to_json(value: Any) -> Any:
    """Plain JSON values: sets as sorted lists, enumerations as their value."""
    if isinstance(value, dict):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_to_json(item) for item in (sorted(value) if isinstance(value, set) else value)]
    return value.value if isinstance(value, Enum) else value
