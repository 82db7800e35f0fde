"""Data sets of TensorFlow Datasets, which must be installed."""

from dyntune.data.base import DataSplits
from dyntune.data.sources.base import Request, Source
from dyntune.data.splits import split_of
from dyntune.data.streams import collect, open_stream


class Tfds(Source):
    """A data set of TensorFlow Datasets, prepared below the root or downloaded to it where that can be done."""

    prefix = "tfds/"
    form = "tfds/NAME"

    def load(self, request: Request) -> DataSplits:
        name, root = request.name, request.data_root
        hint = f"install tensorflow-datasets, and without a network put the prepared data set into {root}"
        first = open_stream(name, hint, root=str(root), split="train", download=True)
        streams = {"train": first}
        for word in first.reader.builder.info.splits:
            split = split_of(word)
            if split is not None and split not in streams:
                streams[split] = open_stream(name, hint, root=str(root), split=word)
        found = {
            split: collect(stream, f"{name} {split}", on_corrupt=request.on_corrupt)
            for split, stream in streams.items()
        }
        classes = sorted(first.reader.class_to_idx, key=first.reader.class_to_idx.__getitem__)
        return request.splits(found["train"], found.get("val"), found.get("test"), classes)
