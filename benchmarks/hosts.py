"""DyT beside the dense host in torch and ONNX Runtime, on hosts with rotary embeddings and of transformers, in turns.

    python benchmarks/hosts.py --out benchmarks/results/hosts

Weights are random; the gates are set so that half of the patches of the timed images are active in every unit. Torch
computes in this process, each ONNX file in a process of its own. A host may be measured in a call of its own
(``--hosts``), which leaves the rows of the others as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from deploy import CLASSES, DYT, awake, macs
from torch import Tensor, nn

import dyntune
from dyntune.backbones.owners import release
from dyntune.core.machine import machine
from dyntune.core.timing import Turns, time_in_turns
from dyntune.inference.export.bundle import Export
from dyntune.inference.export.process import Candidate
from dyntune.inference.export.registry import lookup

EAGER, OPTIMIZED, ONNX = "eager", "optimize", "onnx"
DENSE = "dense"


def dinov3(depth: int) -> nn.Module:
    return timm.create_model("vit_base_patch16_dinov3", num_classes=CLASSES, depth=depth)


def eva02(depth: int) -> nn.Module:
    return timm.create_model("eva02_base_patch14_224", num_classes=CLASSES, depth=depth)


def clip(depth: int) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=depth, num_attention_heads=12, patch_size=16
    )
    return dyntune.add_classifier(CLIPVisionModel(config), CLASSES)


class Host(NamedTuple):
    """A host, and DyT as it is tuned with.

    Args:
        build: makes it, with a number of blocks.
        spec: method and policy.
    """

    build: Callable[[int], nn.Module]
    spec: str = DYT


HOSTS = {"DINOv3": Host(dinov3), "EVA-02": Host(eva02), "CLIP of transformers": Host(clip)}
"""ViT-B sizes, each at the image size that it was pretrained for."""


def built(host: Host, batch_size: int, depth: int) -> tuple[dict[str, dyntune.TunedModel], Tensor]:
    """The dense model and DyT on the same weights, and the images on which half of the patches are active."""
    models = {}
    for name, spec in ((DENSE, "linear"), (DYT, host.spec)):
        torch.manual_seed(0)
        models[name] = dyntune.tune(host.build(depth), spec).eval()
    images = torch.randn(batch_size, *models[DENSE].backbone.input_shape, generator=torch.Generator().manual_seed(1))
    awake(models[DYT], images)
    return models, images


def exported(name: str, model: dyntune.TunedModel, room: Path) -> Path:
    """The folder of its ONNX file, written unless it is there."""
    folder = room / name.partition(":")[0]
    if not folder.exists():
        Export(model).write(folder, lookup("onnx")())
    return folder


def measure(host: Host, batch_size: int, options: argparse.Namespace, room: Path, noun: str) -> list[dict[str, Any]]:
    """A row for each runtime: the dense host and DyT in it, all of them timed in the same turns."""
    models, images = built(host, batch_size, options.depth)
    dense, model = models[DENSE], models[DYT]
    release(dense.backbone)  # nothing is on it: its own forward pass is timed
    ratio = macs(dense, images) / macs(model, images)
    room.mkdir(parents=True, exist_ok=True)
    batch = room / "images.npy"
    np.save(batch, images.numpy())
    with ExitStack() as stack:
        running: dict[tuple[str, str], Callable[[Tensor], Any]] = {
            (DENSE, EAGER): dense.backbone.host_logits,
            (DYT, EAGER): model,
        }
        for name, one in models.items():
            running[name, OPTIMIZED] = dyntune.optimize(one)
            running[name, ONNX] = stack.enter_context(Candidate(exported(name, one, room), batch, options.threads))
        with torch.inference_mode():
            expected = model(images)
            difference = float((running[DYT, OPTIMIZED](images) - expected).abs().max() / expected.abs().max())
            turns = time_in_turns(running, images, rounds=options.rounds, seconds=options.seconds)
    about = {"patches": math.prod(dense.backbone.grid), "batch_size": batch_size}
    about |= {"rounds": options.rounds, "measured": time.strftime("%Y-%m-%d")}
    rows = [about | {"runtime": name} | described(name, turns, ratio, noun) for name in (EAGER, OPTIMIZED, ONNX)]
    rows[1]["difference_to_eager"] = difference
    return rows


def described(runtime: str, turns: dict[tuple[str, str], Turns], ratio: float, noun: str) -> dict[str, Any]:
    dense, own = turns[DENSE, runtime], turns[DYT, runtime]
    speedup = own.speedup(dense)
    return {
        f"dense_{noun}_per_second": asdict(dense.images_per_second),
        f"{noun}_per_second": asdict(own.images_per_second),
        "over_dense": asdict(speedup),
        "macs_ratio": ratio,
        "skip_efficiency": speedup.median / ratio,
        "dense_over_eager": asdict(dense.speedup(turns[DENSE, EAGER])),
        "over_eager": asdict(own.speedup(turns[DYT, EAGER])),
    }


def markdown(rows: list[dict[str, Any]], noun: str) -> str:
    lines = [
        f"| host | batch | runtime | dense {noun}/s | DyT {noun}/s | DyT over dense | MACs ratio | skip efficiency "
        "| dense over eager | DyT over eager |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = (row["host"], row["batch_size"], row["runtime"])
        speeds = (f"{row[key]['median']:.2f}" for key in (f"dense_{noun}_per_second", f"{noun}_per_second"))
        over = [
            f"{row[key]['median']:.2f} [{row[key]['low']:.2f} to {row[key]['high']:.2f}]"
            for key in ("over_dense", "dense_over_eager", "over_eager")
        ]
        efficiency = (f"{row['macs_ratio']:.3f}", f"{row['skip_efficiency']:.2f}")
        lines.append(f"| {' | '.join(map(str, (*cells, *speeds, over[0], *efficiency, *over[1:])))} |")
    return "\n".join(lines) + "\n"


def run(doc: str, hosts: Mapping[str, Host], *, batch_size: int, noun: str, rounds: int, seconds: float) -> None:
    """Measures what the command line asks for, and writes results.json and table.md after each host.

    Args:
        doc: of the script; its first line is the help.
        hosts: by the names that they have on the command line and in the table.
        batch_size: by default.
        noun: what one of a batch is called, ``images``.
        rounds: turns of each model by default.
        seconds: least time of a turn by default.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--hosts", nargs="+", choices=hosts, default=list(hosts))
    parser.add_argument("--batch-size", type=int, nargs="+", default=[batch_size])
    parser.add_argument("--depth", type=int, default=12, help="blocks of each host; fewer to try the script")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--seconds", type=float, default=seconds)
    parser.add_argument("--files", type=Path, help="where exported models stay, to be used again; by default nowhere")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "results.json"
    rows = json.loads(results.read_text())["rows"] if results.exists() else []
    rows = [row for row in rows if row["host"] not in options.hosts]
    for name in options.hosts:
        for size in options.batch_size:
            with tempfile.TemporaryDirectory() as room:
                place = (options.files or Path(room)) / f"{name}-{size}-{options.depth}".replace(" ", "-")
                rows += [{"host": name} | row for row in measure(hosts[name], size, options, place, noun)]
            result = {"machine": machine(), "threads": options.threads, "rows": rows}
            rows.sort(key=lambda row: list(hosts).index(row["host"]))
            results.write_text(json.dumps(result, indent=2) + "\n")
            (options.out / "table.md").write_text(markdown(rows, noun))
    print(markdown(rows, noun))


if __name__ == "__main__":
    run(__doc__, HOSTS, batch_size=8, noun="images", rounds=7, seconds=0.3)
