"""A tuning method of your own in thirty lines: a trained factor for every channel of each MLP's update.

    python examples/own_method/channel_gain.py            # a minute or two on two cores; nothing is downloaded
    python examples/own_method/channel_gain.py --quick    # seconds, and accordingly bad

The file's name is the method's. ``pip install ./examples/own_method`` makes it known by the entry point in the
pyproject.toml beside it; from then on every command has it, and what was trained with it can be loaded:

    dyntune train digits --method channel-gain --out runs/gain
    dyntune train digits --method channel-gain:where=attn --policy dispatch:rate=0.5 --out runs/gain-half
"""

import argparse
from dataclasses import dataclass
from typing import ClassVar, Literal

import timm
import torch
from torch import Tensor, nn

import dyntune
from dyntune.backbones.base import Backbone
from dyntune.data import ImageSubset, load_data
from dyntune.parts.methods.base import TuningMethod


class Gain(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(width))

    def forward(self, update: Tensor) -> Tensor:
        return update * (1 + self.value)


@dataclass(frozen=True)
class ChannelGain(TuningMethod):
    """Multiplies updates of the blocks by a trained factor per channel, which starts at 1: D parameters per block.

    Args:
        where: whose updates, those of each MLP or of each attention.
    """

    source: ClassVar[str] = "an example"
    stays: ClassVar[str | None] = "the factors are not written into the weights"
    where: Literal["mlp", "attn"] = "mlp"

    def install(self, backbone: Backbone) -> None:
        for unit in backbone.units(self.where):
            unit.add_sequential("channel_gain", Gain(unit.width))


def main(quick: bool = False) -> dyntune.Evaluation:
    torch.manual_seed(0)
    data = load_data("digits")
    train, val, test = data.train, data.val, data.test
    if quick:
        train, val, test = ImageSubset(train, range(96)), ImageSubset(val, range(48)), ImageSubset(test, range(48))
    vit = timm.create_model("vit_mini_patch4_32.dyntune", pretrained=True, num_classes=data.num_classes)
    model = dyntune.tune(vit, ChannelGain())  # with gates: dyntune.tune(vit, ChannelGain(), "dispatch:rate=0.5")
    print(f"{model.spec}: {dyntune.cost(model).trainable_params:,} parameters are trained beside the head")
    dyntune.fit(model, train, val, epochs=1 if quick else 5, batch_size=32, lr=1e-2)
    result = dyntune.evaluate(model, test)
    print(f"accuracy {result.accuracy:.1%}")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one epoch of 96 images")
    given = parser.parse_args()
    from channel_gain import main as main_by_name  # a method is called as its module is, which is __main__ here

    main_by_name(given.quick)
