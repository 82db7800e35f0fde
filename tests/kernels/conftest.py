"""The kernels run on a GPU, or through Triton's interpreter, which must be chosen before Triton is first imported.

So without a GPU these tests run in a process of their own, which ``test_interpreter.py`` starts.
"""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dyntune.inference.kernels.launch import unavailable

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNNABLE = (INTERPRETED or torch.cuda.is_available()) and unavailable(
    torch.device("cpu" if INTERPRETED else "cuda")
) is None
# These files run in the one process of test_interpreter.py.
collect_ignore = [] if RUNNABLE else ["test_tiles.py", "test_products.py", "test_execution.py"]
collect_ignore += ["test_interpreter.py", "test_hopper.py", "test_unavailable.py"] if INTERPRETED else []


class NothingComesBack(TorchDispatchMode):
    """Fails at operators whose result, or its shape, the host must wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        waits = name in ("_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "equal", "is_nonzero")
        if name in ("index", "index_put", "index_put_"):
            waits = any(index is not None and index.dtype is torch.bool for index in args[1])
        assert not waits, f"{func} asks the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def nothing_comes_back() -> type[NothingComesBack]:
    """A context in which asking the device for a value fails."""
    return NothingComesBack
