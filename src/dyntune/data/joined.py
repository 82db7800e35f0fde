"""Several data sets one after the other, as one."""

from collections.abc import Sequence
from itertools import accumulate

from PIL import Image

from dyntune.data.base import LabelledImages


class JoinedImages(LabelledImages):
    """The images of several data sets with the same classes, in order; without the transforms that those may have."""

    def __init__(self, parts: Sequence[LabelledImages]) -> None:
        super().__init__(
            [target for part in parts for target in part.targets],
            skipped=[source for part in parts for source in part.skipped],
        )
        self.parts = tuple(parts)
        self.starts = (0, *accumulate(len(part) for part in parts))
        self.reads_files = any(part.reads_files for part in parts)
        self.classes = parts[0].classes

    def read(self, index: int) -> Image.Image:
        part, position = self._place(index)
        return part.read(position)

    def source(self, index: int) -> str:
        part, position = self._place(index)
        return part.source(position)

    def _place(self, index: int) -> tuple[LabelledImages, int]:
        number = max(number for number, start in enumerate(self.starts[:-1]) if start <= index % len(self))
        return self.parts[number], index % len(self) - self.starts[number]
