"""Options of a command, made from the fields of the dataclasses that the command fills."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, get_origin, get_type_hints

import typer

from dyntune.core.fields import descriptions, ranges


@dataclass(frozen=True)
class Options:
    """Stands in the annotation of a command's parameter for the options that it is filled from; see ``with_options``.

    Each field becomes an option: its name with dashes, its type, range and default, and its description as help.

    Args:
        of: dataclass whose fields, or function whose arguments, are options; documented under ``Args:``.
        only: which of them, in this order; all by default.
        names: field -> what the option is called instead, with underscores.
        defaults: field -> the option's own default.
        helps: field -> what the help says instead of its description, where the command gives it another meaning.
        unset: field that is None unless its option is given -> what None stands for, which the help shows.
        make: what the parameter gets, from the values by field; ``of`` by default.
    """

    of: Callable[..., Any]
    only: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    helps: Mapping[str, str] = field(default_factory=dict)
    unset: Mapping[str, str] = field(default_factory=dict)
    make: Callable[..., Any] | None = None

    @property
    def options(self) -> dict[str, str]:
        """Name of the option by field."""
        return {name: self.names.get(name, name) for name in self.only or inspect.signature(self.of).parameters}

    def parameters(self) -> list[inspect.Parameter]:
        """The options as parameters of a function that typer understands."""
        hints, own = get_type_hints(self.of), inspect.signature(self.of).parameters
        found = []
        for name, called in self.options.items():
            hint, default = hints[name], self.defaults.get(name, own[name].default)
            # Of a bool without flags typer makes a pair, --x and --no-x, which only what is on by itself needs.
            flags = (f"--{called.replace('_', '-')}",) if hint is bool and own[name].default is False else ()
            info = option(self.of, name, *flags, unset=self.unset.get(name))
            info.help = self.helps.get(name, info.help)
            if name in self.unset:
                hint, default = hint | None, None
            kind = inspect.Parameter.KEYWORD_ONLY
            found.append(inspect.Parameter(called, kind, default=default, annotation=Annotated[hint, info]))
        return found

    def take(self, given: dict[str, Any]) -> Any:
        """What the parameter gets; the options are taken out of ``given``."""
        values = {name: given.pop(called) for name, called in self.options.items()}
        return (self.make or self.of)(**values)


def option(of: Any, name: str, *flags: str, unset: str | None = None) -> Any:
    """The ``typer.Option`` of a field: help and range.

    Args:
        of: documented dataclass or function.
        name: of its field or argument; of one that has several values, the help says that they are separated by commas.
        flags: names of the option, if not those that typer makes from the parameter's.
        unset: what None stands for, which the help shows as the default.
    """
    allowed = ranges(of).get(name)
    text = descriptions(of)[name].replace("``", "")
    if get_origin(get_type_hints(of)[name]) is tuple:
        text = f"{text.rstrip('.')}; several are separated by commas."
    return typer.Option(
        *flags,
        help=text if descriptions(of)[name].startswith("``") else text[0].upper() + text[1:],
        min=None if allowed is None else allowed.least,
        max=None if allowed is None else allowed.most,
        show_default=unset or True,
    )


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options that the ``Options`` in its annotations stand for.

    ``settings: Annotated[TrainSettings, Options(TrainSettings)]`` is a parameter of the function and gets settings; for
    typer the command has one parameter per field in its place.
    """
    parameters: list[inspect.Parameter] = []
    filled: dict[str, Options] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        notes = getattr(parameter.annotation, "__metadata__", ())
        options = next((note for note in notes if isinstance(note, Options)), None)
        if options is None:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        else:
            filled[parameter.name] = options
            parameters += options.parameters()

    @functools.wraps(command)
    def called(**given: Any) -> None:
        made = {name: options.take(given) for name, options in filled.items()}
        command(**given, **made)

    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called
