"""Models of Hugging Face's transformers: built from a folder or the hub, given a classifier, and written.

transformers is imported when a model of it is asked for or put together.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from dyntune.backbones.hub import cache_alone, quickly
from dyntune.backbones.huggingface_processor import cached, revision_of, write_processor
from dyntune.core.errors import BackboneError, how_to_install, in_one_line
from dyntune.core.files import room_beside
from dyntune.core.limits import limits_named
from dyntune.data.transforms import Preprocessing

log = logging.getLogger("dyntune")

PREFIX = "hf:"
Pool = Literal["token", "avg", "token+avg"]
"""What a head on a tower reads: the tower's own pooled output, the mean of the patches, or both beside each other."""

MODELS: dict[str, tuple[str | None, str | None]] = {
    "vit": ("ViTForImageClassification", None),
    "deit": ("DeiTForImageClassification", None),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Model"),
    "dinov2_with_registers": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersModel"),
    "dinov3_vit": (None, "DINOv3ViTModel"),
    "clip": ("CLIPForImageClassification", "CLIPVisionModel"),
    "clip_vision_model": (None, "CLIPVisionModel"),
    "siglip": ("SiglipForImageClassification", "SiglipVisionModel"),
    "siglip_vision_model": (None, "SiglipVisionModel"),
    "siglip2": ("Siglip2ForImageClassification", "Siglip2VisionModel"),
    "siglip2_vision_model": (None, "Siglip2VisionModel"),
}
"""By ``model_type`` of a configuration: the classifier, and the tower that a head can be put on."""

_CONFIG = "config.json"
_NOT_COMPUTED = frozenset(
    {
        *("architectures", "id2label", "label2id", "problem_type", "_name_or_path", "transformers_version"),
        *("dtype", "torch_dtype", "output_attentions", "output_hidden_states", "return_dict", "_attn_implementation"),
        *("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "drop_path_rate"),
        *("initializer_range", "initializer_factor", "apply_layernorm", "reshape_hidden_states", "out_features"),
        *("out_indices", "stage_names", "_out_features", "_out_indices"),
    }
)
"""Entries of a configuration that change no feature of an image at inference, or those of the classifier alone."""


class TowerClassifier(nn.Module):
    """A vision tower of transformers with a linear classifier on it, called as transformers' own classifiers are.

    Args:
        tower: a Dinov2, DINOv3, CLIP or SigLIP vision model.
        classes: outputs of the classifier.
        pool: what it reads, see ``Pool``.
    """

    base_model_prefix: ClassVar[str] = "tower"
    """What PEFT asks of a model that has a ``config``."""

    def __init__(self, tower: nn.Module, classes: int, pool: Pool = "token") -> None:
        super().__init__()
        self.tower = tower
        self.pool = pool
        width = self.config.hidden_size
        self.classifier = new_classifier(2 * width if pool == "token+avg" else width, classes)
        self.classifier.to(next(tower.parameters()))
        if classes != self.config.num_labels:
            self.config.num_labels = classes

    @property
    def config(self) -> Any:
        """The tower's configuration, which holds the names of the classes too."""
        return self.tower.config

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **inputs: Any) -> Any:
        """Images ``(B, 3, height, width)`` to transformers' ``ImageClassifierOutput``; with labels, its loss too."""
        outputs = self.tower(pixel_values, **inputs)
        read = []
        if "token" in self.pool:
            read.append(outputs.pooler_output)
        if "avg" in self.pool:
            read.append(outputs.last_hidden_state[:, prefix_tokens(self.config) :].mean(1))
        logits = self.classifier(torch.cat(read, dim=1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return library().modeling_outputs.ImageClassifierOutput(loss=loss, logits=logits)


def new_classifier(width: int, classes: int) -> nn.Module:
    """A linear classifier with the initial values of transformers'; ``nn.Identity`` for 0 classes."""
    if not classes:
        return nn.Identity()
    classifier = nn.Linear(width, classes)
    nn.init.trunc_normal_(classifier.weight, std=0.02)
    nn.init.zeros_(classifier.bias)
    return classifier


def add_classifier(tower: nn.Module, classes: int, pool: Pool = "token") -> TowerClassifier:
    """Puts a new linear classifier on a vision tower of transformers that has none, such as ``DINOv3ViTModel``.

    Args:
        tower: a Dinov2, DINOv3, CLIP or SigLIP vision model.
        classes: outputs of the classifier.
        pool: ``token`` for the tower's own pooled output (the class token, or SigLIP's attention pool), ``avg`` for the
            mean of the patches, ``token+avg`` for both.

    Raises:
        BackboneError: the model is no such tower, ``pool`` is none of these, or the tower has no such output.
    """
    kinds = {name for _, name in MODELS.values() if name}
    given = type(tower).__name__
    whole = given.replace("VisionTransformer", "VisionModel")
    if given not in kinds:
        advice = f" That is what {whole} holds: give {whole}.from_pretrained(...)." if whole in kinds else ""
        raise BackboneError(f"a classifier goes on one of {', '.join(sorted(kinds))}; given {given}.{advice}")
    if pool not in ("token", "avg", "token+avg"):
        raise BackboneError(f"pool={pool!r}: expected token, avg or token+avg.")
    if pool != "avg" and without_pool(tower):
        raise BackboneError(
            f"pool={pool!r}: this {given} has no attention pool (vision_use_head=False); give pool='avg'."
        )
    return TowerClassifier(tower, classes, pool)


def without_pool(tower: nn.Module) -> bool:
    """Whether a SigLIP tower was built without the attention pool whose output stands for the image."""
    config: Any = tower.config
    return config.model_type.startswith("siglip") and not hasattr(getattr(tower, "vision_model", tower), "head")


def prefix_tokens(config: Any) -> int:
    """How many tokens stand in front of the patches, by the configuration of a tower."""
    kind = config.model_type
    if kind.startswith("siglip"):
        return 0
    return {"deit": 2}.get(kind, 1 + (getattr(config, "num_register_tokens", 0) or 0))


def library() -> Any:
    """The module ``transformers``.

    Raises:
        BackboneError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise BackboneError(
            f"models of Hugging Face need transformers, which cannot be imported ({in_one_line(error)}). Install it: "
            f"{how_to_install('hf')}."
        ) from error
    return transformers


def create(
    name: str,
    *,
    weights: str | Path | None = None,
    pretrained: bool = True,
    num_classes: int | None = None,
    img_size: int | list[int] | tuple[int, int] | None = None,
    pool: Pool | None = None,
    revision: str | None = None,
    drop_path_rate: float = 0.0,
) -> nn.Module:
    """A vision model of transformers with a classifier.

    Args:
        name: ``hf:`` and a local folder or the name of a repository.
        weights: local folder or weight file (.safetensors, .bin, .pth) with transformers' names, instead.
        pretrained: False for random weights; only the configuration is read then.
        num_classes: outputs of the classifier; that of the file if None, a tower without classifier if 0.
        img_size: height and width of the images, where they are not those of the configuration.
        pool: put a classifier on the bare tower, which reads this, instead of taking transformers' classifier.
        revision: of the repository.
        drop_path_rate: probability of dropping a sub-layer's update while training, for models that have it.

    Raises:
        BackboneError: transformers is missing, the files cannot be had, or they are not those of a supported model.
    """
    transformers = library()
    source = name.removeprefix(PREFIX)
    place = folder_of(weights) or source
    known = {} if Path(place).is_dir() or revision is None else {"revision": revision}
    with _quiet(transformers), _told(source, weights):
        config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False, **known)
    classifier, tower = MODELS.get(config.model_type, (None, None))
    if classifier is None and tower is None:
        raise BackboneError(
            f"{name} is a {config.model_type!r}; supported are {', '.join(MODELS)}. Models of timm are built with "
            "hf-hub:NAME."
        )
    if config.model_type == "deit" and "DeiTForImageClassificationWithTeacher" in (config.architectures or ()):
        classifier = "DeiTForImageClassificationWithTeacher"
    bare = classifier is None or pool is not None or num_classes == 0
    if bare and tower is None:
        bare, pool = False, None
    vision = getattr(config, "vision_config", config)
    built = vision if bare else config
    if num_classes is not None and num_classes != config.num_labels:
        built.num_labels = num_classes
        built.problem_type = None  # that of the classifier which goes
    if drop_path_rate:
        if not hasattr(vision, "drop_path_rate"):
            raise BackboneError(f"{name} has no drop path; leave drop_path_rate out.")
        vision.drop_path_rate = drop_path_rate
    cls = getattr(transformers, str(tower if bare else classifier))
    with _quiet(transformers), _told(source, weights):
        host = _loaded(cls, built, place, weights, known) if pretrained else cls(built)
    if bare and num_classes != 0:
        host = TowerClassifier(host, num_classes or config.num_labels, pool or "token")
    if img_size is not None:
        set_image_size(host, img_size)
    holder: Any = getattr(host, "tower", host)
    if not holder.name_or_path:
        holder.name_or_path = place
    if not Path(place).is_dir():
        file = cached(place, _CONFIG, revision)
        holder.dyntune_revision = None if file is None else file.parent.name
    return host


def set_image_size(host: nn.Module, size: int | list[int] | tuple[int, int]) -> None:
    """Notes for which images a model is meant, where its configuration says something else."""
    height, width = (size, size) if isinstance(size, int) else size
    host.dyntune_image_size = (int(height), int(width))  # type: ignore[assignment]


def _loaded(cls: Any, config: Any, place: str, weights: str | Path | None, known: dict[str, str]) -> nn.Module:
    """A model with every weight of its backbone from the files; in fp32, whatever they hold."""
    state = None
    if weights is not None and Path(weights).is_file():
        state, place, known = _state(Path(weights)), None, {}  # type: ignore[assignment]
    host, info = cls.from_pretrained(
        place,
        config=config,
        state_dict=state,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        attn_implementation="sdpa",  # a file may name another, which transformers would fetch
        **known,
    )
    heads = ("classifier.", "cls_classifier.", "distillation_classifier.")
    left = (name if isinstance(name, str) else name[0] for name in (*info["missing_keys"], *info["mismatched_keys"]))
    missing = sorted(name for name in left if not name.startswith(heads))
    if missing:
        raise BackboneError(
            f"{weights or place} lacks {len(missing)} tensors of {cls.__name__} or has them in another shape "
            f"({', '.join(missing[:3])}, ...). Give files of this model, written by this or an older transformers."
        )
    return host.float()


def _state(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return safetensors.torch.load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def folder_of(weights: str | Path | None) -> str | None:
    """The folder with the configuration that belongs to local weights, if it lies beside them."""
    if weights is None:
        return None
    path = Path(weights)
    if not path.exists():
        raise BackboneError(f"no weights at {path}. Expected a folder, or a .safetensors, .bin or .pth file.")
    folder = path if path.is_dir() else path.parent
    return str(folder) if (folder / _CONFIG).is_file() else None


@contextlib.contextmanager
def _told(source: str, weights: str | Path | None) -> Iterator[None]:
    """Errors of files that cannot be had, in one line that says which to fetch and how to give them."""
    here = Path(folder_of(weights) or source).is_dir()
    with contextlib.nullcontext() if here else quickly() as unreachable:
        try:
            yield
        except BackboneError:
            raise
        except Exception as error:
            # transformers, huggingface_hub and the network stack each have their own error types for this.
            if weights is not None or Path(source).is_dir():
                raise BackboneError(
                    f"cannot read a model of transformers from {weights or source}: "
                    f"{unreachable or in_one_line(error)}. Expected a folder with config.json and model.safetensors, "
                    "as save_pretrained writes it."
                ) from error
            raise BackboneError(
                f"cannot load {source!r}: {unreachable or in_one_line(error)}. Without a network, fetch config.json, "
                f"model.safetensors and preprocessor_config.json of https://huggingface.co/{source} into a folder "
                "elsewhere, and give that: --model hf:FOLDER, or --weights FOLDER for a run (weights=FOLDER in Python)."
            ) from error


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keeps transformers from printing progress and reports of a new head."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def as_read(host: Any, place: str) -> bool:
    """Whether a model computes what the configuration says that lies where it was read from, as far as this is here.

    Args:
        host: the model, which may have been given another configuration.
        place: the folder or repository that it names.
    """
    transformers = library()
    revision = None if Path(place).is_dir() else revision_of(host)
    known = {} if revision is None else {"revision": revision}
    try:
        with _quiet(transformers), cache_alone():
            read = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False, **known)
    except Exception:  # it is not there, or not on this machine
        return False
    kept, own = (getattr(config, "vision_config", config).to_dict() for config in (read, host.config))
    return all(kept.get(name) == own.get(name) for name in (kept.keys() | own.keys()) - _NOT_COMPUTED)


def write(host: Any, preprocessing: Preprocessing, folder: Path) -> None:
    """Writes a model as ``from_pretrained`` reads it, with an image processor that does what was done in training.

    The folder, which must be empty if it is there, holds all of it or is as it was.

    Raises:
        MachineError: there is no room for it, or another limit of the machine is reached.
    """
    with limits_named(), room_beside(folder) as room:
        made = room / "made"
        with _quiet(library()):
            host.save_pretrained(made)
        write_processor(preprocessing, made, getattr(host.config, "vision_config", host.config))
        if folder.exists():
            folder.rmdir()  # Windows renames onto no folder
        made.rename(folder)


def class_names(config: Any) -> tuple[str, ...] | None:
    """The names of the classes in label order, unless they are mere numbers."""
    # Whoever gives the table to from_pretrained as it is in a file gives numbers as texts.
    labels = {str(number): name for number, name in (getattr(config, "id2label", None) or {}).items()}
    names = [labels.get(str(number)) for number in range(len(labels))]
    if not names or any(name is None or name == f"LABEL_{number}" for number, name in enumerate(names)):
        return None
    return tuple(map(str, names))
