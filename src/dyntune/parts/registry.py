"""From a name to the class of a part: a module in methods/, policies/ or presets/ is registered by existing.

Other distributions add parts with entry points of the group ``dyntune.parts``: the entry's object is the part's class,
and its module's name is the part's name.
"""

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from dyntune.core.discovery import discover
from dyntune.core.errors import SpecError, unknown_name
from dyntune.parts.methods.base import TuningMethod
from dyntune.parts.policies.base import TokenPolicy
from dyntune.parts.presets.base import Preset
from dyntune.parts.spec import Part, split_spec

GROUP = "dyntune.parts"
_ELSEWHERE = {
    **dict.fromkeys(("linear_probe", "linear_probing", "head", "probe"), "linear"),
    **dict.fromkeys(("finetune", "fine_tuning", "full_finetune"), "full"),
    **dict.fromkeys(("bias", "biases"), "bitfit"),
    **dict.fromkeys(("prompt", "prompt_tuning", "visual_prompt_tuning"), "vpt"),
    **dict.fromkeys(("houlsby", "pfeiffer", "double_seq_bn", "seq_bn"), "adapter"),
    **dict.fromkeys(("par_bn", "parallel_adapter"), "adaptformer"),
}
"""What other libraries and papers call methods, and what they are here."""


@functools.cache
def registered() -> dict[str, type[Part]]:
    """Every part by name: tuning methods, then token policies, then presets; of each, those of the package first."""
    bases: dict[str, type[Part]] = {"methods": TuningMethod, "policies": TokenPolicy, "presets": Preset}
    return discover({f"dyntune.parts.{room}": base for room, base in bases.items()}, GROUP)


def lookup(name: str) -> type[Part]:
    """The class of the part called ``name``.

    Raises:
        SpecError: there is none; lists the names and the nearest one.
    """
    try:
        return registered()[name]
    except KeyError:
        raise SpecError(unknown_name("method or token policy", name, registered(), _ELSEWHERE)) from None


def resolve(parts: Iterable[str | Part]) -> tuple[Part, ...]:
    """Spec strings and typed configurations as typed configurations; presets stay presets.

    Raises:
        SpecError: a name, key or value is wrong, or an item is neither text nor a part.
    """
    resolved: list[Part] = []
    for part in parts:
        if isinstance(part, Part):
            resolved.append(part)
        elif isinstance(part, str):
            resolved.extend(lookup(name).from_strings(values) for name, values in split_spec(part))
        else:
            raise SpecError(f"expected a spec string or a configuration such as DyT(rate=0.5); given {part!r}.")
    return tuple(resolved)


def expand(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Replaces each preset by what it stands for; the result holds tuning methods and token policies only."""
    expanded: list[Part] = []
    for part in parts:
        expanded.extend(expand(part.expand()) if isinstance(part, Preset) else (part,))
    return tuple(expanded)


def as_in_files(parts: Iterable[Part]) -> tuple[Part, ...]:
    """What the specs of parts meant in files that do not know all of today's options."""
    given = (
        {"type": part.name()} | {f.name: value for f in fields(part) if (value := getattr(part, f.name)) != f.default}
        for part in parts
    )
    return tuple(map(part_from_dict, given))


def part_from_dict(data: dict[str, Any]) -> Part:
    """The part that ``Part.to_dict`` wrote.

    Raises:
        SpecError: unknown type or option, or a value of another type.
    """
    cls = lookup(str(data.get("type")))
    options = cls.completed({key: value for key, value in data.items() if key != "type"})
    known = {field.name for field in dataclasses.fields(cls)}
    for key in options:
        if key not in known:
            raise cls.unknown(key)
    return cls(**options)
