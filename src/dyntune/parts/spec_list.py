"""Several specs in one text, as commands take them, and a folder name for each."""

from __future__ import annotations

import hashlib
import re

from dyntune.core.errors import SpecError
from dyntune.parts.registry import resolve


def split_specs(text: str) -> list[str]:
    """Splits ``a,b:key=value,key=value,c`` into specs, which must be known and different."""
    specs = split_list(text)
    resolve(specs)
    if len({folder_name(spec) for spec in specs}) < len(specs):
        raise SpecError(f"{text!r} names a method twice; give each once.")
    return specs


def split_list(text: str) -> list[str]:
    """Splits ``a,b:key=value,key=value,c`` at its commas; a piece ``key=value`` belongs to what stands before it."""
    specs: list[str] = []
    for piece in filter(None, (p.strip() for p in text.split(","))):
        continues = "=" in piece and ":" not in piece.split("=")[0]
        if continues and not specs:
            raise SpecError(
                f"{text!r} begins with the option {piece!r}; a spec begins with a name, as in dyt:rate=0.5."
            )
        specs = [*specs[:-1], f"{specs[-1]},{piece}"] if continues else [*specs, piece]
    if not specs:
        raise SpecError("no method given; for instance linear,adaptformer,dyt:rate=0.5.")
    return specs


def folder_name(spec: str) -> str:
    """A folder name for a spec: letters, digits, dots and dashes; different specs have different names.

    Where more is lost than the separators of a spec, such as the sign of a number, a digest is appended.
    """
    written = "".join(spec.split())
    name = re.sub(r"[^A-Za-z0-9.]+", "-", written).strip("-")
    if re.fullmatch(r"[A-Za-z0-9.]+((?:[:,=/]|[+_-](?=[A-Za-z]))[A-Za-z0-9.]+)*", written):
        return name
    return f"{name}-{hashlib.sha256(written.encode()).hexdigest()[:8]}"
