"""The plan of a measurement: the model, its peers, runtimes, batch sizes and rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from dyntune.core.errors import SpecError
from dyntune.core.fields import Range, require_ranges
from dyntune.parts.registry import resolve
from dyntune.studies.bench.peers import DENSE, GATHER
from dyntune.studies.bench.runtimes import IN_TORCH, check_runtime


@dataclass(frozen=True)
class Plan:
    """A model, what it is compared with, and how. All values are plain, so that a process can be told.

    Args:
        run: folder of a saved run; None for a fresh model.
        model: timm name of the backbone of a fresh model.
        parts: tuning methods and token policies of a fresh model; token policies on top of a run.
        weights: local weight file of the backbone.
        pretrained: whether a fresh model gets the weights that timm has for its name; else they are random.
        classes: classes of a fresh model's head.
        against: what the model is compared with: ``dense`` (the untouched backbone, always there), specs of fresh
            models such as ``adaptformer`` or ``tome:r=8``, and ``gather`` (the model itself in plain torch).
        runtimes: where the models run.
        batch_sizes: images per call.
        rate: share of the patches that gates let through: of a fresh model, whose target it is by default, set exactly
            on the timed images; of a run, as ``set_rate()`` sets it, by default what it has learned.
        data: DATA argument of the timed images, such as ``digits``; noise by default.
        on_corrupt: what to do with images that cannot be read.
        threads: threads of each runtime; by default as many as torch takes, one per core that it may use.
        device: of runtimes in torch; the others run on the CPU.
        rounds: turns of each model at each batch size.
        seconds: least time of a turn.
        seed: decides random weights and noise.
    """

    run: str | None = None
    model: str = ""
    parts: tuple[str, ...] = ()
    weights: str | None = None
    pretrained: bool = False
    classes: Annotated[int, Range(1)] = 100
    against: tuple[str, ...] = (DENSE,)
    runtimes: tuple[str, ...] = ("eager",)
    batch_sizes: tuple[int, ...] = (1,)
    rate: float | None = None
    data: str | None = None
    on_corrupt: Literal["error", "skip"] = "error"
    threads: Annotated[int | None, Range(1)] = None
    device: str = "cpu"
    rounds: Annotated[int, Range(1)] = 15
    seconds: Annotated[float, Range(0)] = 0.2
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0

    def __post_init__(self) -> None:
        require_ranges(self, SpecError)
        object.__setattr__(self, "against", (DENSE, *(peer for peer in self.against if peer != DENSE)))
        for name in ("runtimes", "batch_sizes", "against"):
            _require_different(name.replace("_", " "), getattr(self, name))
        for runtime in self.runtimes:
            check_runtime(runtime)
        if min(self.batch_sizes) < 1:
            raise SpecError(f"batch sizes {self.batch_sizes}: expected whole numbers of at least 1.")
        if self.rate is not None and not 0 <= self.rate <= 1:
            raise SpecError(f"rate {self.rate}: expected a share of the patches between 0 and 1.")
        resolve(peer for peer in self.against if peer not in (DENSE, GATHER))
        if GATHER in self.against and not set(self.runtimes) & set(IN_TORCH):
            raise SpecError(
                f"{GATHER} runs in torch, which would disturb the threads of {', '.join(self.runtimes)}. Add "
                f"{' or '.join(IN_TORCH)} to the runtimes, or leave {GATHER} out."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """The plan that ``to_dict`` wrote."""
        plain: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in values.items()}
        return cls(**plain)


def _require_different(what: str, values: Sequence[Any]) -> None:
    if not values or len(set(values)) < len(values):
        raise SpecError(f"{what} {', '.join(map(str, values)) or 'none'}: expected at least one, each once.")
