"""Videos as data: files and folders of frames, found, opened when a frame is wanted, and labelled."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from dyntune.core.errors import DataError
from dyntune.core.texts import printable
from dyntune.core.words import counted
from dyntune.data.datasets import FileImages, content_digest
from dyntune.data.images import (
    in_short,
    is_image_name,
    matches,
    read_image,
    report_left_out,
    suffixes_of,
    walk_data,
)
from dyntune.data.video_files import About, Piece, Source, about, read_frames, read_whole, require_reader

VIDEO_SUFFIXES = frozenset(
    {".3gp", ".asf", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm"}
    | {".wmv"}
)
_USUAL = (".mp4", ".avi", ".mov", ".mkv", ".webm")
_ASKED = 8
"""Folders of frames of a data set that are looked into for the order of their names; others are named alike."""
SKIP = "Or load the data set with on_corrupt='skip' (--on-corrupt skip), which leaves such videos out."

log = logging.getLogger("dyntune")


class Video:
    """A video that is opened when it is read, and closed again: it can be pickled, and carried into other processes.

    Args:
        source: a file, the bytes of one or a piece of a larger file, or a folder of frames, whose order is that of
            their names.
        name: what to call it in errors; by default its path.
        advice: what errors say at their end.
    """

    def __init__(self, source: Source, name: str | None = None, advice: str = "") -> None:
        self.source = source if isinstance(source, bytes | Piece) else os.fspath(source)
        self.name = printable(name or (self.source if isinstance(self.source, str) else "a video"))
        self.advice = advice
        self._about: About | None = None

    def about(self) -> About:
        """What the file says of itself, read once.

        Raises:
            DataError: it cannot be opened, or holds no pictures.
        """
        if self._about is None:
            with self._advised():
                folder = self._folder
                self._about = About(len(self._frames()), (0, 0), None) if folder else about(self.source, self.name)
        return self._about

    def __len__(self) -> int:
        return self.about().count

    def read(self, indices: Sequence[int], change: Callable[[Image.Image], Any] = lambda frame: frame) -> list[Any]:
        """What ``change`` makes of the frames with these numbers, in their order; each is changed as it is read.

        Raises:
            DataError: the video cannot be read as far as that.
        """
        count = len(self)
        wrong = [index for index in indices if not 0 <= index < count]
        if wrong:
            raise DataError(f"{self.name}: has {counted(count, 'frame')}, numbered from 0; frame {wrong[0]} is wanted.")
        with self._advised():
            if self._folder:
                frames = self._frames()
                return [change(read_image(frames[index])) for index in indices]
            return read_frames(self.source, self.name, indices, count, change)

    def load(self) -> None:
        """Reads every frame in order, without seeking: a file that is damaged in between has its first and its last.

        Raises:
            DataError: the video is not whole.
        """
        if self._folder:
            self.read(range(len(self)), lambda frame: None)
            return
        count = len(self)
        with self._advised():
            read_whole(self.source, self.name, count)

    @contextmanager
    def _advised(self) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            raise DataError(f"{error} {self.advice}".rstrip()) from error

    @property
    def _folder(self) -> bool:
        return isinstance(self.source, str) and os.path.isdir(self.source)

    def _frames(self) -> list[Path]:
        frames = _frames_in(Path(str(self.source)))
        if not frames:
            raise DataError(f"{self.name}: no frames in the folder. Expected image files, ordered by their names.")
        return frames


class LabelledVideos(FileImages):
    """Videos, of which ``read`` gives a ``Video`` instead of an image.

    Args:
        paths: one file, or folder of frames, for each label.
        targets: zero-based labels.
        origins: for each video the list-file line that names it, for errors; None where there is no list.
        root: the folder below which videos are known by their paths; None where they are known by their order.
    """

    videos = True

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        targets: Sequence[int],
        origins: Sequence[str] | None = None,
        root: Path | None = None,
    ) -> None:
        super().__init__(paths, targets, origins, root)
        if any(map(is_video_name, self.paths)):
            require_reader()
        self._opened: dict[int, Video] = {}
        folders = (path for path in self.paths if not is_video_name(path) and os.path.isdir(path))
        _warn_of_order(islice(folders, _ASKED))

    def read(self, index: int) -> Video:  # type: ignore[override]
        """The video at ``index``; what is known of its length is kept."""
        index = range(len(self.paths))[index]
        return self._opened.setdefault(index, Video(self.paths[index], self.source(index), SKIP))

    def identity(self, index: int) -> str:
        """Of a folder of frames by their number and the content of the first, the middle and the last."""
        path = Path(self.paths[index])
        if not path.is_dir():
            return super().identity(index)
        frames = _frames_in(path)
        known = [content_digest(frames[place]) for place in (0, len(frames) // 2, -1)] if frames else []
        return hashlib.blake2b(f"{len(frames)} {known}".encode(), digest_size=8).hexdigest()


def _frames_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and is_image_name(path))


def _warn_of_order(folders: Iterable[str | os.PathLike[str]]) -> None:
    """Says of the first of the folders of frames where it is so that the order of names is not that of numbers."""
    for folder in folders:
        names = [path.name for path in _frames_in(Path(folder))]
        for before, after in pairwise(names):
            if _with_numbers(before) > _with_numbers(after):
                log.warning(
                    "%s: frames are read in the order of their names, %s before %s. If that is not how they follow "
                    "each other, give their numbers leading zeros, in all folders of frames.",
                    printable(os.fspath(folder)),
                    printable(before),
                    printable(after),
                )
                return


def _with_numbers(name: str) -> list[str | int]:
    """A name in which numbers are numbers, to be ordered by."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]+)", name))]


def is_video_name(name: str | os.PathLike[str]) -> bool:
    """Whether a file name has a video suffix and is not hidden."""
    path = Path(name)
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".")


def holds_frames(files: Sequence[str]) -> bool:
    """Whether a folder with these files holds the frames of a video, and not videos."""
    return any(map(is_image_name, files)) and not any(map(is_video_name, files))


def list_videos(folder: Path) -> list[Path]:
    """Video files and folders of frames under ``folder``, sorted; hidden ones are left out.

    A folder below it that holds image files and no video is the frames of one.
    """
    return scan_videos(folder)[0]


def scan_videos(folder: Path) -> tuple[list[Path], Counter[str]]:
    """As ``list_videos``, and of the files that it leaves out, how many there are of each suffix."""
    found: list[Path] = []
    left: Counter[str] = Counter()
    for parent, files in walk_data(folder):
        if parent != folder and holds_frames(files):
            found.append(parent)
            left += suffixes_of(name for name in files if not is_image_name(name))
        else:
            found += [parent / name for name in files if is_video_name(name)]
            left += suffixes_of(name for name in files if not is_video_name(name))
    return sorted(found), left


def report_left(place: Path, left: Counter[str]) -> None:
    """Says in a line how many files of each suffix are no videos, if there are any."""
    report_left_out(place, left, "videos, nor frames of one in a folder of their own")


def expand_videos(arguments: Sequence[str]) -> list[Path]:
    """The videos that command-line arguments stand for, in the order of the arguments, each once.

    Args:
        arguments: files; folders of frames; folders of videos, searched at every depth; patterns.

    Raises:
        DataError: an argument stands for no video.
    """
    found: dict[Path, None] = {}
    for argument in arguments:
        hits = list(matches(argument, _inside, is_video_name, "videos"))
        if not hits:
            raise DataError(
                f"no videos behind {argument!r}. Expected a video file, a folder of frames, a folder that holds videos "
                f"({in_short(VIDEO_SUFFIXES, _USUAL)}) or a pattern that matches some; check the spelling."
            )
        found.update(dict.fromkeys(hits))
    _warn_of_order(path for path in found if path.is_dir())
    if any(map(is_video_name, found)):
        require_reader()
    return list(found)


def _inside(path: Path) -> list[Path]:
    videos, left = scan_videos(path)
    if videos:
        report_left(path, left)
    return videos or [path] * bool(_frames_in(path))
