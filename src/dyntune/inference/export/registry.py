"""From a name to a runtime: a module in ``runtimes/`` is registered by existing.

Other distributions add runtimes with entry points of the group ``dyntune.runtimes``: the entry's object is the
runtime's class, and its module's name is the runtime's name.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dyntune.core.discovery import discover
from dyntune.core.errors import ExportError, unknown_name
from dyntune.inference.export.runtimes.base import FP32, Runtime

GROUP = "dyntune.runtimes"


@functools.cache
def registered() -> dict[str, type[Runtime]]:
    """Every runtime by name, those of the package first."""
    return discover({"dyntune.inference.export.runtimes": Runtime}, GROUP)  # type: ignore[type-abstract]


def lookup(name: str) -> type[Runtime]:
    """The class of the runtime called ``name``.

    Raises:
        ExportError: there is none; lists the names and the nearest one.
    """
    try:
        return registered()[name]
    except KeyError:
        raise ExportError(unknown_name("runtime", name, registered())) from None


def precisions() -> tuple[str, ...]:
    """The precisions that some runtime offers."""
    return tuple(dict.fromkeys(precision for runtime in registered().values() for precision in runtime.precisions))


def options() -> dict[str, list[str]]:
    """Every option of a runtime, with the names of the runtimes that have it."""
    found: dict[str, list[str]] = {}
    for name, runtime in registered().items():
        for option in runtime.options():
            found.setdefault(option, []).append(name)
    return found


def configured(name: str, given: Mapping[str, Any]) -> Runtime:
    """The runtime called ``name`` with options.

    Raises:
        ExportError: there is no such runtime, it has no such option, or what is installed cannot write with it.
    """
    runtime = lookup(name)
    for option, value in given.items():
        _require_known(option)
        if option not in runtime.options():
            owners = " or ".join(options()[option])
            raise ExportError(f"{option} is an option of the runtime {owners}; given {value} for {name}. Leave it out.")
    made = runtime(**given)
    made.check()
    return made


def every(given: Mapping[str, Any]) -> list[Runtime]:
    """All runtimes, each with those of the options that it has.

    Raises:
        ExportError: no runtime has such an option, or what is installed cannot write with it.
    """
    for option in given:
        _require_known(option)
    return [
        configured(name, {option: value for option, value in given.items() if option in runtime.options()})
        for name, runtime in registered().items()
    ]


def require_precision(precision: str) -> None:
    """Raises ExportError if no runtime offers a precision; lists those that there are and the nearest one."""
    if precision not in precisions():
        raise ExportError(unknown_name("precision", precision, precisions()))


def require_possible(runtime: Runtime, precision: str, calibration_images: Tensor | None) -> None:
    """Checks that a runtime offers a precision.

    Raises:
        ExportError: it does not, or needs images for it.
    """
    require_precision(precision)
    offering = [name for name, other in registered().items() if precision in other.precisions]
    if precision not in runtime.precisions:
        raise ExportError(f"{precision} is for the runtimes {_and(offering)}; give one of them, or --precision {FP32}.")
    if runtime.precisions[precision].images and calibration_images is None:
        without = [name for name in offering if not registered()[name].precisions[precision].images]
        other = f", or take the runtime {' or '.join(without)}, which needs none" if without else ""
        raise ExportError(
            f"{precision} in {runtime.title} takes its scales from images: give some of the kind that the model will "
            f"see (calibration_images, --calibrate-on DATA){other}."
        )


def _and(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _require_known(option: str) -> None:
    if option not in options():
        raise ExportError(unknown_name("option of a runtime", option, options()))
