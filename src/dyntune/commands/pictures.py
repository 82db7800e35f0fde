"""The images and videos that a command is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import typer

from dyntune.commands.console import err
from dyntune.core.errors import DataError
from dyntune.core.texts import printable
from dyntune.data.images import expand_images, read_image
from dyntune.data.videos import Video, expand_videos

T = TypeVar("T")


class Pictures:
    """What is behind command-line arguments, read one after another; what cannot be is named and passed over.

    Args:
        arguments: files, folders and patterns.
        videos: whether they stand for videos, which may be folders of frames, and not for images.

    Attributes:
        paths: the image files, or the videos.
        failed: what could not be found or read, with the reason.
        read: how many have been read.

    Raises:
        DataError: no argument stands for any.
    """

    def __init__(self, arguments: Sequence[str], *, videos: bool = False) -> None:
        found: dict[Path, None] = {}
        self.videos = videos
        self.failed: dict[str, str] = {}
        self.read = 0
        for argument in arguments:
            try:
                found.update(dict.fromkeys(expand_videos([argument]) if videos else expand_images([argument])))
            except DataError as error:
                if len(arguments) == 1:
                    raise
                self._fail(argument, error)
        self.paths = list(found)

    def batches(self, size: int, prepare: Callable[[Any], T]) -> Iterator[list[tuple[Path, T]]]:
        """Paths and what is made of the images or videos, so many at a time.

        Args:
            size: how many.
            prepare: from a PIL image, or a ``Video``, which is read here, to what is kept of it.
        """
        batch: list[tuple[Path, T]] = []
        for path in self.paths:
            try:
                batch.append((path, prepare(Video(path) if self.videos else read_image(path))))
                self.read += 1
            except DataError as error:
                self._fail(str(path), error)
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch

    def finish(self) -> None:
        """Ends the command with exit status 1 if something could not be read."""
        if self.failed:
            err.print(f"{len(self.failed)} left out, {self.read} done", highlight=False)
            raise typer.Exit(1)

    def _fail(self, name: str, error: DataError) -> None:
        self.failed[name] = str(error)
        err.print(f"left out: {printable(str(error))}", highlight=False, soft_wrap=True)
