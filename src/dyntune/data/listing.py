"""Finding image files: under a folder, and behind the arguments of a command line."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from dyntune.core.errors import DataError
from dyntune.data.images import IMAGE_SUFFIXES, is_image_name


def list_images(folder: Path) -> list[Path]:
    """All image files under ``folder`` at any depth, by suffix, sorted by path; hidden files and folders are left out.

    Links to folders are followed; one that leads back to a folder above it is left out rather than followed for ever.
    """
    found: list[Path] = []
    seen: dict[str, frozenset[str]] = {str(folder): frozenset({os.path.realpath(folder)})}
    for parent, folders, files in os.walk(folder, followlinks=True):
        above = seen.pop(parent)
        inside = []
        for name in folders:
            real = os.path.realpath(os.path.join(parent, name))
            if not name.startswith(".") and real not in above:
                inside.append(name)
                seen[os.path.join(parent, name)] = above | {real}
        folders[:] = inside
        found += [Path(parent, name) for name in files if is_image_name(name)]
    return sorted(found)


def _matches(argument: str) -> Iterator[Path]:
    """Image files behind one argument; a file that exists is taken at its word, whatever its suffix."""
    if not argument:
        return  # Path("") would be the current folder
    path = Path(argument).expanduser()
    if path.is_dir():
        yield from list_images(path)
    elif path.exists():
        yield path
    else:
        for hit in sorted(glob.glob(str(path), recursive=True)):
            if Path(hit).is_dir():
                yield from list_images(Path(hit))
            elif is_image_name(hit):
                yield Path(hit)


def expand_images(paths: Sequence[str]) -> list[Path]:
    """The image files that command-line arguments stand for, in the order of the arguments, each once.

    Args:
        paths: files; folders (searched at every depth, sorted); patterns such as ``"photos/*.jpg"`` or
            ``"photos/**/*.png"`` (sorted).

    Raises:
        DataError: an argument stands for no image.
    """
    found: dict[Path, None] = {}
    for argument in paths:
        hits = list(_matches(argument))
        if not hits:
            raise DataError(
                f"no image found for {argument!r}. Expected an image file, a folder that holds images "
                f"({' '.join(sorted(IMAGE_SUFFIXES))}) or a pattern that matches some; check the spelling."
            )
        found.update(dict.fromkeys(hits))
    return list(found)
