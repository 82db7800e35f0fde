"""From the DATA argument of a command to a data set: the names and path forms there are."""

import difflib
import os
from pathlib import Path
from typing import Literal

from dyntune.core.errors import DataError
from dyntune.data.base import DataSplits
from dyntune.data.scan import scan
from dyntune.data.sources.digits import load_digits
from dyntune.data.sources.factory import data_root, load_hub, load_torch
from dyntune.data.sources.folder import load_folder
from dyntune.data.sources.shapes import TASKS, load_shapes
from dyntune.data.sources.streams import load_tfds, load_wds
from dyntune.data.sources.vtab import load_vtab_task

NAMES = ("digits", *(f"shapes-{task}" for task in TASKS))
PREFIXES = ("folder:", "vtab:", "torch/", "hfds/", "wds/", "tfds/")
FORMS = (
    f"{', '.join(NAMES)}; folder:PATH or the PATH of an image folder; vtab:PATH or the PATH of a VTAB-1K task folder; "
    "torch/NAME, hfds/NAME, wds/PATH or tfds/NAME"
)


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
        data: ``digits``; ``shapes-location`` or ``shapes-orientation``; ``folder:PATH``, ``vtab:PATH`` or just a PATH;
            ``torch/NAME``, ``hfds/NAME``, ``wds/PATH`` or ``tfds/NAME``. A name wins over a folder that is called the
            same; a :class:`~pathlib.Path` is always a folder.
        seed: chooses the validation images where they must be split off, and the pictures of procedural sets.
        val_fraction: share of the training images to split off, between 0 and 1, where there is no validation split.
        root: where data sets with a loader of their own (``torch/`` and so on) are looked for and downloaded to;
            ``$DYNTUNE_DATA`` or ``~/.cache/dyntune/data`` by default.
        on_corrupt: with ``"error"`` nothing is checked beforehand, and an image that cannot be read is an error
            naming its file when it is read. With ``"skip"`` every image is decoded once now
            (:func:`dyntune.data.scan.scan` says what that costs), and those that are missing or cannot be read
            are left out and named in ``skipped``.

    Returns:
        The splits, giving PIL RGB images; put a transform on them with ``with_transform``.

    Raises:
        DataError: there is no such data set, or it is malformed, or it can neither be found nor downloaded.
    """
    if on_corrupt not in ("error", "skip"):
        raise DataError(f"on_corrupt={on_corrupt!r}: expected 'error' or 'skip'.")
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction={val_fraction!r}: expected a share above 0 and below 1, such as 0.2.")
    splits = _load(data, seed, val_fraction, root, on_corrupt)
    return splits.map(scan) if on_corrupt == "skip" else splits


def _load(
    data: str | Path, seed: int, val_fraction: float, root: Path | None, on_corrupt: Literal["error", "skip"]
) -> DataSplits:
    name = os.fspath(data)
    if isinstance(data, str):
        if name == "digits":
            return load_digits()
        if name == "shapes":
            raise DataError(
                "'shapes' is two data sets: expected 'shapes-location' (tell the column that a shape is in) or "
                "'shapes-orientation' (tell the direction of its tip)."
            )
        if name in NAMES:
            return load_shapes(name.removeprefix("shapes-"), seed=seed)
        if name.startswith("folder:"):
            return _load_folder(name.removeprefix("folder:"), name, seed, val_fraction)
        if name.startswith("vtab:"):
            return load_vtab_task(Path(name.removeprefix("vtab:")).expanduser(), on_corrupt=on_corrupt, name=name)
        if name.startswith("torch/"):
            if name.lower() in ("torch/image_folder", "torch/folder"):
                # The layout of folder:, but where a split has no folder timm would give the whole root in its place.
                return _load_folder(str(data_root(root)), name, seed, val_fraction)
            return load_torch(name, data_root(root), seed=seed, val_fraction=val_fraction)
        if name.startswith("hfds/"):
            return load_hub(name, data_root(root), seed=seed, val_fraction=val_fraction)
        if name.startswith("tfds/"):
            return load_tfds(name, data_root(root), seed=seed, val_fraction=val_fraction, on_corrupt=on_corrupt)
        if name.startswith("wds/"):
            given = Path(name.removeprefix("wds/")).expanduser()
            folder = given if root is None and given.is_dir() else data_root(root) / given
            return load_wds(name, folder, seed=seed, val_fraction=val_fraction, on_corrupt=on_corrupt)
    path = Path(name).expanduser()
    if (path / "train800.txt").is_file():
        return load_vtab_task(path, on_corrupt=on_corrupt, name=name)
    if path.is_dir():
        return load_folder(path, seed=seed, val_fraction=val_fraction, name=name)
    raise _no_such_data(name, path)


def _load_folder(path: str, name: str, seed: int, val_fraction: float) -> DataSplits:
    return load_folder(Path(path).expanduser(), seed=seed, val_fraction=val_fraction, name=name)


def _no_such_data(name: str, path: Path) -> DataError:
    if path.exists():
        return DataError(f"{name!r} is a file, not a data set. Expected one of: {FORMS}.")
    folders = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    # A name is compared with the names, a path with what lies beside it.
    near = difflib.get_close_matches(name, (*NAMES, *PREFIXES), n=1) or [
        str(path.parent / hit) for hit in difflib.get_close_matches(path.name, folders, n=1)
    ]
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return DataError(f"no data set {name!r}, and no such folder.{hint} Expected one of: {FORMS}.")
