"""The backbone that comes with the package: a small ViT for 32 x 32 images, registered with timm.

Importing this module registers ``vit_mini_patch4_32`` (1.35 million parameters) with timm, so that
``timm.create_model("vit_mini_patch4_32.dyntune", pretrained=True, num_classes=10)`` works without a download. How the
weights were made, and how good they are: ``weights/README.md``.
"""

from pathlib import Path
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from dyntune.core.errors import BackboneError

BUILTIN_BACKBONE = "vit_mini_patch4_32.dyntune"
WEIGHT_FILE = Path(__file__).parent / "weights" / "vit_mini_patch4_32.safetensors"

default_cfgs = generate_default_cfgs(
    {
        BUILTIN_BACKBONE: {
            "file": str(WEIGHT_FILE),
            "input_size": (3, 32, 32),
            "fixed_input_size": True,
            "num_classes": 0,  # the file has no head, so a head of any size starts from timm's initial values
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


@register_model
def vit_mini_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """A plain ViT: 32 x 32 images, 64 patches of 4 x 4 and a class token, width 96, 12 blocks, 3 heads.

    Args:
        pretrained: load the weights of ``WEIGHT_FILE``.
        kwargs: as for every timm ViT, for instance ``num_classes``, ``in_chans``, ``img_size``, ``drop_path_rate``.

    Raises:
        BackboneError: the weight file does not fill exactly the tensors of the backbone.
    """
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 12, "num_heads": 3, "mlp_ratio": 4.0}
    return build_model_with_cfg(
        VisionTransformer,
        "vit_mini_patch4_32",
        pretrained,
        pretrained_filter_fn=_checked,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **(shape | kwargs),
    )


def _checked(state: dict[str, torch.Tensor], model: VisionTransformer) -> dict[str, torch.Tensor]:
    """Refuse weights that leave a backbone tensor at its random initial value, or that have a tensor too many.

    timm itself stops being strict as soon as the head's size differs from the file's, which here is always so.
    """
    heads = ("head.", "head_drop.")
    wanted = {name for name in model.state_dict() if not name.startswith(heads)}
    given = {name for name in state if not name.startswith(heads)}  # a saved copy has the head that it was given
    if wanted != given:
        raise BackboneError(
            f"the weights of {BUILTIN_BACKBONE} do not fit: missing {sorted(wanted - given) or 'none'}, "
            f"unexpected {sorted(given - wanted) or 'none'}. They fit a ViT with a class token "
            "(class_token=True, global_pool='token'); build other variants with pretrained=False."
        )
    return checkpoint_filter_fn(state, model)
