"""Optimised and exported models beside the eager dense one: torch in this process, each runtime in its own, in turns.

    python benchmarks/deploy.py --out benchmarks/results/deploy

Weights are random; the gates are set so that half of the patches of the timed images are active in every unit.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn

import dyntune
from dyntune.core.machine import machine
from dyntune.core.timing import Turns, time_in_turns
from dyntune.inference.export.bundle import Export
from dyntune.inference.export.process import Candidate
from dyntune.inference.export.registry import lookup
from dyntune.studies.bench.peers import set_gates

CLASSES = 100
TIMED, DEPLOYED = "dense, eager", "dense, deployed"
DYT, BOTH = "dyt:rate=0.5", "dyt:rate=0.5,dispatch=attn-mlp"
FILES = (("onnx", "fp32"), ("onnx", "int8"), ("openvino", "fp32"), ("openvino", "int8"))


class Row:
    """One model in one runtime.

    Args:
        name: what it is called.
        dense: name of the dense model in the same runtime.
        macs: per image, of the tuned model as eager mode runs it.
    """

    def __init__(self, name: str, dense: str, macs: float) -> None:
        self.name, self.dense, self.macs = name, dense, macs


def tuned(model: str, spec: str, images: Tensor) -> dyntune.TunedModel:
    """A model with random weights everywhere, zeros of fresh adapters included, and gates that are half open."""
    torch.manual_seed(0)
    return awake(dyntune.tune(timm.create_model(model, num_classes=CLASSES), spec), images)


def awake(built: dyntune.TunedModel, images: Tensor) -> dyntune.TunedModel:
    """The model itself with what is tuned moved at random, and its gates set."""
    built.eval()
    with torch.no_grad():
        for parameter in built.tuned_state().values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    set_gates(built, images)
    return built


@torch.inference_mode()
def macs(model: dyntune.TunedModel, images: Tensor) -> float:
    with dyntune.MacCounter() as counter, counter.watching(model.backbone):
        model(images)
    return (counter.macs - counter.head_macs) / len(images)


def in_torch(
    dense: nn.Module, models: dict[str, dyntune.TunedModel]
) -> Iterator[tuple[str, str, Callable[[Tensor], Tensor], str, Callable[[Tensor], Tensor]]]:
    """Name, what its MACs are counted on, model, name of the dense model beside it, and whose logits it should give."""
    yield TIMED, "dense", dense, TIMED, dense
    yield DEPLOYED, "dense", dyntune.optimize(dense), DEPLOYED, dense
    for spec, model in models.items():
        yield f"{spec}, plain gather", spec, model, TIMED, model
        yield f"{spec}, deployed", spec, dyntune.optimize(model), DEPLOYED, model
    full = dyntune.optimize(models[DYT])
    full.set_rate(1.0)
    yield f"{DYT} with all patches active, deployed", "all", full, DEPLOYED, partial(complete, models[DYT])
    try:
        yield f"{DYT}, deployed, bf16", DYT, dyntune.optimize(models[DYT], precision="bf16"), TIMED, models[DYT]
    except dyntune.DyntuneError as error:
        print(error)


def complete(model: dyntune.TunedModel, images: Tensor) -> Tensor:
    return model.run(images, complete=True).logits


def measure(options: argparse.Namespace, images: Tensor, batch: Path, room: Path) -> list[dict]:
    torch.manual_seed(0)
    dense = timm.create_model(options.model, num_classes=CLASSES).eval()
    models = {spec: tuned(options.model, spec, images) for spec in (DYT, BOTH)}
    counted = {spec: macs(model, images) for spec, model in models.items()}
    plain = dyntune.tune(timm.create_model(options.model, num_classes=CLASSES), "linear").eval()
    plain.backbone.host.load_state_dict(dense.state_dict())
    counted["dense"] = macs(plain, images)
    models[DYT].set_rate(1.0)
    counted["all"] = macs(models[DYT], images)
    models[DYT].set_rate(None)
    rows, running, difference = [], {}, {}
    with ExitStack() as stack, torch.inference_mode():
        for name, spec, model, parallel, expected in in_torch(dense, models):
            rows.append(Row(name, parallel, counted[spec]))
            running[name] = model
            difference[name] = float((model(images) - expected(images)).abs().max())
        for spec, model in {"dense": plain, DYT: models[DYT]}.items():
            with torch.inference_mode(False):
                export = Export(model)
            for runtime, precision in FILES if options.files else ():
                folder = room / f"{spec.split(':')[0]}-{runtime}-{precision}"
                with torch.inference_mode(False):
                    export.write(folder, lookup(runtime)(), precision, images if runtime == "openvino" else None)
                name = f"{spec}, {runtime} {precision}"
                rows.append(Row(name, f"dense, {runtime} {precision}", counted[spec]))
                running[name] = stack.enter_context(Candidate(folder, batch, options.threads))
        turns = time_in_turns(running, images, rounds=options.rounds, seconds=options.seconds)
    return [
        described(row, turns, len(images), counted["dense"] / row.macs) | {"logit_difference": difference.get(row.name)}
        for row in rows
    ]


def described(row: Row, turns: dict[str, Turns], batch_size: int, ratio: float) -> dict:
    own = turns[row.name]
    gather = f"{row.name.split(',')[0]}, plain gather"
    return {
        "name": row.name,
        "batch_size": batch_size,
        "macs": row.macs,
        "macs_ratio": ratio,
        "images_per_second": asdict(own.images_per_second),
        "over_eager_dense": asdict(own.speedup(turns[TIMED])),
        "over_dense_in_the_same_runtime": asdict(own.speedup(turns[row.dense])),
        "skip_efficiency": own.speedup(turns[row.dense]).median / ratio,
        "over_plain_gather": asdict(own.speedup(turns[gather])) if gather in turns else None,
    }


def markdown(rows: list[dict]) -> str:
    lines = [
        "| batch | model | images/s | over eager dense | over dense, same runtime | MACs ratio | skip efficiency |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        eager, same = row["over_eager_dense"], row["over_dense_in_the_same_runtime"]
        lines.append(
            f"| {row['batch_size']} | {row['name']} | {row['images_per_second']['median']:.2f} "
            f"| {eager['median']:.2f} [{eager['low']:.2f} to {eager['high']:.2f}] "
            f"| {same['median']:.2f} [{same['low']:.2f} to {same['high']:.2f}] "
            f"| {row['macs_ratio']:.3f} | {row['skip_efficiency']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def arguments(doc: str, *, rounds: int, seconds: float) -> argparse.ArgumentParser:
    """The options that benchmarks of deployed models have in common.

    Args:
        doc: of the script; its first line is the help.
        rounds: turns of each model by default.
        seconds: least time of a turn by default.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--seconds", type=float, default=seconds)
    parser.add_argument("--out", type=Path, required=True)
    return parser


def run(
    options: argparse.Namespace,
    measure: Callable[[argparse.Namespace, Tensor, Path, Path], list[dict]],
    markdown: Callable[[list[dict]], str],
) -> None:
    """Measures each batch size and writes results.json and table.md, which hold what is measured so far.

    Args:
        options: of ``arguments``.
        measure: makes the rows of a batch of images, given the options, the images, a file of them, and a folder for
            deployed models.
        markdown: makes the table of all rows.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    for batch_size in options.batch_size:
        images = torch.randn(batch_size, 3, 224, 224, generator=torch.Generator().manual_seed(1))
        with tempfile.TemporaryDirectory() as room:
            batch = Path(room) / "images.npy"
            np.save(batch, images.numpy())
            rows += measure(options, images, batch, Path(room))
        result = {"model": options.model, "machine": machine(), "threads": options.threads, "rounds": options.rounds}
        result |= {"measured": time.strftime("%Y-%m-%d"), "rows": rows}
        (options.out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
        (options.out / "table.md").write_text(markdown(rows))
    print(markdown(rows))


def main() -> None:
    parser = arguments(__doc__, rounds=9, seconds=0.3)
    parser.add_argument("--files", action=argparse.BooleanOptionalAction, default=True, help="ONNX and OpenVINO too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run(options, measure, markdown)


if __name__ == "__main__":
    main()
