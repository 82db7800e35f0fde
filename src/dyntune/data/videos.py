"""Videos as data: files and folders of frames, found, opened when a frame is wanted, and labelled."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dyntune.core.errors import DataError
from dyntune.data.base import LabelledImages
from dyntune.data.images import is_image_name, read_image
from dyntune.data.video_files import About, about, read_frames

VIDEO_SUFFIXES = frozenset(
    {".3gp", ".asf", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm"}
    | {".wmv"}
)


class Video:
    """A video that is opened when it is read, and closed again: it can be pickled, and carried into other processes.

    Args:
        source: a file, the bytes of one, or a folder of frames, whose order is that of their names.
        name: what to call it in errors; by default its path.
    """

    def __init__(self, source: str | os.PathLike[str] | bytes, name: str | None = None) -> None:
        self.source = source if isinstance(source, bytes) else os.fspath(source)
        self.name = name or ("a video" if isinstance(source, bytes) else os.fspath(source))
        self._about: About | None = None

    def about(self) -> About:
        """What the file says of itself, read once.

        Raises:
            DataError: it cannot be opened, or holds no pictures.
        """
        if self._about is None:
            self._about = About(len(self._frames()), (0, 0), None) if self._folder else about(self.source, self.name)
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
            raise DataError(f"{self.name}: has {count} frames, numbered from 0; frame {wrong[0]} is wanted.")
        if self._folder:
            frames = self._frames()
            return [change(read_image(frames[index])) for index in indices]
        return read_frames(self.source, self.name, indices, count, change)

    def load(self) -> None:
        """Reads the first and the last frame, which tells a video that is whole from one that is not.

        Raises:
            DataError: it is not.
        """
        self.read([0, len(self) - 1], lambda frame: None)

    @property
    def _folder(self) -> bool:
        return isinstance(self.source, str) and os.path.isdir(self.source)

    def _frames(self) -> list[Path]:
        frames = sorted(path for path in Path(str(self.source)).iterdir() if path.is_file() and is_image_name(path))
        if not frames:
            raise DataError(f"{self.name}: no frames in the folder. Expected image files, ordered by their names.")
        return frames


class LabelledVideos(LabelledImages):
    """Videos, of which ``read`` gives a ``Video`` instead of an image.

    Args:
        paths: one file, or folder of frames, for each label.
        targets: zero-based labels.
        origins: for each video the list-file line that names it, for errors; None where there is no list.
    """

    reads_files = True
    videos = True

    def __init__(
        self, paths: Sequence[str | os.PathLike[str]], targets: Sequence[int], origins: Sequence[str] | None = None
    ) -> None:
        super().__init__(targets)
        if len(paths) != len(self.targets):
            raise DataError(f"{len(paths)} videos do not go with {len(self.targets)} labels: expected one for one.")
        self.paths = tuple(os.fspath(path) for path in paths)
        self.origins = None if origins is None else tuple(origins)
        self._opened: dict[int, Video] = {}

    def read(self, index: int) -> Video:  # type: ignore[override]
        """The video at ``index``; what is known of its length is kept."""
        index = range(len(self.paths))[index]
        return self._opened.setdefault(index, Video(self.paths[index], self.source(index)))

    def source(self, index: int) -> str:
        return self.paths[index] if self.origins is None else f"{self.paths[index]} ({self.origins[index]})"


def is_video_name(name: str | os.PathLike[str]) -> bool:
    """Whether a file name has a video suffix and is not hidden."""
    path = Path(name)
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".")


def list_videos(folder: Path) -> list[Path]:
    """Video files and folders of frames under ``folder``, sorted; hidden ones are left out.

    A folder below it that holds image files and no video is the frames of one.
    """
    found: list[Path] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        videos = [Path(parent, name) for name in files if is_video_name(name)]
        if not videos and Path(parent) != folder and any(map(is_image_name, files)):
            found.append(Path(parent))
        found += videos
    return sorted(found)


def expand_videos(arguments: Sequence[str]) -> list[Path]:
    """The videos behind command-line arguments: files, folders of frames, folders of videos, or globs.

    Raises:
        DataError: an argument names none.
    """
    found: list[Path] = []
    for argument in arguments:
        path = Path(argument).expanduser()
        if path.is_dir():
            own = list_videos(path)
            if not own and any(is_image_name(entry) for entry in path.iterdir()):
                own = [path]
        elif path.exists():
            own = [path]
        else:
            own = [Path(hit) for hit in sorted(glob.glob(str(path), recursive=True)) if is_video_name(hit)]
        if not own:
            raise DataError(f"no videos behind {argument!r}. Expected video files, folders of frames, or globs.")
        found += own
    return found
