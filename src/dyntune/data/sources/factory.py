"""Data sets of torchvision and Hugging Face, read by index through timm's data set factory."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dyntune.core.errors import DataError, unknown_name
from dyntune.data.base import DataSplits, LabelledImages
from dyntune.data.files import FileImages
from dyntune.data.images import read_image, to_rgb
from dyntune.data.splits import assemble

# What timm's factory knows of torchvision: the splits with labels, and what torchvision looks for below the root.
TORCH_SETS: dict[str, tuple[tuple[str, ...], str]] = {
    "cifar10": (("train", "test"), "cifar-10-batches-py/"),
    "cifar100": (("train", "test"), "cifar-100-python/"),
    "mnist": (("train", "test"), "MNIST/raw/"),
    "kmnist": (("train", "test"), "KMNIST/raw/"),
    "fashion_mnist": (("train", "test"), "FashionMNIST/raw/"),
    "qmnist": (("train", "test"), "QMNIST/raw/"),
    "imagenet": (("train", "validation"), "ILSVRC2012_devkit_t12.tar.gz and ILSVRC2012_img_{train,val}.tar"),
    "places365": (("train", "validation"), "train_large_places365standard.tar, val_large.tar and their file lists"),
    "inaturalist": (("train", "validation"), "2021_train/ and 2021_valid/"),
}
TORCH_SETS["inat"] = TORCH_SETS["inaturalist"]
VAL_SPLITS = ("validation", "val", "valid", "dev")


def data_root(root: Path | None = None) -> Path:
    """The folder for data sets with a loader of their own: ``root``, else ``$DYNTUNE_DATA``, else a cache folder."""
    return Path(root or os.environ.get("DYNTUNE_DATA") or "~/.cache/dyntune/data").expanduser()


class TorchImages(LabelledImages):
    """A torchvision data set of (PIL image, label) pairs."""

    reads_files = True

    def __init__(self, data: Any, targets: Sequence[int], name: str) -> None:
        super().__init__(targets)
        self.data, self.name = data, name

    def read(self, index: int) -> Image.Image:
        try:
            return to_rgb(self.data[index][0])
        except Exception as error:
            # Any failure of the decoder behind the data set means that this image is bad.
            raise DataError(
                f"{self.source(index)}: cannot be read as an image ({error}). Expected a complete image file; "
                "restore it, or load the data set with on_corrupt='skip' (--on-corrupt skip)."
            ) from error

    def source(self, index: int) -> str:
        return f"{self.name} image {index}"


class ReaderImages(LabelledImages):
    """A data set of timm with a reader that opens image files by index (Hugging Face data sets)."""

    reads_files = True

    def __init__(self, reader: Any, targets: Sequence[int], name: str) -> None:
        super().__init__(targets)
        self.reader, self.name = reader, name

    def read(self, index: int) -> Image.Image:
        # timm's own data set would put the next image in place of a bad one, and would ignore the EXIF orientation.
        try:
            file = self.reader[index][0]
        except Exception as error:
            raise DataError(
                f"{self.source(index)}: cannot be opened ({error}). Expected an image; restore it, or load the data "
                "set with on_corrupt='skip' (--on-corrupt skip)."
            ) from error
        with file:
            return read_image(file, self.source(index))

    def source(self, index: int) -> str:
        name = None
        with contextlib.suppress(Exception):
            name = self.reader.filename(index)
        return f"{self.name} image {index}" + (f" ({name})" if name else "")


def _torch_images(data: Any, name: str) -> LabelledImages:
    """A torchvision data set as one of ours; its labels are had without reading images."""
    pairs = getattr(data, "samples", None) or getattr(data, "imgs", None)
    if pairs:  # ImageNet and Places365: image files, which FileImages can name in errors and turn upright
        return FileImages([path for path, _ in pairs], [label for _, label in pairs])
    if hasattr(data, "targets"):
        targets = data.targets
        if hasattr(targets, "ndim") and targets.ndim == 2:
            targets = targets[:, 0]  # QMNIST's further columns are the writer and such
        return TorchImages(data, [int(target) for target in targets], name)
    return TorchImages(data, [int(label) for label, _ in data.index], name)


def load_torch(name: str, root: Path, *, seed: int, val_fraction: float) -> DataSplits:
    """Load ``torch/NAME``; what is not below ``root`` is downloaded to it where torchvision can.

    A labelled validation split counts as that; where there is only a test split, the validation images are split off
    the training images.

    Raises:
        DataError: timm knows no such data set, or it is neither there nor can be downloaded.
    """
    from timm.data import create_dataset

    short = name.split("/", 1)[1].lower()
    if short not in TORCH_SETS:
        known = [f"torch/{each}" for each in (*TORCH_SETS, "image_folder")]
        raise DataError(unknown_name("torchvision data set", name, known))
    splits, expected = TORCH_SETS[short]
    root.mkdir(parents=True, exist_ok=True)

    def load(split: str) -> Any:
        # Files that are there are tried first: with download=True some of torchvision's classes refuse a full folder.
        with contextlib.suppress(Exception):
            return create_dataset(f"torch/{short}", root=str(root), split=split, download=False)
        try:
            return create_dataset(f"torch/{short}", root=str(root), split=split, download=True)
        except Exception as error:
            raise DataError(
                f"{name}: the {split} split is not complete below {root} and could not be downloaded ({error}). "
                f"Put {expected} into {root} as torchvision expects it, or name another folder with $DYNTUNE_DATA."
            ) from error

    found = {split: load(split) for split in splits}
    sets = {split: _torch_images(data, f"{name} {split}") for split, data in found.items()}
    labels = getattr(found["train"], "classes", None) or getattr(found["train"], "all_categories", [])
    classes = [", ".join(label) if isinstance(label, tuple) else str(label) for label in labels]
    return assemble(
        name, sets["train"], sets.get("validation"), sets.get("test"), classes, seed=seed, val_fraction=val_fraction
    )


def _hub_columns(features: Mapping[str, Any]) -> tuple[str, str]:
    """The image and label columns: ``image`` and ``label`` where there are such, else by their types."""
    images = [column for column, feature in features.items() if type(feature).__name__ == "Image"]
    labels = [column for column, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    image = "image" if "image" in images else next(iter(images), None)
    # Of fine and coarse labels (as in CIFAR-100) the one with more classes is the task.
    by_type = max(labels, key=lambda column: features[column].num_classes, default=None)
    label = "label" if "label" in features else by_type
    if image is None or label is None:
        raise ValueError(f"its columns are {', '.join(features)}, of which none holds images or none holds labels")
    return image, label


def load_hub(name: str, root: Path, *, seed: int, val_fraction: float) -> DataSplits:
    """Load ``hfds/NAME``, a data set of the Hugging Face hub or a local folder of one, with its cache at ``root``.

    A test split whose labels are all -1 counts as none. Loading scripts are never run.

    Raises:
        DataError: the ``datasets`` library is not installed, or the data set cannot be had or has no images and labels.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{name} needs the datasets library: install dyntune[hfds].") from error
    from timm.data import create_dataset

    # Releases before 4 could run a data set's own Python code; some did so without being asked.
    if hasattr(datasets.config, "HF_DATASETS_TRUST_REMOTE_CODE"):
        datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False
    short = name.split("/", 1)[1]
    try:
        builder = datasets.load_dataset_builder(short, cache_dir=str(root))
        available = [str(split) for split in builder.info.splits or datasets.get_dataset_split_names(short)]
        if "train" not in available:
            raise ValueError(f"it has no split named 'train', only {', '.join(available)}")
        # The columns of a folder of files are known only once it is loaded; timm finds it in the cache after that.
        features = datasets.load_dataset(short, split="train", cache_dir=str(root)).features
        image, label = _hub_columns(features)
        wanted = [split for split in ("train", "test", *VAL_SPLITS) if split in available]
        readers = {
            split: create_dataset(name, root=str(root), split=split, input_key=image, target_key=label).reader
            for split in wanted
        }
        # The column alone, because reading whole rows would decode any further images in them.
        sets = {
            split: ReaderImages(reader, reader.dataset.select_columns([label])[label], f"{name} {split}")
            for split, reader in readers.items()
        }
    except Exception as error:
        raise DataError(
            f"{name}: cannot be loaded ({type(error).__name__}: {error}). Expected a data set with an image and a "
            f"label column that is at hand in {root} or can be downloaded; without a network, put its files (parquet, "
            "or an image folder) into a folder and give hfds/ and that folder's path."
        ) from error
    val = next((sets[split] for split in VAL_SPLITS if split in sets), None)
    test = sets.get("test")
    if test is not None and set(test.targets) == {-1}:
        test = None
    # Not the reader's: in older releases of timm it knows none for a column that is not called "label".
    classes = list(getattr(features[label], "names", ()))
    return assemble(name, sets["train"], val, test, classes, seed=seed, val_fraction=val_fraction)
