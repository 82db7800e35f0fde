"""Folders of videos with one subfolder per class."""

import os
from pathlib import Path
from typing import ClassVar

from dyntune.data.base import LabelledImages
from dyntune.data.images import list_images
from dyntune.data.sources.folder import Folder, Kind
from dyntune.data.videos import LabelledVideos, holds_frames, is_video_name, report_left, scan_videos


def _labelled_videos(paths: list[Path], labels: list[int], root: Path) -> LabelledImages:
    return LabelledVideos(paths, labels, root=root)


class VideoFolder(Folder):
    """A folder of videos, laid out, split and labelled as one of images; a video is a file, or a folder of frames."""

    prefix = "video-folder:"
    form = "video-folder:PATH"
    order = 0
    kind: ClassVar[Kind] = Kind(
        "video",
        "Expected PATH/train/CLASS/VIDEO, with PATH/val and PATH/test beside it where there are any, or "
        "PATH/CLASS/VIDEO; a video is a file, or a folder of frames.",
        is_video_name,
        scan_videos,
        report_left,
        _labelled_videos,
        ("folder:", lambda path: bool(list_images(path))),
        lambda path: holds_frames(os.listdir(path)),
    )

    def recognises(self, path: Path) -> bool:
        return False  # a folder without a prefix is one of images
