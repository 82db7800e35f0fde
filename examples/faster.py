"""Make a tuned model faster: skipped patches, an optimised copy, another activation rate, another runtime.

    python examples/faster.py            # ViT-S/16 at 224 pixels, a minute or so on two cores; nothing is downloaded
    python examples/faster.py --quick    # two blocks on 32 pixels, where there is nothing to gain

The weights of ViT-S/16 are random: how fast a model is does not depend on them, but for the gates, which are set so
that they let the asked share of the patches through. For a run of yours it is ``model = dyntune.load("runs/flowers")``.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from tempfile import TemporaryDirectory

import timm
import torch
from torch import Tensor

import dyntune


def main(quick: bool = False) -> dict[str, float]:
    torch.manual_seed(0)
    shape = {"img_size": 32, "depth": 2} if quick else {}
    dense = timm.create_model("vit_small_patch16_224", num_classes=10, **shape).eval()
    model = dyntune.tune(timm.create_model("vit_small_patch16_224", num_classes=10, **shape), "dyt:rate=0.5").eval()
    images = torch.randn(4, 3, *model.preprocessing.size)

    ways: dict[str, Callable[[Tensor], object]] = {"dense": dense, "dense, optimised": dyntune.optimize(dense)}
    model.set_rate(0.5, images)  # a trained and calibrated run needs no images here
    ways["half of the patches, optimised"] = dyntune.optimize(model)  # the same logits but for rounding
    model.set_rate(0.3, images)
    ways["three in ten, optimised"] = dyntune.optimize(model)
    with TemporaryDirectory() as folder:
        if all(find_spec(package) for package in ("onnx", "onnxruntime", "onnxscript")):
            dyntune.export(model, f"{folder}/onnx", runtime="onnx")
            ways["three in ten, ONNX Runtime"] = dyntune.open_export(f"{folder}/onnx")
        else:
            print("without ONNX Runtime: pip install onnx onnxruntime onnxscript")
        seconds = in_turns(ways, images, rounds=2 if quick else 15)
    for way, taken in seconds.items():
        print(f"{way:32} {1000 * taken / len(images):7.1f} ms an image   {seconds['dense'] / taken:.2f} x")
    return seconds


def in_turns(ways: dict[str, Callable[[Tensor], object]], images: Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of a call of each; in turns, so that what else the machine does falls on all alike."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for way, call in ways.items():
                start = time.perf_counter()
                call(images)
                times[way].append(time.perf_counter() - start)
    return {way: statistics.median(taken[1:]) for way, taken in times.items()}  # the first one warms up


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two blocks, two rounds")
    main(parser.parse_args().quick)
