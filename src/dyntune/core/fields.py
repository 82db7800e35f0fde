"""Fields of documented dataclasses: descriptions from the docstring's ``Args:``, ranges from the types."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any, get_type_hints

from dyntune.core.errors import DyntuneError


@dataclass(frozen=True)
class Range:
    """Range of a number, as a part of the field's type: ``epochs: Annotated[int, Range(1)] = 30``.

    Args:
        least: lowest value.
        most: highest value; None for no bound.
    """

    least: float
    most: float | None = None

    def __contains__(self, value: float) -> bool:
        return self.least <= value and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        return f"at least {self.least:g}" if self.most is None else f"between {self.least:g} and {self.most:g}"


def descriptions(documented: Any) -> dict[str, str]:
    """Description of each field of a dataclass, or argument of a function, that its docstring has under ``Args:``."""
    match = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)*)", inspect.cleandoc(documented.__doc__ or ""), re.MULTILINE)
    text = inspect.cleandoc(match.group(1)) if match else ""
    found = re.findall(r"^(\w+): (.*(?:\n[ ]+.*)*)", text, re.MULTILINE)
    return {name: " ".join(line.split()) for name, line in found}


def ranges(documented: Any) -> dict[str, Range]:
    """Range of each field of a dataclass, or argument of a function, that declares one."""
    hints = get_type_hints(documented, include_extras=True)
    declared = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: item for name, items in declared.items() for item in items if isinstance(item, Range)}


def require_ranges(settings: Any, error: type[DyntuneError]) -> None:
    """Raises ``error`` unless every field of a dataclass is in its range, or None."""
    for name, allowed in ranges(type(settings)).items():
        value = getattr(settings, name)
        if value is not None and value not in allowed:
            raise error(f"{name}={value}: expected {allowed}.")
