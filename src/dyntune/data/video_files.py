"""Reading and writing video files with PyAV, which is imported when a file is opened."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dyntune.core.errors import DataError, how_to_install, in_one_line
from dyntune.core.files import write_atomically
from dyntune.core.texts import printable
from dyntune.core.words import counted

FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif"
"""Containers that are opened. FFmpeg would take a picture called ``.mp4`` as a video of one frame, and follow lists of
other files and addresses."""
_WORTH_A_SEEK = 60
"""Frames that are decoded for nothing rather than looking for the nearest one that can be decoded by itself."""
_LOST = 0.1
"""Share of the frames that a file may announce and not have, at its end; the last frame stands for them."""

Source = str | os.PathLike[str] | bytes
"""A file, or the bytes of one."""


@dataclass(frozen=True)
class About:
    """What a file says of its pictures.

    Args:
        count: frames.
        size: width and height as stored, before any rotation.
        rate: frames per second on average; None where it is not known.
    """

    count: int
    size: tuple[int, int]
    rate: float | None


def about(source: Source, name: str) -> About:
    """Looks into a video file; frames that the file does not count are counted without decoding them.

    Raises:
        DataError: it cannot be opened, or has no pictures.
    """
    with _opened(source, name) as (container, stream):
        count = int(stream.frames)
        if count <= 0:
            count = sum(1 for packet in container.demux(stream) if packet.size)
        if count <= 0:
            raise DataError(f"{name}: has no frames. Replace or remove it.")
        rate = stream.average_rate
        return About(count, (stream.width, stream.height), float(rate) if rate else None)


def read_frames(
    source: Source, name: str, indices: Sequence[int], count: int, change: Callable[[Image.Image], Any]
) -> list[Any]:
    """What ``change`` makes of some frames, in the order of ``indices``.

    Frames are numbered in the order in which they are shown, whatever the time between them; turned as the file says,
    for phones store how they were held. Each is changed as it is decoded, so that no more than one whole frame is kept.

    Args:
        source: the file; it is opened here and closed again, so that no decoder is carried into another process.
        name: what to call it in an error.
        indices: numbers of frames, in any order, repeated or not.
        count: frames that the file has, see ``About``.
        change: an RGB image to what is kept of it.

    Raises:
        DataError: it cannot be opened, or ends before a wanted frame.
    """
    wanted = sorted(set(indices))
    found: dict[int, Any] = {}
    done, stopped, last = 0, "", None
    with _opened(source, name) as (container, stream):
        try:
            for number, frame in _decoded(container, stream, wanted):
                done, last = number + 1, frame
                if number in indices:
                    found[number] = change(_upright(frame))
                if done > wanted[-1]:
                    break
        except require_reader().error.FFmpegError as error:
            stopped = printable(in_one_line(error))
        missing = [number for number in wanted if number not in found]
        if missing and not stopped and last is not None and done >= (1 - _LOST) * count:
            found |= dict.fromkeys(missing, change(_upright(last)))
            missing = []
    if missing:
        why = f" ({stopped})" if stopped else ""
        raise DataError(
            f"{name}: stops after {done} of {counted(count, 'frame')}{why}, and frame {missing[0]} is wanted. "
            "Expected a complete file; copy it again."
        )
    return [found[number] for number in indices]


def write_video(path: Path, frames: Iterable[np.ndarray], *, rate: int = 12, codec: str = "libx264") -> None:
    """Writes an MP4 file; it is whole or not there.

    Args:
        path: of the file.
        frames: RGB, ``(height, width, 3)``, uint8, all of one even height and width.
        rate: frames per second.
        codec: FFmpeg's name of the encoder, ``libx264`` for H.264.
    """
    av = require_reader()

    def write(target: Path) -> None:
        with av.open(str(target), "w", format="mp4") as container:
            stream: Any = None
            for frame in frames:
                if stream is None:
                    stream = container.add_stream(codec, rate=rate, options={"crf": "18", "threads": "1"})
                    stream.height, stream.width = frame.shape[:2]
                    stream.pix_fmt = "yuv420p"
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode(None))

    write_atomically(path, write)


def _decoded(container: Any, stream: Any, wanted: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """Frames with their numbers, as far as the last wanted one; far ones are looked for instead of decoded up to."""
    gaps = [after - before for before, after in zip((0, *wanted), wanted, strict=False)]
    times = _times(container, stream) if max(gaps) > _WORTH_A_SEEK else []
    if not times:
        yield from enumerate(container.decode(stream))
        return
    numbers = {time: number for number, time in enumerate(times)}
    frames, number = container.decode(stream), -1
    for target, gap in zip(wanted, gaps, strict=True):
        if gap > _WORTH_A_SEEK:
            container.seek(times[min(target, len(times) - 1)], stream=stream, backward=True)
            frames = container.decode(stream)
        for frame in frames:
            number = numbers.get(frame.pts, number + 1)
            yield number, frame
            if number >= target:
                break


def _times(container: Any, stream: Any) -> list[int]:
    """When each frame is shown, in order; nothing where the file does not say it of every frame."""
    times = [packet.pts for packet in container.demux(stream) if packet.size]
    container.seek(0, stream=stream, backward=True)
    return sorted(times) if None not in times and len(set(times)) == len(times) else []


def _upright(frame: Any) -> Image.Image:
    image: Image.Image = frame.to_image()
    turned = round(getattr(frame, "rotation", 0) / 90) % 4
    turns = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    return image.transpose(turns[turned - 1]) if turned else image


@contextmanager
def _opened(source: Source, name: str) -> Iterator[tuple[Any, Any]]:
    """A container and its first stream of pictures."""
    av = require_reader()
    given = io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)
    if isinstance(given, str) and not os.path.isfile(given):
        raise DataError(f"{name}: there is no such video file. Restore it, or remove it from the data set.")
    safe = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
    try:
        container = av.open(given, "r", options=safe, metadata_errors="ignore")
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise DataError(
            f"{name}: cannot be opened as a video ({printable(in_one_line(error))}). Expected a complete file; replace "
            "or remove it."
        ) from error
    with container:
        stream = next(iter(container.streams.video), None)
        if stream is None:
            raise DataError(f"{name}: has no pictures{', only sound' * bool(container.streams.audio)}. Remove it.")
        # Threads of frames that are left before the end of a file have blocked loaders' processes.
        stream.thread_type, stream.codec_context.thread_count = "SLICE", 1
        yield container, stream


def require_reader() -> Any:
    """PyAV.

    Raises:
        DataError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise DataError(f"videos need PyAV, which is not installed: {how_to_install('video')}.") from error
    return av
