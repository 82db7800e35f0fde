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


_OF_HEAD = ("temporal", "time")
_OF_SAMPLING = ("stride", "sampling", "average", "flip")


@dataclass(frozen=True)
class ClipOptions:
    """Clips of videos instead of images, which an image model takes where ``frames`` is given, a model of clips always.

    Args:
        frames: frames of a clip; 0 for images, or as many as a model of clips takes by itself. Each goes through the
            image model, and a temporal head reads all.
        temporal: head over the frames; a mean cannot see their order.
        time: whether the head learns a vector for each place in time, without which it cannot see the order; auto does
            where the head is no mean.
        stride: distance between two frames of a clip, with spans; by default 4 for VideoMAE and 16 for other models.
        sampling: spans takes frames at a fixed distance, segments one from each of as many parts of the video.
        views: clips spread over a video x crops of each (1 or 3) in a test, averaged.
        average: what is averaged over these views.
        flip: probability with which a training clip is mirrored; 0 where left and right are classes.
    """

    frames: Annotated[int, Range(0)] = 0
    temporal: Temporal = "attentive"
    time: Literal["auto", "learned", "none"] = "auto"
    stride: Annotated[int | None, Range(1)] = None
    sampling: Literal["spans", "segments"] = "spans"
    views: str = "1x1"
    average: Literal["probabilities", "logits"] = "probabilities"
    flip: Annotated[float, Range(0, 1)] = 0.5

    def __post_init__(self) -> None:
        require_ranges(self, DataError)
        Sampling(**self._sampling)  # says what does not go together

    @property
    def _given(self) -> dict[str, Any]:
        """The options that are not as they are by default."""
        values = {own.name: getattr(self, own.name) for own in fields(self)}
        return {own.name: values[own.name] for own in fields(self) if values[own.name] != own.default}

    @property
    def _sampling(self) -> dict[str, Any]:
        """What differs from the sampling of the backbone's own."""
        changes = {name: value for name, value in self._given.items() if name in _OF_SAMPLING}
        if "views" in self._given:
            changes["spans"], changes["crops"] = parse_views(self.views)
        return changes

    def backbone(self, name: str) -> tuple[str, dict[str, Any]]:
        """Name and arguments of a backbone: of one of clips, where they are asked for.

        Raises:
            SpecError: an option does nothing for this backbone.
        """
        head = [f"--{own}" for own in _OF_HEAD if own in self._given]
        if name.startswith((SpaceTime.prefix, Inflated.prefix)):
            if head:
                raise SpecError(
                    f"{' and '.join(head)}: the head over an image model's frames, which {name} does not have, for its "
                    "tokens are those of the whole clip. Leave it out."
                )
        elif not name.startswith(Frames.prefix):
            if not self.frames:
                if self._given:
                    raise SpecError(
                        "options of clips need --frames, which makes an image model take clips: --frames 8."
                    )
                return name, {}
            name = f"{Frames.prefix}{name}"
        return name, {own: value for own, value in self._given.items() if own in ("frames", *_OF_HEAD)}

    def preprocessing(self, own: Preprocessing) -> Preprocessing:
        """A backbone's preprocessing with clips taken as these options say, and as its own where they say nothing."""
        return own if own.clip is None else replace(own, clip=replace(own.clip, **self._sampling))


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
