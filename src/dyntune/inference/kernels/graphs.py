"""A model's forward pass as one CUDA graph."""

from collections.abc import Callable

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

    def replay(batch: Tensor) -> Tensor:
        if batch.shape != held.shape or batch.dtype != held.dtype:
            raise DyntuneError(
                f"the graph takes {held.dtype} images of shape {tuple(held.shape)}; given {batch.dtype} "
                f"{tuple(batch.shape)}. Pad the batch, or capture the model for that shape too."
            )
        with torch.no_grad(), torch.cuda.device(held.device):
            held.copy_(batch)
            graph.replay()
            return logits.clone()

    return replay
