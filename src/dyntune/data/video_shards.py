"""Videos in WebDataset shards: found by the headers of the tar files, and read one by one when they are wanted."""

from __future__ import annotations

import contextlib
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from dyntune.core.errors import DataError
from dyntune.data.base import LabelledImages
from dyntune.data.datasets import content_digest
from dyntune.data.images import is_image_name
from dyntune.data.video_files import Piece, require_reader
from dyntune.data.videos import SKIP, Video, is_video_name

_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")
"""A member's key, up to the first point of its name, and its suffix."""


class _Sample(NamedTuple):
    """One sample of a shard.

    Args:
        source: what to call it in messages.
        video: None where it has none.
        label: as it is written; None where it has none.
    """

    source: str
    video: Piece | None
    label: str | None

    @property
    def whole(self) -> bool:
        return self.video is not None and self.label is not None and self.label.isdecimal()


class ShardVideos(LabelledImages):
    """The videos of shards, each with a whole-number label in a ``.cls`` file beside it.

    Only where they lie is kept, so that a shard may be larger than memory.

    Args:
        shards: local tar files that are not compressed.
        on_corrupt: with ``"skip"`` samples without a video or a label are left out and named in ``skipped``.

    Raises:
        DataError: a sample lacks one of them, or a shard is compressed.
    """

    videos = True
    reads_files = True

    def __init__(self, shards: Sequence[Path], on_corrupt: Literal["error", "skip"] = "error") -> None:
        require_reader()
        found = [sample for shard in shards for sample in _samples(shard)]
        bad = [sample.source for sample in found if not sample.whole]
        if bad and on_corrupt == "error":
            raise DataError(
                f"{bad[0]}: expected a video and its whole-number label in a .cls file; so it is with {len(bad)} of "
                f"{len(found)} samples. Mend the shard. {SKIP}"
            )
        self.samples = [sample for sample in found if sample.whole]
        super().__init__([int(sample.label or 0) for sample in self.samples], skipped=bad)
        self._opened: dict[int, Video] = {}

    def read(self, index: int) -> Video:  # type: ignore[override]
        """The video at ``index``; what is known of its length is kept."""
        index = range(len(self.samples))[index]
        piece = self.samples[index].video
        assert piece is not None  # of whole samples
        return self._opened.setdefault(index, Video(piece, self.source(index), SKIP))

    def source(self, index: int) -> str:
        return self.samples[index].source

    def place(self, index: int) -> str:
        return self.identity(index)

    def identity(self, index: int) -> str:
        piece = self.samples[index].video
        assert piece is not None
        return content_digest(piece.path, piece.start, piece.size)


def holds_videos(shard: Path) -> bool:
    """Whether the first sample of a tar file that shows something is a video."""
    with contextlib.suppress(tarfile.TarError, OSError, EOFError), tarfile.open(shard) as archive:
        for member in archive:
            if member.isfile() and is_video_name(member.name):
                return True
            if member.isfile() and is_image_name(member.name):
                return False
    return False


def _samples(shard: Path) -> Iterator[_Sample]:
    """The samples of a shard; of one that was cut, those before."""
    try:
        with tarfile.open(shard, "r:") as archive:
            yield from _grouped(archive, shard)
    except tarfile.ReadError as error:
        raise DataError(f"{shard}: expected a tar file that is not compressed ({error}). Unpack it to one.") from error


def _grouped(archive: tarfile.TarFile, shard: Path) -> Iterator[_Sample]:
    """Samples are the files in a row with one key."""
    key, video, label, name = "", None, None, ""
    with contextlib.suppress(tarfile.TarError, EOFError):
        for member in archive:
            parts = _KEY.fullmatch(member.name)
            if not member.isfile() or parts is None:
                continue
            if parts[1] != key:
                if key:
                    yield _Sample(f"{shard}: {name}", video, label)
                key, video, label, name = parts[1], None, None, member.name
            if is_video_name(member.name):
                video, name = Piece(str(shard), member.offset_data, member.size), member.name
            elif parts[2].lower() == "cls" and (file := archive.extractfile(member)):
                label = file.read().decode("utf-8", "replace").strip()
    if key:
        yield _Sample(f"{shard}: {name}", video, label)
