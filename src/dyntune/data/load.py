"""From the DATA argument of a command to a data set: the source that takes it, and what is done whatever the source."""

import difflib
import functools
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from dyntune.core.discovery import discover
from dyntune.core.errors import DataError
from dyntune.data.base import DataSplits
from dyntune.data.sources.base import Held, Request, Source, as_path
from dyntune.data.unreadable import without_unreadable

GROUP = "dyntune.sources"


@functools.cache
def sources() -> tuple[Source, ...]:
    """Every source: those of the package in the order of the alphabet, then those of other distributions."""
    return tuple(source() for source in discover({"dyntune.data.sources": Source}, GROUP).values())


def forms() -> str:
    """What a DATA argument may be, for help and errors: all names, then the other forms."""
    names = [name for source in sources() for name in source.names]
    return "; ".join([", ".join(names), *(source.form for source in sources() if source.form)])


def load_data(
    data: str | Path,
    *,
    seed: int = 0,
    val_fraction: float = 0.2,
    root: Path | None = None,
    on_corrupt: Literal["error", "skip"] = "error",
) -> DataSplits:
    """Load a data set by its DATA argument.

    Args:
        data: ``digits``; ``shapes-location`` or ``shapes-orientation``; ``motion``; ``folder:PATH``, ``vtab:PATH`` or
            just a PATH; ``video-folder:PATH``, ``video-list:FILE`` or ``kinetics:FILE.csv``; ``torch/NAME``,
            ``hfds/NAME``, ``wds/PATH`` or ``tfds/NAME``; or what a source of another distribution takes. A name wins
            over a folder that is called the same; a :class:`~pathlib.Path` is always a folder.
        seed: chooses the validation images where they must be split off, and the pictures of procedural sets.
        val_fraction: share of the training images to split off, between 0 and 1, where there is no validation split.
        root: where data sets with a loader of their own (``torch/`` and so on) are looked for and downloaded to;
            ``$DYNTUNE_DATA`` or ``~/.cache/dyntune/data`` by default.
        on_corrupt: with ``"error"`` nothing is checked beforehand, and an image that cannot be read is an error
            naming its file when it is read. With ``"skip"`` every image is decoded once now, which takes some
            milliseconds an image (a minute or so for 50,000 photographs on two cores), of a video every frame, and
            those that are missing or cannot be read are left out and named in ``skipped``.

    Returns:
        The splits, giving PIL RGB images, or videos; put a transform on them with ``with_transform``.

    Raises:
        DataError: there is no such data set, or it is malformed, or it can neither be found nor downloaded.
    """
    source, request = _asked(data, seed, val_fraction, root, on_corrupt)
    splits = source.load(request)
    return splits.map(without_unreadable) if on_corrupt == "skip" else splits


def load_held(
    data: str | Path,
    *,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    val_fraction: float = 0.2,
    root: Path | None = None,
    on_corrupt: Literal["error", "skip"] = "error",
) -> Held:
    """The images of a data set to evaluate a model on: as ``load_data``, but a test folder alone is enough.

    Args:
        data: as for ``load_data``, and so are those that are not named here.
        classes: names of the model's classes; class folders are given their labels by them.
        on_corrupt: with ``"skip"`` images that cannot be read are left out of what ``Held.images`` is asked for.
    """
    source, request = _asked(data, seed, val_fraction, root, on_corrupt)
    held = replace(source.held(request, classes), on_corrupt=on_corrupt)
    for split in held.splits.values():
        split.classes = held.classes
    return held


def _asked(
    data: str | Path, seed: int, val_fraction: float, root: Path | None, on_corrupt: Literal["error", "skip"]
) -> tuple[Source, Request]:
    """The source of a data set, and what it is asked for; raises DataError for options that make no sense."""
    if not isinstance(data, str | os.PathLike):
        raise DataError(
            f"a data set is loaded by its name or folder; given {type(data).__name__}. What is loaded already, or made "
            "by you, goes to fit and evaluate as it is."
        )
    if on_corrupt not in ("error", "skip"):
        raise DataError(f"on_corrupt={on_corrupt!r}: expected 'error' or 'skip'.")
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction={val_fraction!r}: expected a share above 0 and below 1, such as 0.2.")
    source, given = _find_source(data)
    return source, Request(os.fspath(data), given, seed, val_fraction, root, on_corrupt)


def _find_source(data: str | Path) -> tuple[Source, str]:
    """The source that loads a DATA argument, and the argument without the source's prefix."""
    name = os.fspath(data)
    if isinstance(data, str) and (taking := [source for source in sources() if source.takes(name)]):
        source = min(taking, key=lambda source: source.order)
        return source, name.removeprefix(source.prefix)
    path = as_path(name, name)
    if taking := [source for source in sources() if source.recognises(path)]:
        return min(taking, key=lambda source: source.order), name
    raise _no_such_data(name, path)


def _no_such_data(name: str, path: Path) -> DataError:
    if path.exists():
        return DataError(f"{name!r} is a file, not a data set. Expected one of: {forms()}.")
    folders = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    # A name is compared with the names, a path with what lies beside it.
    known = [word for source in sources() for word in (*source.names, source.prefix) if word]
    near = difflib.get_close_matches(name, known, n=1) or [
        str(path.parent / hit) for hit in difflib.get_close_matches(path.name, folders, n=1)
    ]
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return DataError(f"no data set {name!r}, and no such folder.{hint} Expected one of: {forms()}.")
