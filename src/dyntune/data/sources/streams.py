"""Data sets that can only be read from front to back (WebDataset shards, TensorFlow Datasets), brought to memory."""

import contextlib
import io
import json
import logging
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from dyntune.core.errors import DataError
from dyntune.data.base import DataSplits, LabelledImages
from dyntune.data.images import read_image, to_rgb
from dyntune.data.splits import assemble

MEMORY_LIMIT = 4 * 1024**3
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test"} | dict.fromkeys(
    ("val", "valid", "validation"), "val"
)
WDS_IMAGES = "jpg;jpeg;png;webp"


class EncodedImages(LabelledImages):
    """Images held in memory as losslessly compressed files."""

    def __init__(self, files: Sequence[bytes], targets: Sequence[int], name: str, skipped: Sequence[str]) -> None:
        super().__init__(targets, skipped=skipped)
        self.files, self.name = tuple(files), name

    def read(self, index: int) -> Image.Image:
        return read_image(self.files[index], self.source(index))

    def source(self, index: int) -> str:
        return f"{self.name} image {index}"


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def _reader_warnings() -> Iterator[list[str]]:
    """What timm's reader warns of: it leaves bad samples out with a warning, and that is the only trace of them."""
    logger = logging.getLogger("timm.data.readers.reader_wds")
    records = _Records()
    propagate, level = logger.propagate, logger.level
    logger.addHandler(records)
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    try:
        yield records.messages
    finally:
        logger.removeHandler(records)
        logger.propagate = propagate
        logger.setLevel(level)


def _bad_members(shards: Sequence[Path]) -> list[str]:
    """The images in local shards that cannot be decoded, as ``shard: member``."""
    bad = []
    for shard in shards:
        with contextlib.suppress(tarfile.TarError, OSError, EOFError), tarfile.open(shard) as archive:
            for member in archive:
                if member.isfile() and Path(member.name).suffix.lower()[1:] in WDS_IMAGES.split(";"):
                    file = archive.extractfile(member)
                    try:
                        read_image(file.read() if file else b"")
                    except DataError:
                        bad.append(f"{shard}: {member.name}")
    return bad


def collect(
    stream: Any, name: str, *, on_corrupt: Literal["error", "skip"], shards: Sequence[Path] = ()
) -> EncodedImages:
    """Read a stream of timm's once, from its first sample to its last, into memory.

    Holding the images is what lets them be shuffled as a whole, split by class and counted. They take about as much
    room as PNG files.

    Raises:
        DataError: the images take more than 4 GiB, or one cannot be read and ``on_corrupt`` is ``"error"``.
    """
    # In a run of several processes timm would give each of them a part only; a sampler shares the samples out later.
    stream.reader.dist_rank, stream.reader.dist_num_replicas, stream.reader.global_num_workers = 0, 1, 1
    files, targets, size = [], [], 0
    with _reader_warnings() as warnings:
        for image, target in stream:
            buffer = io.BytesIO()
            to_rgb(image).save(buffer, format="PNG", compress_level=1)
            files.append(buffer.getvalue())
            targets.append(int(target))
            size += len(files[-1])
            if size > MEMORY_LIMIT:
                raise DataError(
                    f"{name}: more than {MEMORY_LIMIT // 1024**3} GiB of images. Expected a set that fits into memory; "
                    "unpack it into an image folder and give that folder instead."
                )
    bad = _bad_members(shards)[: len(warnings)] if warnings else []
    bad += [f"{name}: a sample without a readable image and label"] * (len(warnings) - len(bad))
    if bad and on_corrupt == "error":
        raise DataError(
            f"{name}: {len(warnings)} samples cannot be read, the first being {bad[0]} ({warnings[0]}). Expected "
            "complete images with labels (.cls); mend the shard, or load the data set with "
            "on_corrupt='skip' (--on-corrupt skip)."
        )
    return EncodedImages(files, targets, name, bad)


def _wds_splits(folder: Path) -> dict[str, tuple[str, list[Path]]]:
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


def load_wds(
    name: str, folder: Path, *, seed: int, val_fraction: float, on_corrupt: Literal["error", "skip"]
) -> DataSplits:
    """Load ``wds/PATH``: a folder of tar shards whose samples are an image and its label in a ``.cls`` file.

    Splits come from ``_info.json`` or ``info.json``, or else from the word ``train``, ``val`` or ``test`` in the names
    of the shards. Only local files are read: webdataset would run a ``pipe:`` address as a command.

    Raises:
        DataError: there is no such folder, webdataset is not installed, or the shards cannot be read.
    """
    if not folder.is_dir():
        raise DataError(
            f"{name}: no folder {folder}. Expected a local folder of tar shards; download them there first."
        )
    splits = _wds_splits(folder)
    if "train" not in splits:
        raise DataError(
            f"{name}: no training shards in {folder}. Expected files such as train-000000.tar, or an _info.json that "
            "names the splits; add or rename them."
        )
    for shard in (shard for _, shards in splits.values() for shard in shards):
        if not shard.is_file():
            raise DataError(f"{name}: no shard {shard}, which the info file of {folder} names; restore it.")
    found = {}
    for split, (word, shards) in splits.items():
        stream = _open(
            name,
            "install dyntune[wds]",
            root=str(folder.absolute()),
            split=word,
            input_key=WDS_IMAGES,
            input_img_mode="",
        )
        found[split] = _collect(stream, f"{name} {split}", on_corrupt=on_corrupt, shards=shards)
    return assemble(name, found["train"], found.get("val"), found.get("test"), (), seed=seed, val_fraction=val_fraction)


def load_tfds(
    name: str, root: Path, *, seed: int, val_fraction: float, on_corrupt: Literal["error", "skip"]
) -> DataSplits:
    """Load ``tfds/NAME`` with TensorFlow Datasets, which must be installed; it downloads to ``root`` where it can.

    Raises:
        DataError: TensorFlow Datasets is not installed, or the data set can neither be found nor downloaded.
    """
    hint = f"install tensorflow-datasets, and without a network put the prepared data set into {root}"
    first = _open(name, hint, root=str(root), split="train", download=True)
    streams = {"train": first}
    for word in first.reader.builder.info.splits:
        if word in SPLIT_WORDS and SPLIT_WORDS[word] not in streams:
            streams[SPLIT_WORDS[word]] = _open(name, hint, root=str(root), split=word)
    found = {split: _collect(stream, f"{name} {split}", on_corrupt=on_corrupt) for split, stream in streams.items()}
    classes = sorted(first.reader.class_to_idx, key=first.reader.class_to_idx.__getitem__)
    return assemble(
        name, found["train"], found.get("val"), found.get("test"), classes, seed=seed, val_fraction=val_fraction
    )


def _open(name: str, hint: str, **settings: Any) -> Any:
    from timm.data import create_dataset

    try:
        return create_dataset(name, **settings)
    except Exception as error:
        # The readers raise what the libraries behind them do, ImportError among it.
        raise DataError(f"{name}: cannot be loaded ({type(error).__name__}: {error}). To mend this, {hint}.") from error


def _collect(stream: Any, name: str, **settings: Any) -> EncodedImages:
    try:
        return collect(stream, name, **settings)
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{name}: cannot be read ({type(error).__name__}: {error}). Expected samples of an image and a "
            "whole-number label; mend the files."
        ) from error
