"""Image files: finding them in folders and behind command-line arguments, and reading them as RGB images."""

import functools
import glob
import io
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from dyntune.core.errors import DataError
from dyntune.core.texts import printable
from dyntune.core.words import counted

NOT_READ = ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF")
"""Formats that Pillow knows when it sees them, but cannot read a picture of by itself.

PostScript (EPS, which an IPTC file may hold) is a program, which it would have Ghostscript run."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its EXIF orientation."""
_ORIENTATION = 0x0112
_USUAL = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_NO_DATA = ("thumbs.db", "desktop.ini")
"""What file managers leave in folders."""
_NO_FOLDERS = ("__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information")
"""Folders that archives, file systems and servers leave beside others."""
_DRAWN = re.compile(r"(tokens|reductions)-.+|activation(-data)?|tradeoff|search|accuracy_over_macs", re.IGNORECASE)
"""Names of the pictures that ``visualize`` and the studies write, without suffix."""

log = logging.getLogger("dyntune")


def image_suffixes() -> frozenset[str]:
    """Suffixes of the files that Pillow reads here, in small letters; those of its plug-ins are among them."""
    Image.init()
    return _readable(len(Image.EXTENSION), len(Image.OPEN))


def in_short(suffixes: Collection[str], usual: Sequence[str] = _USUAL) -> str:
    """The usual ones of many suffixes, and how many there are beside them."""
    shown = [suffix for suffix in usual if suffix in suffixes]
    others = len(suffixes) - len(shown)
    return ", ".join(shown) + (f" and {others} more" if others else "")


@functools.cache
def _readable(extensions: int, formats: int) -> frozenset[str]:
    """The suffixes, as long as there are so many extensions and formats: a plug-in registers more of them."""
    read = _formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in read)


def _formats() -> list[str]:
    """The formats that are read, whatever a file is called; in the order in which they are tried."""
    Image.init()
    return [name for name in Image.ID if name not in NOT_READ]


def is_image_name(name: str | os.PathLike[str]) -> bool:
    """Whether a file name has an image suffix and is not hidden (as the ``._x.jpg`` companions of some archives)."""
    path = Path(name)
    return path.suffix.lower() in image_suffixes() and not path.name.startswith(".")


def is_data_folder(name: str) -> bool:
    """Whether a folder of this name can hold data: it is neither hidden nor one that tools leave behind."""
    return not name.startswith(".") and name.lower() not in _NO_FOLDERS


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded image as mode ``"RGB"``, 8 bits a channel, turned upright as its EXIF orientation says.

    Transparent images are laid on white, because the colour stored under transparent pixels is arbitrary. 16-bit
    grey images are scaled by 255/65535; Pillow's own conversion would clip nearly all of their range to white.

    Raises:
        ValueError: the pixels have no defined white (32-bit integer or floating-point images).
    """
    file_format = image.format  # a turned image has none
    image.load()  # some files have their EXIF data behind the pixels
    # Not with ImageOps.exif_transpose, which writes the other tags anew and fails where one of them is malformed.
    turn = TURNS.get(image.getexif().get(_ORIENTATION, 1))
    image = image if turn is None else image.transpose(turn)
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in (None, "PNG", "PPM")):
        levels = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers (mode {image.mode!r}), which have no defined white level")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def read_image(source: str | os.PathLike[str] | bytes | BinaryIO, name: str | None = None) -> Image.Image:
    """Decode one image in full and return it as RGB.

    Args:
        source: a path, the bytes of an image file, or an open binary file.
        name: what to call the image in an error; a path is its own name.

    Raises:
        DataError: there is no such file, or it cannot be decoded as an image; a truncated file counts as undecodable.
    """
    path = source if isinstance(source, str | os.PathLike) else None
    called = printable(name if name is not None else "an image" if path is None else os.fspath(path))
    try:
        if path is not None and not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is no regular file")  # opening a pipe or a device may wait for ever
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats()) as image:
            image.load()
            return to_rgb(image)
    except FileNotFoundError as error:
        raise DataError(
            f"{called}: there is no such image file. Restore it, or remove it from the data set."
        ) from error
    except Exception as error:
        # Decoders fail with many types (OSError, SyntaxError, ValueError, zlib.error, ...): all mean a bad image.
        raise DataError(
            f"{called}: cannot be read as an image ({printable(str(error))}). Expected a complete file in a format "
            "that Pillow reads; replace or remove it."
        ) from error


def list_images(folder: Path) -> list[Path]:
    """All image files under ``folder`` at any depth, by suffix, sorted by path; hidden files and folders are left out.

    Links to folders are followed; one that leads back to a folder above it is left out rather than followed for ever.
    Folders further down that hold nothing but pictures that Dyntune drew are left out too.
    """
    return scan_images(folder)[0]


def scan_images(folder: Path) -> tuple[list[Path], Counter[str]]:
    """As ``list_images``, and of the files that it leaves out, how many there are of each suffix."""
    found: list[Path] = []
    left: Counter[str] = Counter()
    for parent, files in walk_data(folder):
        images = [name for name in files if is_image_name(name)]
        if parent != folder and drawn(images):
            left["pictures drawn by dyntune"] += len(images)
            images = []
        found += [parent / name for name in images]
        left += suffixes_of(name for name in files if not is_image_name(name))
    return sorted(found), left


def walk_data(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder and all that can hold data below it, links followed but for those that lead back; with their files.

    Raises:
        DataError: a folder cannot be looked into, and what it holds would be missing without a word.
    """

    def refuse(error: OSError) -> None:
        raise DataError(
            f"{printable(os.fspath(error.filename))}: the folder cannot be looked into ({error.strerror}). Make it "
            "readable, or move it away."
        ) from error

    seen: dict[str, frozenset[str]] = {str(folder): frozenset({os.path.realpath(folder)})}
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        above = seen.pop(parent)
        inside = []
        for name in folders:
            real = os.path.realpath(os.path.join(parent, name))
            if is_data_folder(name) and real not in above:
                inside.append(name)
                seen[os.path.join(parent, name)] = above | {real}
        folders[:] = inside
        yield Path(parent), files


def suffixes_of(names: Iterable[str]) -> Counter[str]:
    """How many files there are of each suffix, without hidden ones and those that file managers leave."""
    shown = (name for name in names if not name.startswith(".") and name.lower() not in _NO_DATA)
    return Counter(Path(name).suffix.lower() or "no suffix" for name in shown)


def drawn(images: Sequence[str]) -> bool:
    """Whether a folder's images are those that ``visualize`` or a study writes, by their names."""
    return bool(images) and all(_DRAWN.fullmatch(Path(name).stem) for name in images)


def report_left_out(
    place: str | os.PathLike[str], left: Counter[str], expected: str = "images which Pillow reads"
) -> None:
    """Says in a line how many files of each suffix are not what was expected, if there are any."""
    if left:
        kinds = ", ".join(f"{count} {printable(kind)}" for kind, count in left.most_common())
        log.warning(
            "%s: left out %s that %s no %s: %s.",
            printable(os.fspath(place)),
            counted(left.total(), "file"),
            "is" if left.total() == 1 else "are",
            expected,
            kinds,
        )


def matches(
    argument: str,
    inside: Callable[[Path], Sequence[Path]],
    named: Callable[[str], bool],
    expected: str = "images which Pillow reads",
) -> Iterator[Path]:
    """What one argument of a command stands for; a file that exists is taken at its word, whatever its suffix.

    Args:
        argument: a file, a folder or a pattern.
        inside: what is taken of a folder.
        named: whether a file that a pattern finds is taken, by its name.
        expected: what others are not, as is said of them.
    """
    if not argument:
        return  # Path("") would be the current folder
    path = _home(argument)
    if path.is_dir():
        yield from inside(path)
    elif path.exists():
        yield path
    else:
        taken, left = False, []
        for hit in sorted(glob.glob(_pattern(path), recursive=True)):
            if Path(hit).is_dir():
                yield from inside(Path(hit))
            elif named(hit):
                taken = True
                yield Path(hit)
            else:
                left.append(Path(hit).name)
        if taken:
            report_left_out(argument, suffixes_of(left), expected)


def require_some(arguments: Sequence[str]) -> None:
    """Raises DataError where none is there, whatever they hold: what needs no model is said before one is read."""
    if not any(any(matches(argument, lambda folder: [folder], lambda name: True)) for argument in arguments):
        raise DataError(
            f"no image found for {', '.join(map(repr, arguments))}, and no video. Expected files, folders or patterns "
            "that match some; check the spelling."
        )


def _home(argument: str) -> Path:
    """The path with ``~`` replaced; a name that merely begins so stays as it is."""
    try:
        return Path(argument).expanduser()
    except RuntimeError:
        return Path(argument)


def _folder(path: Path) -> list[Path]:
    images, left = scan_images(path)
    if images:
        report_left_out(path, left)
    return images


def _pattern(path: Path) -> str:
    """The path as a pattern in which folders that are there stand for themselves, whatever signs their names have."""
    known, *rest = path.parts
    there = Path(known)
    fixed = glob.escape(known) if there.exists() else known
    for number, part in enumerate(rest):
        if not (there / part).exists():
            return os.path.join(fixed, *rest[number:])
        there /= part
        fixed = os.path.join(fixed, glob.escape(part))
    return fixed


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
        hits = list(matches(argument, _folder, is_image_name))
        if not hits:
            raise DataError(
                f"no image found for {argument!r}. Expected an image file, a folder that holds images "
                f"({in_short(image_suffixes())}) or a pattern that matches some; check the spelling."
            )
        found.update(dict.fromkeys(hits))
    return list(found)
