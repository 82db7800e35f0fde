"""Finding what a room holds: a module of the room is known by being there, and other distributions add entry points."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import pkgutil
from typing import TypeVar

from dyntune.core.errors import in_one_line

log = logging.getLogger("dyntune")

T = TypeVar("T")


def discover(room: str, base: type[T], group: str) -> dict[str, type[T]]:
    """The classes that a room holds, by name: its own modules in the order of the alphabet, then those from outside.

    Every module of the room defines exactly one class that derives from ``base``, but for ``base.py``, or those that
    the package names in ``BASES``. An entry point of ``group`` gives such a class of another distribution. Either is
    called as its module is, see ``named``.

    Args:
        room: name of the package, for instance ``"dyntune.parts.methods"``.
        base: what all of them derive from.
        group: of entry points, for instance ``"dyntune.parts"``.

    An entry point that cannot be loaded is left out with a warning: whoever wrote it must not stop every command.

    Raises:
        TypeError: a module defines none or several.
    """
    found: dict[str, type[T]] = {}
    for name in _modules(room):
        module = importlib.import_module(f"{room}.{name}")
        own = [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
        ]
        if len(own) != 1:
            raise TypeError(f"{module.__name__} must define exactly one {base.__name__}; it defines {len(own)}")
        found[named(own[0])] = own[0]
    for entry in importlib.metadata.entry_points(group=group):
        try:
            value = entry.load()
        except Exception as error:  # whatever another distribution's code meets
            log.warning("%s = %s of the group %s is left out: %s.", entry.name, entry.value, group, in_one_line(error))
            continue
        if isinstance(value, type) and issubclass(value, base):
            found[named(value)] = value
    return found


def named(cls: type) -> str:
    """What a class is called: as its module, with dashes (``fact_tt.py`` holds ``fact-tt``)."""
    return cls.__module__.rsplit(".", 1)[-1].replace("_", "-")


@functools.cache
def _modules(room: str) -> tuple[str, ...]:
    package = importlib.import_module(room)
    bases = getattr(package, "BASES", ("base",))
    return tuple(info.name for info in pkgutil.iter_modules(package.__path__) if info.name not in bases)
