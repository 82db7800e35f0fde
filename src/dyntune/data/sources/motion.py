"""Drawn videos whose classes differ in the order of frames alone: a data set that needs no download."""

from dyntune.data.base import DataSplits
from dyntune.data.drawn.motion import write_motion
from dyntune.data.sources.base import Request, Source
from dyntune.data.sources.video_folder import VideoFolder


class Motion(Source):
    """Eight classes, left and right, up and down, grow and shrink, turn-left and turn-right; 64 x 64, 24 frames.

    Real H.264 files, which are written into the data folder when they are first asked for (480 to train on, 160 to
    choose by, 160 to test on), and read as any folder of videos. One frame tells nothing, and the frames without their
    order tell the pair but not the class, so that a model that does not see their order has at most half right. Leave
    mirroring out: ``--flip 0``.
    """

    names = ("motion",)

    def load(self, request: Request) -> DataSplits:
        folder = write_motion(request.data_root / "motion")
        return VideoFolder().load(Request(request.name, str(folder), request.seed, request.val_fraction))
