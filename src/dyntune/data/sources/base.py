"""What a source of data sets is: which DATA arguments are its own, and how it loads what they name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from dyntune.core.errors import DataError
from dyntune.core.texts import listed, printable
from dyntune.data.base import DataSplits, LabelledImages
from dyntune.data.datasets import JoinedImages, data_root
from dyntune.data.splits import assemble
from dyntune.data.unreadable import without_unreadable


@dataclass(frozen=True)
class Request:
    """A DATA argument, and what :func:`dyntune.data.load_data` was told beside it.

    Args:
        name: the argument as it was written, which errors and the data set's name repeat.
        given: the argument without the source's prefix.
        seed: chooses the validation images where they must be split off, and the pictures of procedural sets.
        val_fraction: share of the training images to split off where there is no validation split, between 0 and 1.
        root: folder for downloads, where one was named.
        on_corrupt: with ``"skip"`` images that are missing or cannot be read are left to be dropped.
    """

    name: str
    given: str
    seed: int = 0
    val_fraction: float = 0.2
    root: Path | None = None
    on_corrupt: Literal["error", "skip"] = "error"

    @property
    def path(self) -> Path:
        """``given`` as a path.

        Raises:
            DataError: it is empty, which would be the current folder, or no path that could be looked for.
        """
        return as_path(self.name, self.given)

    @property
    def data_root(self) -> Path:
        """The folder that data sets are looked for in and downloaded to."""
        return data_root(self.root)

    def splits(
        self,
        train: LabelledImages,
        val: LabelledImages | None = None,
        test: LabelledImages | None = None,
        classes: Sequence[str] = (),
    ) -> DataSplits:
        """What ``load`` returns: the splits, with validation images split off ``train`` where ``val`` is None.

        Args:
            train: the images to train on.
            val: the images to choose by.
            test: the images to report on.
            classes: class names in label order; further labels that occur are named by their number.

        Raises:
            DataError: a label is negative, or a split has no images.
        """
        return assemble(self.name, train, val, test, classes, seed=self.seed, val_fraction=self.val_fraction)


@dataclass(frozen=True)
class Held:
    """The images that a DATA argument holds to evaluate on.

    Args:
        name: the argument as it was written.
        splits: the splits that there are, of ``train``, ``val`` and ``test``.
        classes: class names in label order.
        plain: whether nothing but their paths says which split images are in: no folder or list does.
        on_corrupt: with ``"skip"`` images that are missing or cannot be read are left out of those that ``images``
            gives; ``splits`` has them.
    """

    name: str
    splits: dict[str, LabelledImages]
    classes: tuple[str, ...]
    plain: bool = False
    on_corrupt: Literal["error", "skip"] = "error"

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(images):,} {split}" for split, images in self.splits.items())
        noun = next(iter(self.splits.values())).noun
        return f"Held({printable(self.name)}: {counts} {noun}s of {len(self.classes)} classes: {listed(self.classes)})"

    def images(self, split: str) -> LabelledImages:
        """The images of a split, or of all of them; each is decoded once where the unreadable are to be left out.

        Raises:
            DataError: there is no such split, or not one of its images can be read.
        """
        if split != "all" and split not in self.splits:
            there = ", ".join(self.splits)
            raise DataError(f"{self.name} has no {split} split, only {there}. Give --split with one of these, or all.")
        found = self.all if split == "all" else self.splits[split]
        return without_unreadable(found) if self.on_corrupt == "skip" else found

    @property
    def all(self) -> LabelledImages:
        """The images of all splits."""
        return JoinedImages(list(self.splits.values()))


def as_path(name: str, given: str) -> Path:
    """A DATA argument, or what follows its prefix, as a path.

    Raises:
        DataError: it is empty, which would be the current folder, or no path that could be looked for.
    """
    if not given:
        raise DataError(f"{name!r} names no data. Expected a name or a path; the current folder is {name + '.'!r}.")
    try:
        path = Path(given).expanduser()
        path.exists()  # which some paths cannot even be asked
    except (OSError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{printable(name):.80}: cannot be looked for ({why}). Expected a name or a path.") from error
    return path


class Source:
    """A kind of data source; found by being the one such class of a module here, or by an entry point.

    Other distributions add theirs with entry points of the group ``dyntune.sources``. Libraries that only ``load``
    needs are imported there, because help and errors import every source.

    Attributes:
        names: DATA arguments that it takes as they stand, such as ``digits``.
        prefix: what all its other DATA arguments begin with, such as ``folder:`` or ``torch/``.
        form: how those are written, for help and errors, such as ``torch/NAME``; names need none.
        order: of several sources that take an argument the one with the lowest loads it.
    """

    names: ClassVar[tuple[str, ...]] = ()
    prefix: ClassVar[str] = ""
    form: ClassVar[str] = ""
    order: ClassVar[int] = 0

    def takes(self, name: str) -> bool:
        """Whether a DATA argument is one of the names or has the prefix."""
        return name in self.names or (self.prefix != "" and name.startswith(self.prefix))

    def recognises(self, path: Path) -> bool:
        """Whether a path that was given without a prefix is a data set of this kind."""
        return False

    def load(self, request: Request) -> DataSplits:
        """The data set that a DATA argument names, giving PIL RGB images.

        Raises:
            DataError: there is no such data set, or it is malformed, or it can neither be found nor downloaded.
        """
        raise NotImplementedError

    def held(self, request: Request, classes: Sequence[str] | None = None) -> Held:
        """The images to evaluate on; unlike ``load``, also of data without training images, where a source knows such.

        Args:
            request: names the data set.
            classes: names of the model's classes, where they are known.

        Raises:
            DataError: as for ``load``.
        """
        data = self.load(request)
        splits = {"train": data.train, "val": data.val, "test": data.test}
        return Held(request.name, {name: split for name, split in splits.items() if split is not None}, data.classes)
