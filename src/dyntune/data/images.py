"""Reading one image file as an RGB image, whatever its mode, with an error that names it when that cannot be done."""

import io
import os
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
