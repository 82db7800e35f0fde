"""Data sets of the Hugging Face hub, read by index through timm's data set factory."""

import contextlib
import hashlib
from collections.abc import Sequence
from typing import Any

from PIL import Image

from dyntune.core.errors import DataError, how_to_install
from dyntune.data.base import DataSplits, LabelledImages
from dyntune.data.datasets import SKIP
from dyntune.data.images import read_image
from dyntune.data.others import HubImages, hub_columns
from dyntune.data.sources.base import Request, Source
from dyntune.data.splits import split_of
from dyntune.data.videos import SKIP as SKIP_VIDEOS


class ReaderImages(LabelledImages):
    """A data set of timm with a reader that opens image files by index (Hugging Face data sets)."""

    reads_files = True

    def __init__(self, reader: Any, targets: Sequence[int], name: str) -> None:
        super().__init__(targets)
        self.reader, self.name = reader, name
        self._identities: dict[int, str] = {}

    def read(self, index: int) -> Image.Image:
        # timm's own data set would put the next image in place of a bad one, and would ignore the EXIF orientation.
        try:
            file = self.reader[index][0]
        except Exception as error:
            raise DataError(
                f"{self.source(index)}: cannot be opened ({error}). Expected an image; restore it. {SKIP}"
            ) from error
        with file:
            try:
                return read_image(file, self.source(index))
            except DataError as error:
                raise DataError(f"{error} {SKIP}") from error

    def place(self, index: int) -> str:
        return self.identity(index)

    def identity(self, index: int) -> str:
        if index not in self._identities:
            try:
                with self.reader[index][0] as file:
                    self._identities[index] = hashlib.blake2b(file.read(), digest_size=8).hexdigest()
            except Exception:  # whatever the library meets; said where the image is read
                return super().identity(index)
        return self._identities[index]

    def source(self, index: int) -> str:
        name = None
        with contextlib.suppress(Exception):
            name = self.reader.filename(index)
        return f"{self.name} image {index}" + (f" ({name})" if name else "")


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
        from timm.data import create_dataset

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
            # The columns of a folder of files are known only once it is loaded; timm finds it in the cache after that.
            features = datasets.load_dataset(short, split=words["train"], cache_dir=str(root)).features
            image, label = hub_columns(features)
            sets: dict[str, LabelledImages] = {}
            for split, word in words.items():
                if type(features[image]).__name__ == "Video":
                    data = datasets.load_dataset(short, split=word, cache_dir=str(root))
                    sets[split] = HubImages(data, f"{name} {word}", SKIP_VIDEOS)
                    continue
                reader = create_dataset(name, root=str(root), split=word, input_key=image, target_key=label).reader
                # The column alone, because reading whole rows would decode any further images in them.
                sets[split] = ReaderImages(reader, reader.dataset.select_columns([label])[label], f"{name} {word}")
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
        # Not the reader's: in older releases of timm it knows none for a column that is not called "label".
        classes = list(getattr(features[label], "names", ()))
        return request.splits(sets["train"], val, test, classes)
