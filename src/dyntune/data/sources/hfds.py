"""Data sets of the Hugging Face hub, read by index."""

import hashlib
from pathlib import Path
from typing import Any

from PIL import Image

from dyntune.core.errors import DataError, how_to_install
from dyntune.data.base import DataSplits, LabelledImages
from dyntune.data.datasets import SKIP
from dyntune.data.others import HubImages, hub_columns
from dyntune.data.sources.base import Request, Source
from dyntune.data.splits import split_of
from dyntune.data.videos import SKIP as SKIP_VIDEOS
from dyntune.data.videos import Video


class NamedImages(HubImages):
    """The images of a data set that is loaded by its name, known by all of their content, with their files' names."""

    def __init__(self, data: Any, name: str) -> None:
        super().__init__(data, name, SKIP)
        self._identities: dict[int, str] = {}

    def read(self, index: int) -> Image.Image | Video:  # type: ignore[override]
        try:
            return super().read(index)
        except DataError as error:
            raise DataError(f"{error} {self.advice}") from error

    def identity(self, index: int) -> str:
        if index not in self._identities:
            try:
                file = self._file(index)
                content = file if isinstance(file, bytes) else Path(file).read_bytes()
            except (OSError, DataError):  # said where the image is read
                return super().identity(index)
            self._identities[index] = hashlib.blake2b(content, digest_size=8).hexdigest()
        return self._identities[index]

    def source(self, index: int) -> str:
        name = (self.files[index][self.image] or {}).get("path")
        return super().source(index) + (f" ({name})" if name else "")


class Hfds(Source):
    """A data set of the Hugging Face hub or a local folder of one, with its cache at the root.

    A test split whose labels are all -1 counts as none. Loading scripts are never run.
    """

    prefix = "hfds/"
    form = "hfds/NAME"

    def load(self, request: Request) -> DataSplits:
        name, short, root = request.name, request.given, request.data_root
        try:
            import datasets
        except ImportError as error:
            raise DataError(f"{name} needs the datasets library: {how_to_install('hfds')}.") from error

        # Releases before 4 could run a data set's own Python code; some did so without being asked.
        if hasattr(datasets.config, "HF_DATASETS_TRUST_REMOTE_CODE"):
            datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False
        try:
            builder = datasets.load_dataset_builder(short, cache_dir=str(root))
            available = [str(split) for split in builder.info.splits or datasets.get_dataset_split_names(short)]
            # Of several words for one split, the plain one.
            named = sorted(available, key=lambda word: word not in ("train", "validation", "test"))
            words = {split: word for word in reversed(named) if (split := split_of(word))}
            if "train" not in words:
                raise ValueError(f"it has no split named 'train', only {', '.join(available)}")
            # Not through timm, whose older releases write names, and so paths, in small letters.
            loaded = {
                split: datasets.load_dataset(short, split=word, cache_dir=str(root)) for split, word in words.items()
            }
            features = loaded["train"].features
            image, label = hub_columns(features)
            sets: dict[str, LabelledImages] = {}
            for split, data in loaded.items():
                called = f"{name} {words[split]}"
                if type(features[image]).__name__ == "Video":
                    sets[split] = HubImages(data, called, SKIP_VIDEOS)
                else:
                    sets[split] = NamedImages(data, called)
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"{name}: cannot be loaded ({type(error).__name__}: {error}). Expected a data set with a column of "
                f"images or videos and one of labels that is at hand in {root} or can be downloaded; without a "
                "network, put its files (parquet, or an image folder) into a folder and give hfds/ and that folder's "
                "path."
            ) from error
        val, test = sets.get("val"), sets.get("test")
        if test is not None and set(test.targets) == {-1}:
            test = None
        classes = list(getattr(features[label], "names", ()))
        return request.splits(sets["train"], val, test, classes)
