"""Kinetics' annotations as they are published, and the clips that were cut by them."""

import csv
from pathlib import Path

from dyntune.core.errors import DataError
from dyntune.data.sources.base import Request
from dyntune.data.sources.video_list import Line, VideoList
from dyntune.data.splits import split_of
from dyntune.data.videos import list_videos

COLUMNS = ("label", "youtube_id", "time_start", "time_end")
_FORM = f"Expected a file with the columns {','.join(COLUMNS)},split, as Kinetics publishes them"


class Kinetics(VideoList):
    """A CSV file of Kinetics, ``label,youtube_id,time_start,time_end,split``, with its videos below the file's folder.

    A video is known by its name, ``ID_START_END`` with six digits each and any suffix, wherever it lies: class folders
    are called in more than one way. ``train.csv`` has ``val.csv`` and ``test.csv`` beside it, as lists have; a row's
    split is that of its column where there is one. Some videos of Kinetics cannot be had any more: those that are
    missing are an error, or left out and named.
    """

    prefix = "kinetics:"
    form = "kinetics:FILE.csv"

    def lines(self, path: Path, request: Request) -> list[Line]:
        rows = _rows(path)
        there = {video.stem: video for video in list_videos(path.parent)}
        names = ["{youtube_id}_{time_start:0>6}_{time_end:0>6}".format(**row) for _, row in rows]
        lost = [
            f"{name} ({path}, line {number})"
            for name, (number, _) in zip(names, rows, strict=True)
            if name not in there
        ]
        if lost and (len(lost) == len(rows) or request.on_corrupt == "error"):
            raise DataError(
                f"{path}: of {len(rows)} videos, {len(lost)} are not below {path.parent}, the first being {lost[0]}. "
                "Put them there, or load the data set with on_corrupt='skip' (--on-corrupt skip), which leaves missing "
                "videos out."
            )
        return [
            Line(
                str(there.get(name, path.parent / f"{name}.mp4")),
                row["label"],
                f"{path}, line {number}",
                split_of(row.get("split") or ""),
            )
            for name, (number, row) in zip(names, rows, strict=True)
        ]


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Rows with the numbers of their lines."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if "label" not in (reader.fieldnames or ()) and "youtube_id" in (reader.fieldnames or ()):
                return []  # a test list whose labels are kept back
            rows = [(reader.line_num, {name: value or "" for name, value in row.items() if name}) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV ({error}). {_FORM}.") from error
    if not rows:
        raise DataError(f"{path} has no rows. {_FORM}.")
    for number, row in rows:
        for name in COLUMNS:
            if not row.get(name):
                raise DataError(f"{path}, line {number}: no {name}. {_FORM}.")
        for name in COLUMNS[2:]:
            if not row[name].isdecimal():
                raise DataError(f"{path}, line {number}: {name} is {row[name]!r}, no whole number of seconds. {_FORM}.")
    return rows
