"""The image processors of transformers' models: small files beside their weights that say what images go through."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyntune.backbones.hub import quickly
from dyntune.core.errors import BackboneError, in_one_line
from dyntune.core.files import load_json, write_json
from dyntune.data.transforms import Preprocessing

log = logging.getLogger("dyntune")

_INCEPTION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_DEFAULTS: dict[str, tuple[tuple[tuple[float, ...], tuple[float, ...]], str]] = {
    "vit": (_INCEPTION, "bilinear"),
    "deit": (_IMAGENET, "bicubic"),
    "dinov2": (_IMAGENET, "bicubic"),
    "dinov3": (_IMAGENET, "bilinear"),
    "clip": (_CLIP, "bicubic"),
    "siglip": (_INCEPTION, "bicubic"),
    "siglip2": (_INCEPTION, "bilinear"),
}
"""Mean and deviation, and resize, of each kind of model, for those that come without an image processor's file."""
_RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Pillow's numbers of resizes."""
_PROCESSOR = "preprocessor_config.json"
_JOINT_PROCESSOR = "processor_config.json"
"""Where transformers 5 puts what processors of images and texts have in common: the former's in ``image_processor``."""


def revision_of(host: Any) -> str | None:
    """The commit of the repository that a model was read from, where it is known."""
    return getattr(host, "dyntune_revision", None) or getattr(host.config, "_commit_hash", None)


def cached(repository: str, file: str, revision: str | None) -> Path | None:
    """Where the cache has a file of a repository, if it has it; the folder is named by the commit."""
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(Exception):  # a name that is none of a repository
        path = try_to_load_from_cache(repository, file, revision=revision)
        return Path(path) if isinstance(path, str) else None
    return None


def _processor(host: Any) -> dict[str, Any]:
    """What the image processor's file beside a model's weights says, or that in their repository; empty without one."""
    for file, fetch in ((_JOINT_PROCESSOR, False), (_PROCESSOR, False), (_PROCESSOR, True), (_JOINT_PROCESSOR, True)):
        values = _beside(host, file, fetch)
        if file == _JOINT_PROCESSOR:
            values = values.get("image_processor") or {}
        if values:
            return values
    return {}


@functools.cache
def _fetched(repository: str, file: str, revision: str | None) -> Path | None:
    """A small file of a repository, from the hub; None if the repository has none.

    Where the hub cannot say whether it has one, a warning says that what is usual is taken. It is asked once.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        with quickly():
            return Path(hf_hub_download(repository, file, revision=revision))
    except (EntryNotFoundError, HFValidationError) as error:
        if isinstance(error, LocalEntryNotFoundError) and file == _PROCESSOR:
            log.warning(
                "whether %s has a %s is not known, because it cannot be reached: size, mean and deviation of the "
                "images are those that are usual for the kind of model. Fetch the file once, with a network.",
                repository,
                file,
            )
        return None
    except Exception as error:  # a repository that is closed or gone: the network stack has its own errors for this
        log.warning("%s of %s cannot be had: %s.", file, repository, in_one_line(error))
        return None


def _beside(host: Any, file: str, fetch: bool) -> dict[str, Any]:
    """A JSON file beside a model's weights, or of its repository: from the cache, or to ``fetch`` the hub; or empty."""
    place = getattr(host, "name_or_path", "") or ""
    path: Path | None = Path(place) / file
    if place and not Path(place).is_dir():
        path = (_fetched if fetch else cached)(place, file, revision_of(host))
    if not place or path is None or not path.is_file():
        return {}
    try:
        values = load_json(Path(path))
    except (ValueError, OSError) as error:
        raise BackboneError(f"{path} is not readable JSON: {error}.") from error
    return values if isinstance(values, dict) else {}


def processor_size(host: Any) -> tuple[int, int] | None:
    """Height and width of the images that the image processor beside a model's weights gives."""
    values = _processor(host)
    size = (values.get("crop_size") if values.get("do_center_crop") else None) or values.get("size")
    if not isinstance(size, dict):
        size = {"shortest_edge": size}
    edge = size.get("shortest_edge")
    height, width = size.get("height", edge), size.get("width", edge)
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def preprocessing(host: Any, kind: str, size: tuple[int, int]) -> Preprocessing:
    """What images go through: as the image processor's file says, or else as is usual for the kind of model.

    Images are resized to ``size`` directly, where a processor may resize the shorter edge and crop.

    Args:
        host: the model.
        kind: ``model_type`` of its tower.
        size: height and width.

    Raises:
        BackboneError: the processor multiplies pixels by 0.
    """
    family = next(name for name in ("siglip2", "siglip", "clip", "dinov3", "dinov2", "deit", "vit") if name in kind)
    (mean, std), interpolation = _DEFAULTS[family]
    # An entry that is null says as much as one that is absent.
    values = {name: value for name, value in _processor(host).items() if value is not None}
    factor = values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1.0
    if type(factor) not in (int, float) or not factor > 0:
        raise BackboneError(
            f"the image processor beside {host.name_or_path} multiplies pixels by {factor!r:.40}; expected a factor "
            "above 0, for instance 1/255."
        )
    if values.get("do_normalize") is False:
        mean, std = (0.0,) * 3, (1.0,) * 3
    else:
        mean, std = (
            _of_channels(host, values, name, usual) for name, usual in (("image_mean", mean), ("image_std", std))
        )
    resample = values.get("resample")
    if isinstance(resample, int) and 0 <= resample < len(_RESAMPLE):
        interpolation = _RESAMPLE[resample]
    # Pixels are scaled from 0 to 1 here; another scale is one of mean and deviation.
    scale = 255 * factor
    if abs(scale - 1) > 1e-6:
        mean, std = tuple(value / scale for value in mean), tuple(value / scale for value in std)
    return Preprocessing(size, mean, std, interpolation)


def _of_channels(host: Any, values: dict[str, Any], name: str, usual: Sequence[float]) -> tuple[float, ...]:
    """What a processor says of each of three channels, for which it may have one number."""
    given = values.get(name, usual)
    numbers = [given] * 3 if isinstance(given, int | float) else given
    if (
        not isinstance(numbers, list | tuple)
        or len(numbers) != 3
        or not all(type(number) in (int, float) for number in numbers)
    ):
        raise BackboneError(
            f"the image processor beside {host.name_or_path} has {name}={given!r:.60}; expected a number, or one for "
            "each of three channels."
        )
    return tuple(numbers)


def write_processor(preprocessing: Preprocessing, folder: Path, config: Any) -> None:
    """Writes the file of an image processor that does what was done in training.

    That of SigLIP 2 keeps the aspect of images, as in its own training, and gives at most as many patches.

    Args:
        preprocessing: of the training.
        folder: where the model lies.
        config: of the model.
    """
    height, width = preprocessing.size
    kind, patch = getattr(config, "model_type", ""), getattr(config, "patch_size", 0)
    if kind.startswith("siglip2"):
        patches = (height // patch) * (width // patch)
        own = {"image_processor_type": "Siglip2ImageProcessor", "patch_size": patch, "max_num_patches": patches}
    else:
        own = {"image_processor_type": "ViTImageProcessor", "size": {"height": height, "width": width}}
    values = own | {
        "do_resize": True,
        "resample": _RESAMPLE.index(preprocessing.interpolation),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }
    write_json(folder / _PROCESSOR, values)
