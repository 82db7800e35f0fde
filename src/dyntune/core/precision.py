"""Mixed precision, switched off where it would cost what counts."""

from contextlib import AbstractContextManager, nullcontext

import torch


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Switches mixed precision off; tracing on the meta device, there is none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
