"""What every preset offers: one name and one set of options for several parts that belong together."""

from dataclasses import dataclass

from dyntune.parts.spec import Part


@dataclass(frozen=True)
class Preset(Part):
    """A configuration that stands for a combination of tuning methods and token policies."""

    def expand(self) -> tuple[Part, ...]:
        """The parts that this preset stands for, in the order in which they are installed."""
        raise NotImplementedError
