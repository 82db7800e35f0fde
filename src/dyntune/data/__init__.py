"""Data sets: what a DATA argument names, as labelled RGB images, and their way to a backbone's input."""

from dyntune.data.base import DataSplits, ImageSubset, LabelledImages
from dyntune.data.clips import Sampling
from dyntune.data.images import expand_images, read_image
from dyntune.data.load import load_data, load_held
from dyntune.data.transforms import Preprocessing, build_transform
from dyntune.data.videos import Video
from dyntune.data.vtab import load_vtab_task

__all__ = [
    "DataSplits",
    "ImageSubset",
    "LabelledImages",
    "Preprocessing",
    "Sampling",
    "Video",
    "build_transform",
    "expand_images",
    "load_data",
    "load_held",
    "load_vtab_task",
    "read_image",
]
