"""What processes that train together tell each other."""

import torch
from torch import Tensor


def mean_over_processes(tensor: Tensor) -> Tensor:
    """The mean of what each process that trains with this one has; the tensor itself where there is no other.

    Every process must call it.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()
