"""The images that a run was trained on and chose its epoch by, which its folder remembers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from dyntune.core.errors import CheckpointError
from dyntune.core.files import load_json, write_json
from dyntune.data.base import LabelledImages

SEEN = "images.json"
_MOST = 5_000_000
"""Images that are remembered; of more, which were seen is not known."""
_LARGEST = 30 * _MOST
"""Bytes of the file: 24 an image."""


@dataclass(frozen=True)
class Seen:
    """Images by ``LabelledImages.identity``: of files, their content counts, not where they lie.

    Args:
        trained: those that the weights were trained on; None where that cannot be told, as for
            tensors, or they are millions.
        chosen: those that the saved epoch was chosen by.
    """

    trained: frozenset[str] | None
    chosen: frozenset[str] | None

    @classmethod
    def by(cls, trained: Dataset[Any], chosen: Dataset[Any] | None) -> Seen:
        """What a run on these data sets will have seen."""
        return cls(_identities(trained), frozenset() if chosen is None else _identities(chosen))

    def write(self, run: Path) -> None:
        """Puts it into the folder of a run."""
        write_json(run / SEEN, {name: None if ids is None else sorted(ids) for name, ids in vars(self).items()})

    @classmethod
    def read(cls, run: Path) -> Seen | None:
        """What the folder of a run, or of its last epoch, remembers; None where there is nothing.

        Raises:
            CheckpointError: the file is damaged.
        """
        places = (run / SEEN, run.parent / SEEN) if run.name == "last" else (run / SEEN,)
        path = next((path for path in places if path.is_file()), None)
        if path is None:
            return None
        try:
            kept = load_json(path, _LARGEST)
            lists = [kept["trained"], kept["chosen"]]
            if not all(ids is None or all(isinstance(each, str) for each in ids) for ids in lists):
                raise TypeError("expected texts")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({type(error).__name__}). Copy it again, or remove it; without it, what the "
                "run was trained on is not known."
            ) from error
        return cls(*(None if ids is None else frozenset(ids) for ids in lists))

    def count(self, images: LabelledImages) -> tuple[int | None, int | None]:
        """How many of the images the run was trained on, and how many its epoch was chosen by; None if not known."""
        ids = [images.identity(index) for index in range(len(images))]

        def among(known: frozenset[str] | None) -> int | None:
            return None if known is None else sum(each in known for each in ids)

        return among(self.trained), among(self.chosen)


def _identities(dataset: Dataset[Any]) -> frozenset[str] | None:
    if not isinstance(dataset, LabelledImages) or len(dataset) > _MOST:
        return None
    return frozenset(dataset.identity(index) for index in range(len(dataset)))
