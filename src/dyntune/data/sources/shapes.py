"""Procedural pictures of one white shape on black, to tell its place or its direction from."""

from dyntune.core.errors import DataError
from dyntune.data.base import DataSplits
from dyntune.data.drawn.shapes import CLASSES, TASKS, ShapeImages
from dyntune.data.sources.base import Request, Source

SIZES = {"train": 1000, "val": 200, "test": 1000}


class Shapes(Source):
    """A task on procedural shapes: 1,000 pictures to train on, 200 to choose by, 1,000 to test on.

    :class:`dyntune.data.drawn.shapes.ShapeImages` says what the tasks are. The pictures of every split follow from
    the seed.
    """

    names = tuple(f"shapes-{task}" for task in TASKS)

    def takes(self, name: str) -> bool:
        return super().takes(name) or name == "shapes"

    def load(self, request: Request) -> DataSplits:
        if request.name == "shapes":
            raise DataError(
                "'shapes' is two data sets: expected 'shapes-location' (tell the column that a shape is in) or "
                "'shapes-orientation' (tell the direction of its tip)."
            )
        task = request.name.removeprefix("shapes-")
        word = "column" if task == "location" else "direction"
        train, val, test = (ShapeImages(task, split, size, request.seed) for split, size in SIZES.items())
        return request.splits(train, val, test, [f"{word} {label}" for label in range(CLASSES)])
