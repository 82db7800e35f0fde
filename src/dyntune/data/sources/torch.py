"""Data sets of torchvision, read by index through timm's data set factory."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from filelock import FileLock
from PIL import Image

from dyntune.core.errors import DataError, unknown_name
from dyntune.data.base import DataSplits, LabelledImages
from dyntune.data.datasets import SKIP, FileImages
from dyntune.data.images import to_rgb
from dyntune.data.sources.base import Held, Request, Source
from dyntune.data.sources.folder import Folder

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
_FOLDERS = ("image_folder", "folder")
TORCH_SETS["inat"] = TORCH_SETS["inaturalist"]


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
                f"restore it. {SKIP}"
            ) from error

    def source(self, index: int) -> str:
        return f"{self.name} image {index}"


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


class Torch(Source):
    """A data set of torchvision; what is not below the root is downloaded to it where torchvision can.

    A labelled validation split counts as that; where there is only a test split, the validation images are split off
    the training images.
    """

    prefix = "torch/"
    form = "torch/NAME"

    def load(self, request: Request) -> DataSplits:
        from timm.data import create_dataset

        name, short, root = request.name, request.given.lower(), request.data_root
        if short in _FOLDERS:
            # The layout of folder:, but where a split has no folder timm would give the whole root in its place.
            return Folder().load(replace(request, given=str(root)))
        if short not in TORCH_SETS:
            known = [f"torch/{each}" for each in (*TORCH_SETS, "image_folder")]
            raise DataError(unknown_name("torchvision data set", name, known))
        splits, expected = TORCH_SETS[short]
        root.mkdir(parents=True, exist_ok=True)

        def load(split: str) -> Any:
            # Files that are there are tried first: with download=True some classes of torchvision refuse a full folder.
            with contextlib.suppress(Exception):
                return create_dataset(f"torch/{short}", root=str(root), split=split, download=False)
            try:
                with FileLock(root / f".{short}.lock"):  # several processes of one training would write the same files
                    with contextlib.suppress(Exception):
                        return create_dataset(f"torch/{short}", root=str(root), split=split, download=False)
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
        return request.splits(sets["train"], sets.get("validation"), sets.get("test"), classes)

    def held(self, request: Request, classes: Sequence[str] | None = None) -> Held:
        if request.given.lower() in _FOLDERS:
            return Folder().held(replace(request, given=str(request.data_root)), classes)
        return super().held(request, classes)
