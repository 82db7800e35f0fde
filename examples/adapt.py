"""Adapt the built-in backbone to handwritten digits, and look at what it computes.

    python examples/adapt.py            # a few minutes on two cores; nothing is downloaded
    python examples/adapt.py --quick    # seconds, and accordingly bad

Writes runs/adapt, or runs/adapt-quick: the adapter, its log, and tokens.png.
"""

import argparse
import os
from pathlib import Path

import timm
import torch

import dyntune
from dyntune.data import ImageSubset, build_transform, load_data
from dyntune.studies.pictures.style import save_figure
from dyntune.studies.pictures.tokens import token_figure


def main(out: Path, quick: bool = False) -> dyntune.Evaluation:
    torch.manual_seed(0)
    data = load_data("digits")  # or "folder:flowers", with flowers/train/CLASS/*.jpg
    train, val, test = data.train, data.val, data.test
    if quick:
        train, val, test = ImageSubset(train, range(96)), ImageSubset(val, range(48)), ImageSubset(test, range(48))

    # Of photographs: a timm model of 224 pixels, say "vit_base_patch16_224.orig_in21k".
    vit = timm.create_model("vit_mini_patch4_32.dyntune", pretrained=True, num_classes=data.num_classes)
    model = dyntune.tune(vit, "dyt:rate=0.5")
    print(f"{dyntune.cost(model).trainable_params:,} parameters are trained beside the head")

    dyntune.fit(model, train, val, out=out, epochs=1 if quick else 10, batch_size=32, lr=5e-3, resume=True)
    result = dyntune.evaluate(model, test)
    print(f"accuracy {result.accuracy:.1%}, {result.activation:.0%} of the patches computed")
    print(f"{result.macs / 1e6:.1f} M MACs an image, {model.dense_macs / 1e6:.1f} M without skipping")

    # What was saved is the adapter and the head; the backbone is built again.
    model = dyntune.load(out)
    pictures = [data.test[index][0] for index in range(6)]
    transform = build_transform(model.preprocessing)
    with torch.inference_mode():
        output = model.run(torch.stack([transform(picture) for picture in pictures]))
    names = [model.classes[label] for label in output.logits.argmax(1).tolist()]
    file = save_figure(token_figure(pictures, output.gates, output.grid, names), out / "tokens.png")
    print(f"which patches each block computed: {os.path.relpath(file)}")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the adapter and the picture")
    parser.add_argument("--quick", action="store_true", help="one epoch of 96 images")
    given = parser.parse_args()
    main(given.out or Path("runs/adapt-quick" if given.quick else "runs/adapt"), given.quick)
