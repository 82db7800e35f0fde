"""Data sets that can only be read from front to back (WebDataset shards, TensorFlow Datasets), brought to memory."""

import contextlib
import io
import logging
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from dyntune.core.errors import DataError
from dyntune.core.words import counted
from dyntune.data.datasets import EncodedImages
from dyntune.data.images import image_suffixes, read_image, to_rgb

MEMORY_LIMIT = 4 * 1024**3
_BLOCK = 512


def shard_images() -> str:
    """The suffixes of images in shards, as timm asks for them; of several images of a sample the first is taken."""
    common = ("jpg", "jpeg", "png", "webp")
    return ";".join((*common, *sorted({suffix[1:] for suffix in image_suffixes()} - set(common))))


def is_whole(shard: Path) -> bool:
    """Whether a tar file ends as one does; readers pass over what is missing behind a cut, without a word."""
    try:
        with tarfile.open(shard) as archive:
            for _ in archive:
                pass
            assert archive.fileobj is not None  # it is open
            archive.fileobj.seek(archive.offset)
            # An archive ends with blocks of zeros; a header that cannot be read ends it for tarfile, too.
            return archive.fileobj.read(_BLOCK) == bytes(_BLOCK)
    except (tarfile.TarError, OSError, EOFError, zlib.error):
        return False


def open_stream(name: str, hint: str, **settings: Any) -> Any:
    """A stream of (image, label) pairs through timm's data set factory.

    Args:
        name: the DATA argument, which is what timm calls the data set too.
        hint: what to do where the data set cannot be loaded.
        settings: further arguments of ``timm.data.create_dataset``.

    Raises:
        DataError: it cannot be loaded.
    """
    from timm.data import create_dataset

    try:
        with _reader_warnings():  # that there is no info file, which there need not be
            return create_dataset(name, **settings)
    except Exception as error:
        # The readers raise what the libraries behind them do, ImportError among it.
        raise DataError(f"{name}: cannot be loaded ({type(error).__name__}: {error}). To mend this, {hint}.") from error


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def _reader_warnings() -> Iterator[list[str]]:
    """What timm's reader warns of: it leaves bad samples out with a warning, and that is the only trace of them."""
    logger = logging.getLogger("timm.data.readers.reader_wds")
    records = _Records()
    propagate, level = logger.propagate, logger.level
    logger.addHandler(records)
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    try:
        yield records.messages
    finally:
        logger.removeHandler(records)
        logger.propagate = propagate
        logger.setLevel(level)


def _bad_members(shards: Sequence[Path]) -> list[str]:
    """The images in local shards that cannot be decoded, as ``shard: member``."""
    bad, suffixes = [], image_suffixes()
    for shard in shards:
        with contextlib.suppress(tarfile.TarError, OSError, EOFError), tarfile.open(shard) as archive:
            for member in archive:
                if member.isfile() and Path(member.name).suffix.lower() in suffixes:
                    file = archive.extractfile(member)
                    try:
                        read_image(file.read() if file else b"")
                    except DataError:
                        bad.append(f"{shard}: {member.name}")
    return bad


def _read_all(stream: Any, name: str) -> tuple[list[bytes], list[int]]:
    """The images of a stream as PNG files, and their labels."""
    files, targets, size = [], [], 0
    for image, target in stream:
        buffer = io.BytesIO()
        to_rgb(image).save(buffer, format="PNG", compress_level=1)
        files.append(buffer.getvalue())
        targets.append(int(target))
        size += len(files[-1])
        if size > MEMORY_LIMIT:
            raise DataError(
                f"{name}: more than {MEMORY_LIMIT // 1024**3} GiB of images. Expected a set that fits into memory; "
                "unpack it into an image folder and give that folder instead."
            )
    return files, targets


def collect(
    stream: Any, name: str, *, on_corrupt: Literal["error", "skip"], shards: Sequence[Path] = ()
) -> EncodedImages:
    """Read a stream of timm's once, from its first sample to its last, into memory.

    Holding the images is what lets them be shuffled as a whole, split by class and counted. They take about as much
    room as PNG files.

    Args:
        stream: what ``open_stream`` gives.
        name: what to call the split in messages.
        on_corrupt: with ``"skip"`` samples that cannot be read are left out and named in ``skipped``.
        shards: the tar files behind the stream, to name the images in them that cannot be read.

    Raises:
        DataError: the images take more than 4 GiB, or one cannot be read and ``on_corrupt`` is ``"error"``.
    """
    # In a run of several processes timm would give each of them a part only; a sampler shares the samples out later.
    stream.reader.dist_rank, stream.reader.dist_num_replicas, stream.reader.global_num_workers = 0, 1, 1
    with _reader_warnings() as warnings:
        try:
            files, targets = _read_all(stream, name)
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"{name}: cannot be read ({type(error).__name__}: {error}). Expected samples of an image and a "
                "whole-number label; mend the files."
            ) from error
    bad = _bad_members(shards)[: len(warnings)] if warnings else []
    bad += [f"{name}: a sample without a readable image and label"] * (len(warnings) - len(bad))
    if bad and on_corrupt == "error":
        raise DataError(
            f"{name}: {counted(len(warnings), 'sample')} cannot be read, the first being {bad[0]} ({warnings[0]}). "
            "Expected complete images with labels (.cls); mend the shard, or load the data set with "
            "on_corrupt='skip' (--on-corrupt skip)."
        )
    return EncodedImages(files, targets, name, bad)
