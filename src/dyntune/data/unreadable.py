"""Leaving out of a data set what cannot be read."""

import os
from concurrent.futures import ThreadPoolExecutor

from dyntune.core.errors import DataError
from dyntune.core.words import counted
from dyntune.data.base import ImageSubset, LabelledImages

_AT_ONCE = 4096


def without_unreadable(data: LabelledImages) -> LabelledImages:
    """The data set without the images that are missing or cannot be decoded; those are named in its ``skipped``.

    Every image is decoded once, in threads, which is the price of a data set whose length and order every loader
    worker and every process agrees on. Leaving bad images out while loading would change batch sizes, and putting
    others in their place would count those twice. A data set that holds no files is given back unread.

    Raises:
        DataError: not one image can be read.
    """
    if not data.reads_files:
        return data

    def readable(index: int) -> bool:
        try:
            data.read(index).load()  # what is opened when it is read, such as a video
        except DataError:
            return False
        return True

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        # Some thousands at a time: each that waits takes two kilobytes.
        starts = range(0, len(data), _AT_ONCE)
        good = [fine for start in starts for fine in threads.map(readable, range(len(data))[start : start + _AT_ONCE])]
    if all(good):
        return data
    bad = [data.source(index) for index, fine in enumerate(good) if not fine]
    if len(bad) == len(data):
        raise DataError(
            f"a split of {counted(len(data), data.noun)}, of which none can be read, the first being {bad[0]}. "
            f"Expected complete {data.noun} files; check that the data set was copied whole."
        )
    return ImageSubset(data, [index for index, fine in enumerate(good) if fine], skipped=bad)
