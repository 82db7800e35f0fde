"""A model's forward pass as one CUDA graph."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dyntune.core.errors import DyntuneError


def capture(model: Callable[[Tensor], Tensor], images: Tensor, warmup: int = 3) -> Callable[[Tensor], Tensor]:
    """Records one forward pass; replaying it costs the host one launch.

    Args:
        model: a model in eval mode, or any function, that neither synchronises nor allocates on the host: one that
            runs with ``DeviceCounts``.
        images: a batch on the CUDA device, of the only shape and dtype that the graph takes. Where kernels have not yet
            run for this many tokens they are tuned to what this batch leaves active, and stay so: give a usual batch.
        warmup: passes before the recording, at least 1: in the first kernels are compiled and tuned, which a recording
            cannot hold.

    Returns:
        A function from such a batch to a tensor of its own with the logits.

    Raises:
        DyntuneError: the images are not on a CUDA device, or there is no warm-up; later, a batch has another shape or
            dtype.
    """
    if warmup < 1:
        raise DyntuneError(f"warmup must be at least 1, for kernels are compiled and tuned in it; given {warmup}.")
    if not images.is_cuda:
        raise DyntuneError(f"a CUDA graph needs images on a CUDA device; given {images.device}. Move model and images.")
    with torch.no_grad(), torch.cuda.device(images.device):
        held = images.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warmup):
                model(held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(held)

    return Replay(model, graph, held, logits)


class Replay:
    """A recorded pass; threads that call it take turns.

    Args:
        model: what was recorded; the graph reads its weights where they lie, so they must live as long as it does.
        graph: the record.
        held: the images that it reads.
        logits: what it writes.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], graph: Any, held: Tensor, logits: Tensor) -> None:
        self.model, self._graph, self._held, self._logits = model, graph, held, logits
        self._turn = threading.Lock()

    def __call__(self, batch: Tensor) -> Tensor:
        held = self._held
        if batch.shape != held.shape or batch.dtype != held.dtype:
            raise DyntuneError(
                f"the graph takes {held.dtype} images of shape {tuple(held.shape)}; given {batch.dtype} "
                f"{tuple(batch.shape)}. Pad the batch, or capture the model for that shape too."
            )
        with self._turn, torch.no_grad(), torch.cuda.device(held.device):
            held.copy_(batch)
            self._graph.replay()
            return self._logits.clone()
