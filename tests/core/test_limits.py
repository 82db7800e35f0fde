"""What libraries say at a limit of the machine, as sentences."""

import errno

import pytest

from dyntune.core.errors import DataError, MachineError
from dyntune.core.limits import limits_named

CASES = {
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
    "shared memory. Please try to raise your shared memory limit.": "shared memory.*--workers 0.*--shm-size",
    "unable to write to file </torch_12_34_0>: No space left on device (28)": "shared memory.*--workers 0",
    "received 0 items of ancdata": "shared memory",
    "Too many open files. Communication with the workers is no longer possible.": "ulimit -n",
    "DataLoader worker (pid 7) is killed by signal: Killed.": "memory does not suffice",
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory": "memory does",
    "CUDA out of memory. Tried to allocate 20.00 MiB.": "memory does not suffice.*--batch-size",
}


@pytest.mark.parametrize("words", CASES)
def test_what_torch_says_becomes_a_sentence_with_what_to_do(words):
    with pytest.raises(MachineError, match=CASES[words]) as caught, limits_named():
        raise RuntimeError(words)
    assert "\n" not in str(caught.value) and str(caught.value.__cause__) == words


def test_the_reason_may_lie_deeper():
    with pytest.raises(MachineError, match="no room left on the disk in /somewhere"), limits_named():
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/file")
        except OSError as error:
            raise ValueError("could not save") from error


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("memory"), DataError("bad file")])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, limits_named():
        raise error
    assert caught.value is error
