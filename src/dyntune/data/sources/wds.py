"""WebDataset shards: tar files whose samples are an image and its label."""

import json
import re
from pathlib import Path

from dyntune.core.errors import DataError, how_to_install
from dyntune.data.base import DataSplits
from dyntune.data.sources.base import Request, Source
from dyntune.data.streams import SHARD_IMAGES, SPLIT_WORDS, collect, open_stream


def _find_shards(folder: Path) -> dict[str, tuple[str, list[Path]]]:
    """By split: what to call it towards timm, and its shards, from the info file or else from the shards' names."""
    for info_name in ("_info.json", "info.json"):
        info = folder / info_name
        if info.is_file():
            try:
                splits = json.loads(info.read_text(encoding="utf-8"))["splits"]
                named = {word: [folder / file for file in entry["filenames"]] for word, entry in splits.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{info}: not the info file of a WebDataset ({error!r}); mend or remove it.") from error
            return {SPLIT_WORDS[word]: (word, shards) for word, shards in named.items() if word in SPLIT_WORDS}
    found: dict[str, list[Path]] = {}
    for shard in sorted(folder.glob("*.tar")):
        words = [SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", shard.name.lower()) if word in SPLIT_WORDS]
        found.setdefault(words[0] if words else "train", []).append(shard)
    return {split: ("::".join(shard.name for shard in shards), shards) for split, shards in found.items()}


class Wds(Source):
    """A folder of tar shards whose samples are an image and its label in a ``.cls`` file.

    Splits come from ``_info.json`` or ``info.json``, or else from the word ``train``, ``val`` or ``test`` in the names
    of the shards. Only local files are read: webdataset would run a ``pipe:`` address as a command.
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
        for shard in (shard for _, shards in splits.values() for shard in shards):
            if not shard.is_file():
                raise DataError(f"{name}: no shard {shard}, which the info file of {folder} names; restore it.")
        found = {}
        for split, (word, shards) in splits.items():
            stream = open_stream(
                name,
                how_to_install("wds"),
                root=str(folder.absolute()),
                split=word,
                input_key=SHARD_IMAGES,
                input_img_mode="",
            )
            found[split] = collect(stream, f"{name} {split}", on_corrupt=request.on_corrupt, shards=shards)
        return request.splits(found["train"], found.get("val"), found.get("test"))
