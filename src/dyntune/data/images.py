"""Image files: finding them in folders and behind command-line arguments, and reading them as RGB images."""

import glob
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from dyntune.core.errors import DataError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def is_image_name(name: str | os.PathLike[str]) -> bool:
    """Whether a file name has an image suffix and is not hidden (as the ``._x.jpg`` companions of some archives)."""
    path = Path(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded image as mode ``"RGB"``, 8 bits a channel, turned upright as its EXIF orientation says.

    Transparent images are laid on white, because the colour stored under transparent pixels is arbitrary. 16-bit
    grey images are scaled by 255/65535; Pillow's own conversion would clip nearly all of their range to white.

    Raises:
        ValueError: the pixels have no defined white (32-bit integer or floating-point images).
    """
    file_format = image.format  # a turned image has none
    image = ImageOps.exif_transpose(image)
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
    called = name if name is not None else str(source) if isinstance(source, str | os.PathLike) else "an image"
    try:
        if isinstance(source, str | os.PathLike) and os.path.exists(source) and not os.path.isfile(source):
            raise OSError("it is no file")  # a pipe would be waited for, a device read for ever
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            return to_rgb(image)
    except FileNotFoundError as error:
        raise DataError(
            f"{called}: there is no such image file. Restore it, or remove it from the data set."
        ) from error
    except Exception as error:
        # Decoders fail with many types (OSError, SyntaxError, ValueError, zlib.error, ...): all mean a bad image.
        raise DataError(
            f"{called}: cannot be read as an image ({error}). Expected a complete file in a format that Pillow reads; "
            "replace or remove it, or load the data set with on_corrupt='skip' (--on-corrupt skip)."
        ) from error


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
