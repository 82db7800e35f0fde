"""Finding the images of a data set that cannot be read, once, before anything is trained on it."""

import os
from concurrent.futures import ThreadPoolExecutor

from dyntune.core.errors import DataError
from dyntune.data.base import ImageSubset, LabelledImages


def scan(data: LabelledImages) -> LabelledImages:
    """The data set without the images that are missing or cannot be decoded; those are named in its ``skipped``.

    Every image is decoded once, in threads: some milliseconds an image (a minute or so for 50,000 photographs on two
    cores), which is the price of a data set whose length and order every loader worker and every process agrees on.
    Leaving bad images out while loading would change batch sizes, and putting others in their place would count those
    twice. A data set that holds no files is given back unread.

    Raises:
        DataError: not one image can be read.
    """
    if not data.reads_files:
        return data

    def readable(index: int) -> bool:
        try:
            data.read(index)
        except DataError:
            return False
        return True

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        good = list(threads.map(readable, range(len(data))))
    if all(good):
        return data
    bad = [data.source(index) for index, fine in enumerate(good) if not fine]
    if len(bad) == len(data):
        raise DataError(
            f"none of the {len(data)} images of a split can be read, the first being {bad[0]}. "
            "Expected complete image files; check that the data set was copied whole."
        )
    return ImageSubset(data, [index for index, fine in enumerate(good) if fine], skipped=bad)
