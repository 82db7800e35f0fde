"""What every preset offers: one name and one set of options for several parts that belong together."""

import inspect
import textwrap
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from dyntune.core.fields import descriptions
from dyntune.parts.spec import OptionError, Part


@dataclass(frozen=True)
class Preset(Part):
    """A configuration that stands for a combination of tuning methods and token policies.

    A field that is an option of one of these parts has its name, type and default (``rate: float = Dispatch.rate``).
    It is described there: the docstring of a preset with ``parts`` ends with ``Args:``, has the other fields under it,
    and is completed by those of the parts.
    """

    parts: ClassVar[tuple[type[Part], ...]] = ()
    """The parts that it may stand for; of several that have an option, the first one's description is taken."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not cls.parts:
            return
        known = {name: text for part in reversed(cls.parts) for name, text in descriptions(part).items()}
        known |= descriptions(cls)
        lines = [inspect.cleandoc(cls.__doc__ or "").partition("\nArgs:")[0], "Args:"]
        for name in filter(known.__contains__, cls.__annotations__):
            entry = f"{name}: {known[name]}"
            lines += textwrap.wrap(
                entry, 120, initial_indent=4 * " ", subsequent_indent=8 * " ", break_on_hyphens=False
            )
        cls.__doc__ = "\n".join(lines)

    def check(self) -> None:
        """Raises OptionError where one of its parts does: of the preset, which is what the user has written."""
        try:
            self.expand()
        except OptionError as error:
            raise OptionError.of(self, error.expected) from None

    def expand(self) -> tuple[Part, ...]:
        """The parts that this preset stands for, in the order in which they are installed."""
        raise NotImplementedError

    def options_of(self, part: type[Part]) -> dict[str, Any]:
        """The values of those options of ``part`` that are fields here too."""
        own = vars(self)
        return {field.name: own[field.name] for field in fields(part) if field.name in own}
