"""Random numbers that depend on where a run is, not on how it got there: what makes resuming exact."""

import random
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


class EpochSampler(Sampler[int]):
    """Every index once, in an order that depends on seed and epoch only; can begin in the middle.

    Args:
        size: number of samples.
        seed: of the run.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0
        self.skip = 0

    def __len__(self) -> int:
        return self.size - self.skip

    def __iter__(self) -> Any:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
        return iter(order[self.skip :].tolist())


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
