"""Reading and writing video files with PyAV, which is imported when a file is opened, or torchcodec."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dyntune.core.errors import DataError, how_to_install, in_one_line, unknown_name
from dyntune.core.files import write_atomically
from dyntune.core.texts import printable

FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif"
"""Containers that are opened. FFmpeg would take a picture called ``.mp4`` as a video of one frame, and follow lists of
other files and addresses."""
DECODERS = ("pyav", "torchcodec")
"""What ``$DYNTUNE_DECODER`` may name; the first one is taken where it is not set."""
_WORTH_A_SEEK = 60
"""Frames that are decoded for nothing rather than looking for the nearest one that can be decoded by itself."""
_LOST = 0.1
"""Share of the frames that a file may announce and not have, at its end; the last frame stands for them."""


class _Lost(Exception):
    """Frames were looked for, and not all were found, or what was found cannot be numbered."""


@dataclass(frozen=True)
class Piece:
    """A video file inside a larger file, such as a tar file; its bytes are read when it is opened.

    Args:
        path: of the larger file.
        start: where it begins there, in bytes.
        size: its bytes.
    """

    path: str
    start: int
    size: int

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            OSError: the larger file is not there, or ends before it does.
        """
        with open(self.path, "rb") as file:
            file.seek(self.start)
            data = file.read(self.size)
        if len(data) < self.size:
            raise OSError(f"{self.path} ends after {len(data)} of its {self.size} bytes")
        return data


Source = str | os.PathLike[str] | bytes | Piece
"""A file, the bytes of one, or where these lie."""


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
    """Looks into a video file; frames are counted without decoding them where the file does not say how many it shows.

    A file that was cut without encoding it again may hold frames that it does not show, and count them.

    Raises:
        DataError: it cannot be opened, or has no pictures.
    """
    with _opened(source, name) as (container, stream):
        count, rate = int(stream.frames), stream.average_rate
        shown = stream.duration * stream.time_base * rate if stream.duration and rate else count
        if count <= 0 or abs(shown - count) > 1:
            count = len(_shown(container, stream))
        if count <= 0:
            raise DataError(f"{name}: has no frames. Replace or remove it.")
        return About(count, (stream.width, stream.height), float(rate) if rate else None)


def read_frames(
    source: Source, name: str, indices: Sequence[int], count: int, change: Callable[[Image.Image], Any]
) -> list[Any]:
    """What ``change`` makes of some frames, in the order of ``indices``.

    Frames are numbered in the order in which they are shown, whatever the time between them, those that a file holds
    and does not show left out; turned as the file says, for phones store how they were held. Each is changed as it is
    decoded, so that no more than one whole frame is kept.

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
    if _decoder() == "torchcodec":
        taken = _read_with_torchcodec(source, name, wanted, count, change)
        return [taken[number] for number in indices]
    try:
        return _read(source, name, indices, count, change, _far(wanted))
    except _Lost:
        return _read(source, name, indices, count, change, {})


def read_whole(source: Source, name: str, count: int) -> None:
    """Decodes every frame in order, without seeking, and keeps none: a header may announce any number of them.

    Raises:
        DataError: the file cannot be opened, or has not the ``count`` frames.
    """
    if _decoder() == "torchcodec":
        _read_with_torchcodec(source, name, range(count), count, lambda frame: None)
        return
    done, stopped = 0, ""
    with _opened(source, name) as (container, stream):
        try:
            for frame in container.decode(stream):
                _upright(frame)
                done += 1
        except require_reader().error.FFmpegError as error:
            stopped = printable(in_one_line(error))
    if done < count and (stopped or done < (1 - _LOST) * count):
        raise _stopped(name, done, count, stopped, done)


def _read(
    source: Source,
    name: str,
    indices: Sequence[int],
    count: int,
    change: Callable[[Image.Image], Any],
    far: Mapping[int, int],
) -> list[Any]:
    """As ``read_frames``, with PyAV."""
    found: dict[int, Any] = {}
    wanted = sorted(set(indices))
    done, stopped, last = 0, "", None
    with _opened(source, name) as (container, stream):
        try:
            for number, frame in _decoded(container, stream, far):
                done, last = number + 1, frame
                if number in indices:
                    found[number] = change(_upright(frame))
                if done > wanted[-1]:
                    break
        except require_reader().error.FFmpegError as error:
            stopped = printable(in_one_line(error))
        missing = [number for number in wanted if number not in found]
        if missing and far:
            raise _Lost
        if missing and not stopped and last is not None and done >= (1 - _LOST) * count:
            found |= dict.fromkeys(missing, change(_upright(last)))
            missing = []
    if missing:
        raise _stopped(name, done, count, stopped, missing[0])
    return [found[number] for number in indices]


def _stopped(name: str, done: int, count: int, why: str, wanted: int) -> DataError:
    return DataError(
        f"{name}: stops after {done} of {count} frames{f' ({why})' if why else ''}, and frame {wanted} is wanted. "
        "Expected a complete file; copy it again."
    )


def _decoder() -> str:
    """The decoder that this process is to use.

    Raises:
        DataError: there is no such decoder.
    """
    name = os.environ.get("DYNTUNE_DECODER") or DECODERS[0]
    if name not in DECODERS:
        raise DataError(unknown_name("$DYNTUNE_DECODER", name, DECODERS))
    return name


def _read_with_torchcodec(
    source: Source, name: str, wanted: Sequence[int], count: int, change: Callable[[Image.Image], Any]
) -> dict[int, Any]:
    """As ``read_frames``, of a file that PyAV has looked into before; torchcodec opens files of any format."""
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError) as error:
        raise DataError(
            f"$DYNTUNE_DECODER is torchcodec, which does not work here ({printable(in_one_line(error))}). Install it "
            "with FFmpeg's shared libraries, or leave the variable out: PyAV brings its own."
        ) from error
    held = source.read() if isinstance(source, Piece) else source
    found: dict[int, Any] = {}
    number, there = wanted[0], 0
    try:
        decoder = VideoDecoder(
            held if isinstance(held, bytes) else _path(held), dimension_order="NHWC", num_ffmpeg_threads=1
        )
        there = len(decoder)
        last = there - 1 if there >= (1 - _LOST) * count else count
        for number in wanted:
            found[number] = change(Image.fromarray(decoder.get_frame_at(min(number, last)).data.numpy()))
    except (RuntimeError, ValueError, IndexError) as error:
        raise _stopped(name, min(number, there), count, printable(in_one_line(error)), number) from error
    return found


def write_video(path: Path, frames: Iterable[np.ndarray], *, rate: Fraction | int = 12, codec: str = "libx264") -> None:
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


def _far(wanted: Sequence[int]) -> dict[int, int]:
    """Wanted numbers that are worth being looked for, and the wanted one before each; 0 before the first."""
    pairs = zip((0, *wanted), wanted, strict=False)
    return {after: before for before, after in pairs if after - before > _WORTH_A_SEEK}


def _decoded(container: Any, stream: Any, far: Mapping[int, int]) -> Iterator[tuple[int, Any]]:
    """Frames with their numbers; where far ones are to be looked for, without most of those in between.

    A file is only believed to say when its frames are shown where the decoder says the same of the first one, and of
    those at which it arrives.

    Raises:
        _Lost: it does not, or does not arrive in front of a wanted frame.
    """
    times = _times(container, stream) if far else []
    if not times:
        yield from enumerate(container.decode(stream))
        return
    numbers = {time: number for number, time in enumerate(times)}
    jumps = {before: after for after, before in far.items()}
    frames, least, most = container.decode(stream), 0, 0
    while (frame := next(frames, None)) is not None:
        number = numbers.get(frame.pts, -1)
        if not least <= number <= most:
            raise _Lost
        yield number, frame
        least, most = number + 1, len(times)
        target = jumps.pop(number, most)
        if target < most:
            container.seek(times[target], stream=stream, backward=True)
            frames, least, most = container.decode(stream), 0, target


def _times(container: Any, stream: Any) -> list[int]:
    """When each frame is shown, in order; nothing where the file does not say it of every frame."""
    shown = _shown(container, stream)
    container.seek(0, stream=stream, backward=True)
    times = sorted({time for time in shown if time is not None})
    return times if len(times) == len(shown) else []


def _shown(container: Any, stream: Any) -> list[int | None]:
    """The time of each frame that is shown, None where it is not known; as stored."""
    return [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]


def _upright(frame: Any) -> Image.Image:
    image: Image.Image = frame.to_image()
    turned = round(getattr(frame, "rotation", 0) / 90) % 4
    turns = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    return image.transpose(turns[turned - 1]) if turned else image


def _path(file: str | os.PathLike[str]) -> str:
    """A path as FFmpeg is given it: in a relative one it takes what is before a colon as a protocol."""
    return str(Path(file).absolute())


@contextmanager
def _opened(source: Source, name: str) -> Iterator[tuple[Any, Any]]:
    """A container and its first stream of pictures."""
    av = require_reader()
    if not isinstance(source, bytes | Piece) and not os.path.isfile(source):
        raise DataError(f"{name}: there is no such video file. Restore it, or remove it from the data set.")
    safe = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
    try:
        held = source.read() if isinstance(source, Piece) else source
        given = io.BytesIO(held) if isinstance(held, bytes) else _path(held)
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
        if stream.codec_context is None:
            raise DataError(f"{name}: PyAV cannot decode its pictures. Encode them anew, as H.264 say, or remove it.")
        # Threads of frames that are left before the end of a file have blocked loaders' processes.
        stream.thread_type, stream.codec_context.thread_count = "SLICE", 1
        try:
            yield container, stream
        except av.error.FFmpegError as error:
            raise DataError(
                f"{name}: cannot be read as a video ({printable(in_one_line(error))}). Expected a complete file; "
                "replace or remove it."
            ) from error


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
