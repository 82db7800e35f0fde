"""Finding what a room holds: a module of the room is known by being there, and other distributions add entry points."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import pkgutil
from collections.abc import Mapping
from typing import TypeVar

from dyntune.core.errors import in_one_line

log = logging.getLogger("dyntune")

T = TypeVar("T")


def discover(rooms: Mapping[str, type[T]], group: str) -> dict[str, type[T]]:
    """The classes that rooms hold, by name: of each room its own modules by the alphabet, then those from outside.

    Every module of a room defines exactly one class that derives from the room's base, but for ``base.py``, or those
    that the package names in ``BASES``. An entry point of ``group`` gives such a class of another distribution. Either
    is called as its module is, see ``named``. An entry point that gives none, or cannot be loaded, is left out with a
    warning: whoever wrote it must not stop every command.

    Args:
        rooms: names of packages, for instance ``"dyntune.parts.methods"``, and what their classes derive from.
        group: of entry points, for instance ``"dyntune.parts"``.

    Raises:
        TypeError: a module defines none or several.
    """
    found: dict[str, type[T]] = {}
    outside = _outside(group, tuple(rooms.values()))
    for room, base in rooms.items():
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
        found |= {named(value): value for value in outside if issubclass(value, base)}
    return found


def _outside(group: str, bases: tuple[type[T], ...]) -> list[type[T]]:
    """What the entry points of a group give."""
    found = []
    for entry in importlib.metadata.entry_points(group=group):
        try:
            value = entry.load()
            if not (isinstance(value, type) and issubclass(value, bases)):
                raise TypeError(f"it is no {' or '.join(base.__name__ for base in bases)}")
        except Exception as error:  # whatever another distribution's code meets
            log.warning("%s = %s of the group %s is left out: %s.", entry.name, entry.value, group, in_one_line(error))
        else:
            found.append(value)
    return found


def named(cls: type) -> str:
    """What a class is called: as its module, with dashes (``fact_tt.py`` holds ``fact-tt``)."""
    return cls.__module__.rsplit(".", 1)[-1].replace("_", "-")


@functools.cache
def _modules(room: str) -> tuple[str, ...]:
    package = importlib.import_module(room)
    bases = getattr(package, "BASES", ("base",))
    return tuple(info.name for info in pkgutil.iter_modules(package.__path__) if info.name not in bases)
