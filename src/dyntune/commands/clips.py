"""Options of the commands that take clips of videos."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

import typer

from dyntune.backbones.families.frames import Frames
from dyntune.backbones.families.inflated import Inflated
from dyntune.backbones.families.space_time import SpaceTime
from dyntune.backbones.temporal import Temporal
from dyntune.core.errors import DataError, SpecError
from dyntune.core.fields import Range, require_ranges
from dyntune.data.clips import Sampling
from dyntune.data.transforms import Preprocessing

ViewsOption = Annotated[
    str | None,
    typer.Option("--views", help="Of videos: clips spread over each x crops of each, 3x1, instead of the run's."),
]


@dataclass(frozen=True)
class ClipOptions:
    """Clips of videos instead of images; without ``frames`` no other of these may be given.

    Args:
        frames: frames of a clip; 0 for images. Each goes through the image model, and a temporal head reads all.
        temporal: head over the frames; a mean cannot see their order.
        time: whether the head learns a vector for each place in time, without which it cannot see the order; auto does
            where the head is no mean.
        stride: distance between two frames of a clip, with spans.
        sampling: spans takes frames at a fixed distance, segments one from each of as many parts of the video.
        views: clips spread over a video x crops of each (1 or 3) in a test, averaged.
        average: what is averaged over these views.
        flip: probability with which a training clip is mirrored; 0 where left and right are classes.
    """

    frames: Annotated[int, Range(0)] = 0
    temporal: Temporal = "attentive"
    time: Literal["auto", "learned", "none"] = "auto"
    stride: Annotated[int, Range(1)] = 16
    sampling: Literal["spans", "segments"] = "spans"
    views: str = "1x1"
    average: Literal["probabilities", "logits"] = "probabilities"
    flip: Annotated[float, Range(0, 1)] = 0.5

    def __post_init__(self) -> None:
        require_ranges(self, DataError)
        if not self.frames and any(getattr(self, own.name) != own.default for own in fields(self)):
            raise SpecError("options of clips need --frames, which makes an image model take clips: --frames 8.")

    def backbone(self, name: str) -> tuple[str, dict[str, Any]]:
        """Name and arguments of a backbone: of one of clips, where they are asked for."""
        if not self.frames:
            return name, {}
        if name.startswith((SpaceTime.prefix, Inflated.prefix)):
            return name, {"frames": self.frames}
        time = {} if self.time == "auto" else {"time": self.time}
        name = name if name.startswith(Frames.prefix) else f"{Frames.prefix}{name}"
        return name, {"frames": self.frames, "temporal": self.temporal, **time}

    def preprocessing(self, own: Preprocessing) -> Preprocessing:
        """A backbone's preprocessing with clips taken as these options say."""
        if own.clip is None or not self.frames:
            return own
        spans, crops = parse_views(self.views)
        clip = Sampling(self.frames, self.stride, self.sampling, spans, crops, self.average, self.flip)
        return replace(own, clip=clip)


def parse_views(text: str) -> tuple[int, int]:
    """Clips and crops of ``3x1``.

    Raises:
        DataError: it is written otherwise.
    """
    spans, cross, crops = text.partition("x")
    if not cross or not spans.isdecimal() or not crops.isdecimal():
        raise DataError(f"--views {text!r}: expected clips x crops, such as 3x1.")
    return int(spans), int(crops)


def with_views(own: Preprocessing, views: str | None) -> Preprocessing:
    """A run's preprocessing with the views that ``--views`` gives."""
    if views is None:
        return own
    if own.clip is None:
        raise DataError("--views is for models of clips, and this one takes images. Leave it out.")
    spans, crops = parse_views(views)
    return replace(own, clip=replace(own.clip, spans=spans, crops=crops))
