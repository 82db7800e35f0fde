"""Which of timm's architectures Dyntune takes, and why not the others: writes docs/timm_models.csv.

    python scripts/timm_models.py

Each is built without weights, put behind the backbone interface, and given a method.
"""

from __future__ import annotations

import csv
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import timm

from dyntune.backbones.hosts import wrap
from dyntune.backbones.timm_names import FILES
from dyntune.core.errors import BackboneError
from dyntune.core.shapes import shapes_only
from dyntune.model.assembly import install
from dyntune.parts.registry import resolve

TABLE = Path(__file__).parents[1] / "docs" / "timm_models.csv"
_TOWER = "the tower of a multimodal model, with blocks of its own that nobody has read yet"
OTHERS = {
    "swin_transformer_v2_cr": "norms on the stream behind blocks, which belong to no sub-layer; take swinv2",
    "cait": "talking heads mix the logits of heads, and blocks of class attention see the class token alone",
    "xcit": "attention over channels, which sums over all tokens, and convolutions on the grid between it and the MLP",
    "maxxvit": "blocks of convolutions, and two attentions in a block, in windows and in grids",
    "hiera": "attention pools its queries inside of blocks, where tokens become fewer",
    "hieradet_sam2": "attention pools its queries inside of blocks, where tokens become fewer",
    "mvitv2": "attention pools queries, keys and values inside of blocks",
    "vision_transformer_sam": "attention with decomposed relative positions, in windows, and a neck of convolutions",
    "volo": "outlook attention, and blocks of class attention behind the others",
    "pit": "convolutions between stages make fewer patches, and a map another class token",
    "tiny_vit": "a convolution on the grid between attention and MLP",
    "levit": "convolutions in front, batch norms instead of layer norms, and attention that makes fewer tokens",
    "convit": "attention mixes content and positions by a gate behind the softmax",
    "crossvit": "two streams of patches of two sizes, which attend to each other",
    "tnt": "two streams: pixels inside of patches, and patches",
    "pvt_v2": "an MLP with a convolution on the grid, which is not token by token",
    "twins": "attention in windows and to pooled keys in turns, and convolutions for positions between blocks",
    "nest": "attention in blocks of patches that are another dimension of the tokens",
    "gcvit": "attention in windows to queries of the whole image",
    "davit": "attention over tokens and over channels in turns, with convolutions in front of both and of the MLP",
    "coat": "attention with convolutions inside, and streams of several scales",
    "visformer": "blocks of convolutions, and batch norms instead of layer norms",
    **dict.fromkeys(("deepseek_vit", "gemma4_vit", "qwen3_vit"), _TOWER),
}
"""timm's other files of vision transformers, of no family here, and why not."""
YES = "yes"


def architectures(modules: Iterable[str] = (*FILES, *OTHERS)) -> Iterator[str]:
    """The names of every architecture of some files, without tags."""
    for module in modules:
        yield from timm.list_models(module=module)


def verdict(name: str) -> str:
    """``yes``, or why a model is refused."""
    with warnings.catch_warnings(), shapes_only():
        warnings.simplefilter("ignore")
        host = timm.create_model(name)
        try:
            install(wrap(host), resolve(["adaptformer"]))
        except BackboneError as error:
            reason = str(error).removeprefix(f"{type(host).__name__} is not supported: ").split(". Supported")[0]
            if reason == "it is no Vision Transformer that Dyntune knows":
                reason = OTHERS[type(host).__module__.rpartition(".")[2]]
            return reason
    return YES


def read() -> dict[str, str]:
    """The table: verdict by architecture."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return {row["architecture"]: row["taken"] for row in csv.DictReader(file)}


def main() -> None:
    """Writes the table, and says on standard error how many are taken."""
    verdicts = {name: verdict(name) for name in architectures()}
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["architecture", "taken"])
        writer.writerows(verdicts.items())
    taken = sum(answer == YES for answer in verdicts.values())
    print(f"{taken} of {len(verdicts)} architectures of timm {timm.__version__} are taken", file=sys.stderr)


if __name__ == "__main__":
    main()
