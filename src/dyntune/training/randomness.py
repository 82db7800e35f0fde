"""Random numbers that depend on where a run is, not on how it got there: what makes resuming exact."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler


def seed_all(*position: int) -> None:
    """Seeds Python, NumPy and PyTorch from a position such as (seed, epoch, step, process).

    Called before every step, it makes the step's noise independent of everything that ran before, so a resumed run
    needs no saved random state.
    """
    python, numpy_, torch_ = (int(word) for word in np.random.SeedSequence(position).generate_state(3))
    random.seed(python)
    np.random.seed(numpy_)  # noqa: NPY002  timm's transforms draw from the global generator
    torch.manual_seed(torch_)


@contextmanager
def caller_randomness_kept() -> Iterator[None]:
    """Gives the global generators back as they were found: a library must not reseed the program that calls it."""
    python, numpy_ = random.getstate(), np.random.get_state()  # noqa: NPY002
    seed, started = torch.initial_seed(), torch.cuda.is_available() and torch.cuda.is_initialized()
    # Seeding seeds every accelerator too.
    apples = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if started else ()):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_)  # noqa: NPY002
        if apples is not None:
            torch.mps.set_rng_state(apples)
        if torch.cuda.is_available() and not started:
            torch.cuda.manual_seed_all(seed)  # what it would have begun with


class EpochSampler(Sampler[int]):
    """Every index, in an order that depends on seed and epoch only; can begin in the middle.

    Args:
        size: number of samples.
        seed: of the run.
        multiple: there are so many indices, or a multiple of it, as several processes need: the order is filled up
            from its beginning.
        drop: the order is cut instead.
    """

    def __init__(self, size: int, seed: int, multiple: int = 1, *, drop: bool = False) -> None:
        self.size = size
        self.count = size - size % multiple if drop else size + -size % multiple
        self.seed = seed
        self.epoch = 0
        self.skip = 0

    def __len__(self) -> int:
        return self.count - self.skip

    def __iter__(self) -> Any:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
        return iter(np.resize(order, self.count)[self.skip :].tolist())


class SeededDataset(Dataset[Any]):
    """A data set whose random transforms depend on seed, epoch and index only, in any process and order."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        seed_all(self.seed, self.epoch, 1, index)
        return self.dataset[index]
