"""``dyntune merge``: a saved adapter folded into its backbone, as a weight file or folder that its library reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import timm
import typer

from dyntune.backbones import huggingface_models
from dyntune.backbones.builtin import BUILTIN_BACKBONE
from dyntune.backbones.hosts import rebuild
from dyntune.commands.common import RunArgument, WeightsOption
from dyntune.commands.console import out, print_next
from dyntune.core.errors import CheckpointError
from dyntune.core.files import write_atomically
from dyntune.core.shapes import shapes_only
from dyntune.model.load import load

EXAMPLES = (
    "dyntune merge runs/lora --out lora.safetensors",
    "dyntune merge runs/lora --weights ViT-B_16.npz --out lora.safetensors",
    "dyntune merge runs/lora-hf --out lora-hf",
)


def command(
    run: RunArgument,
    file: Annotated[Path, typer.Option("--out", help="The .safetensors file to write; for transformers, the folder.")],
    weights: WeightsOption = None,
) -> None:
    """Fold an adapter into its backbone and write the plain model (LoRA, SSF, FacT, BitFit, full)."""
    if file.exists() and not (file.is_dir() and not any(file.iterdir())):
        raise CheckpointError(
            f"--out {file}: is there already, and is not overwritten. Give another name, or remove it."
        )
    model = load(run, weights=weights)
    host = model.backbone.host
    folder = hasattr(host, "save_pretrained")
    if isinstance(host, huggingface_models.TowerClassifier):
        raise CheckpointError(
            f"transformers has no class for {type(host.tower).__name__} with this classifier, so it could not read the "
            f"merged model. Run it with dyntune.load({str(run)!r}), or merge in Python: model.merge() returns it."
        )
    if not folder and not timm.is_model(str(model.origin.name).partition(".")[0]):
        raise CheckpointError(
            f"{model.origin.name} is no model of timm's, which could not read the merged one. Run it with "
            f"dyntune.load({str(run)!r}), or merge in Python: model.merge() returns the module."
        )
    if folder and file.suffix == ".safetensors":
        raise CheckpointError(
            f"--out {file}: expected a folder, which transformers' from_pretrained reads; leave .safetensors out."
        )
    if not folder and (file.suffix != ".safetensors" or file.is_dir()):
        raise CheckpointError(f"--out {file}: expected a file name that ends in .safetensors.")
    stays = model.fold()  # not merge(), which logs what stays: it is told once, in the error
    if stays:
        reasons = "; ".join(f"{spec}: {reason}" for spec, reason in stays.items())
        raise CheckpointError(
            f"{model.spec} does not fold into the backbone alone ({reasons}). Run it with dyntune.load({str(run)!r})."
        )
    merged: Any = model.merge()
    with shapes_only():
        built = rebuild(model.origin, pretrained=False).state_dict().keys()
    extra = sorted(merged.state_dict().keys() - built)
    library = "transformers" if folder else "timm"
    if extra:
        raise CheckpointError(
            f"folding {model.spec} has given {model.origin.name} tensors that {library}'s model does not have "
            f"({', '.join(extra[:3])}), so {library} could not read them. Run it with dyntune.load({str(run)!r}), or "
            "merge in Python: model.merge() returns the module."
        )
    if folder:
        huggingface_models.write(merged, model.preprocessing, file)
        out.print(f"wrote {file}: the whole model, as dense as its backbone", highlight=False)
        name = type(merged).__name__
        print_next(f"from transformers import {name}; {name}.from_pretrained({str(file)!r})")
        config = getattr(merged.config, "vision_config", merged.config)
        # DINO's models take images of any size by themselves, SigLIP 2 patches of any.
        size = getattr(config, "image_size", None)
        if not config.model_type.startswith("dino") and size and model.preprocessing.size != (size,) * 2:
            out.print(
                "images have another size than the configuration says: call it with interpolate_pos_encoding=True",
                highlight=False,
                soft_wrap=True,
            )
        return
    tensors = {name: tensor.contiguous() for name, tensor in merged.state_dict().items()}
    write_atomically(file, lambda path: safetensors.torch.save_file(tensors, path, metadata={"format": "pt"}))
    arguments = model.origin.arguments | {"checkpoint_path": str(file)}
    out.print(f"wrote {file}: the whole model, as dense as its backbone", highlight=False)
    written = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    # The built-in backbone is timm's once it has been registered there.
    modules = "dyntune, timm" if model.origin.name == BUILTIN_BACKBONE else "timm"
    print_next(f"import {modules}; timm.create_model({model.origin.name!r}, {written})")
