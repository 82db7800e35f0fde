"""A VTAB-1K task: a folder of images with four text files that list the splits."""

from pathlib import Path

from dyntune.data.base import DataSplits
from dyntune.data.sources.base import Request, Source
from dyntune.data.vtab import load_vtab_task


class Vtab(Source):
    """A task folder, told from other folders by its list of training images."""

    prefix = "vtab:"
    form = "vtab:PATH or the PATH of a VTAB-1K task folder"

    def recognises(self, path: Path) -> bool:
        return (path / "train800.txt").is_file()

    def load(self, request: Request) -> DataSplits:
        return load_vtab_task(request.path, on_corrupt=request.on_corrupt, name=request.name)
