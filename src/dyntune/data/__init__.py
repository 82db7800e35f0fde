"""Data sets: what a DATA argument names, as labelled RGB images, and their way to a backbone's input."""

from dyntune.data.base import DataSplits, ImageSubset, LabelledImages
from dyntune.data.images import read_image
from dyntune.data.listing import expand_images
from dyntune.data.load import load_data
from dyntune.data.sources.vtab import load_vtab_task
from dyntune.data.transforms import Preprocessing, build_transform

__all__ = [
    "DataSplits",
    "ImageSubset",
    "LabelledImages",
    "Preprocessing",
    "build_transform",
    "expand_images",
    "load_data",
    "load_vtab_task",
    "read_image",
]
