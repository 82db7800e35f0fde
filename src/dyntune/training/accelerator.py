"""The Accelerate object of a run: device, precision, gradient accumulation, and the processes that take part."""

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from dyntune.core.errors import TrainingError
from dyntune.training.settings import TrainSettings


def make_accelerator(settings: TrainSettings) -> Accelerator:
    """Raises TrainingError when the machine does not have what the settings ask for."""
    precision = {"fp32": "no"}.get(settings.precision, settings.precision)
    cpu = settings.device == "cpu"
    # Accelerate keeps precision and device for the whole process; without this a second run could not choose others.
    if AcceleratorState._shared_state and AcceleratorState().num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=cpu, mixed_precision=precision, gradient_accumulation_steps=settings.accumulate)
    if settings.device in ("cuda", "mps") and accelerator.device.type != settings.device:
        raise TrainingError(f"device={settings.device}: there is none; this machine offers {accelerator.device.type}.")
    if settings.precision == "fp16" and accelerator.device.type == "cpu":
        raise TrainingError("precision=fp16 needs a GPU; on a CPU use fp32 or bf16.")
    return accelerator
