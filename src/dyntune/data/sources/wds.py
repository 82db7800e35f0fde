"""WebDataset shards: tar files whose samples are an image or a video, and its label."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dyntune.core.errors import DataError, how_to_install
from dyntune.core.files import load_json
from dyntune.core.texts import printable
from dyntune.core.words import counted
from dyntune.data.base import DataSplits, LabelledImages
from dyntune.data.datasets import SKIP
from dyntune.data.sources.base import Request, Source
from dyntune.data.splits import split_of
from dyntune.data.streams import collect, is_whole, open_stream, shard_images
from dyntune.data.video_shards import ShardVideos, holds_videos

log = logging.getLogger("dyntune")


class _Shards(NamedTuple):
    """A split: what to call it towards timm, its shards, and how many samples they hold where an info file says so."""

    word: str
    files: list[Path]
    samples: int | None


def _find_shards(folder: Path) -> dict[str, _Shards]:
    """The shards of each split, from the info file or else from the shards' names."""
    for info_name in ("_info.json", "info.json"):
        info = folder / info_name
        if info.is_file():
            try:
                splits = load_json(info)["splits"]
                named = {
                    word: _Shards(
                        _towards_timm(word, entry["filenames"]),
                        [folder / file for file in entry["filenames"]],
                        entry.get("num_samples"),
                    )
                    for word, entry in splits.items()
                }
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{info}: not the info file of a WebDataset ({error!r}); mend or remove it.") from error
            empty = [word for word, shards in named.items() if not shards.files]
            if empty:
                raise DataError(
                    f"{info}: the split {empty[0]!r} has no filenames. Give those of its shards, or no such split."
                )
            return {split: shards for word, shards in named.items() if (split := split_of(word))}
    found: dict[str, list[Path]] = {}
    others: list[Path] = []
    for shard in sorted(folder.glob("*.tar")):
        words = [split for word in re.split(r"[^a-z]+", shard.name.lower()) if (split := split_of(word))]
        (found.setdefault(words[0], []) if words else others).append(shard)
    if "train" not in found and others:
        found["train"] = others
    elif others:
        log.warning("%s: left out %d shards of no split, such as %s.", folder, len(others), printable(others[0].name))
    return {
        split: _Shards(_towards_timm(split, [file.name for file in files]), files, None)
        for split, files in found.items()
    }


def _towards_timm(word: str, names: Sequence[str]) -> str:
    """What timm is told of a split: its shards, because of the info file it wants more than files need to say."""
    joined = "::".join(names)
    return joined if all("tar" in name for name in names) else word


class Wds(Source):
    """A folder of tar shards whose samples are an image, or a video, and its label in a ``.cls`` file.

    Splits come from ``_info.json`` or ``info.json``, or else from the word ``train``, ``val`` or ``test`` in the names
    of the shards; where none is called ``train``, those without such a word are for training. Only local files are
    read: webdataset would run a ``pipe:`` address as a command. A shard that was cut off is refused, unless what cannot
    be read is to be left out.
    """

    prefix = "wds/"
    form = "wds/PATH"

    def load(self, request: Request) -> DataSplits:
        name, folder = request.name, request.path
        if request.root is not None or not folder.is_dir():
            folder = request.data_root / folder
        if not folder.is_dir():
            raise DataError(
                f"{name}: no folder {folder}. Expected a local folder of tar shards; download them there first."
            )
        splits = _find_shards(folder)
        if "train" not in splits:
            raise DataError(
                f"{name}: no training shards in {folder}. Expected files such as train-000000.tar, or an _info.json "
                "that names the splits; add or rename them."
            )
        for shard in (shard for shards in splits.values() for shard in shards.files):
            if not shard.is_file():
                raise DataError(f"{name}: no shard {shard}, which the info file of {folder} names; restore it.")
            if not is_whole(shard):
                problem = f"{name}: the shard {shard} is cut off or damaged, as it does not end as a tar file does."
                if request.on_corrupt == "error":
                    raise DataError(f"{problem} Copy it again. {SKIP}")
                log.warning("%s What can be read of it is taken.", problem)
        found: dict[str, LabelledImages] = {}
        for split, (word, shards, samples) in splits.items():
            images: LabelledImages
            if holds_videos(shards[0]):
                images = ShardVideos(shards, request.on_corrupt)
            else:
                stream = open_stream(
                    name,
                    how_to_install("wds"),
                    root=str(folder.absolute()),
                    split=word,
                    input_key=shard_images(),
                    input_img_mode="",
                )
                images = collect(stream, f"{name} {split}", on_corrupt=request.on_corrupt, shards=shards)
            if samples is not None and len(images) + len(images.skipped) != samples and request.on_corrupt == "error":
                raise DataError(
                    f"{name}: the shards of the {split} split hold {counted(len(images), 'sample')}, but the info "
                    f"file of {folder} says {samples}. Copy the shards again, or mend the info file."
                )
            found[split] = images
        return request.splits(found["train"], found.get("val"), found.get("test"))
