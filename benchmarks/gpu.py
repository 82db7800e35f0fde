"""How fast token skipping runs on a GPU beside the dense model, the plain gather path and ToMe: one call, one table.

    python benchmarks/gpu.py --out benchmarks/results/gpu.csv

Weights are random: how much is computed does not depend on them, but for the gates, whose biases are set so that 30, 50
or 70 % of the patches of the timed images are active in every block. Each candidate is checked before it is timed: its
logits against those of the same model in fp32, run by plain PyTorch. A candidate that fails leaves a row with the
error, and the others go on; so does a whole group, of one model and batch size, that does not fit into the memory. The
most important rows come first; what the time does not allow is left out. Only the first group, ViT-B with 128 images,
has PyTorch's grouped product ("grouped") and ToMe in every runtime; the other groups have ToMe eager and as a graph.

Skip efficiency is the speed-up over the dense model in the same runtime divided by the ratio of the MACs.
"""

from __future__ import annotations

import argparse
import copy
import csv
import gc
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

if "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import dyntune
from dyntune.core.timing import Spread, time_queued
from dyntune.inference.joint import joined, key
from dyntune.inference.kernels import DeviceCounts, capture, supports
from dyntune.studies.bench.peers import set_gates

Forward = Callable[[Tensor], Tensor]

BASE, LARGE = "vit_base_patch16_224", "vit_large_patch16_224"
RUNTIMES = ("eager", "graph", "compiled")
"""As it is; the same as a CUDA graph; and through torch.compile as a CUDA graph."""
EVERYTHING = tuple(f"{kind} {runtime}" for kind in ("dense", "ours", "grouped", "tome") for runtime in RUNTIMES)
SHORT = tuple(
    candidate for candidate in EVERYTHING if not candidate.startswith("grouped") and candidate != "tome compiled"
)
PLAN = (
    (BASE, 128, ("gather eager", *EVERYTHING)),
    (LARGE, 128, ("gather eager", *SHORT)),
    (BASE, 512, ("gather eager", *SHORT)),
    (BASE, 1, ("gather eager", *SHORT)),
    (BASE, 256, ("gather eager", *SHORT)),
    (LARGE, 512, ("gather eager", *SHORT)),
    (BASE, 32, ("gather eager", *SHORT)),
    (LARGE, 256, ("gather eager", *SHORT)),
    (LARGE, 1, ("gather eager", *SHORT)),
    (BASE, 8, ("gather eager", *SHORT)),
    (LARGE, 32, ("gather eager", *SHORT)),
    (LARGE, 8, ("gather eager", *SHORT)),
)
SMOKE = (
    ("tiny", 2, ("gather eager", *(f"{kind} eager" for kind in ("dense", "ours", "grouped", "tome")), "ours graph")),
    ("tiny", 1, ("ours graph",)),  # which no CPU can run: nothing is left to time
)
RATES = (0.5, 0.3, 0.7)
AGREEMENT = {torch.bfloat16: 0.5, torch.float16: 0.9}
"""Share of images whose highest logit must be that of fp32, at least: logits of random weights lie close together."""
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}


@dataclass(frozen=True)
class Row:
    """One measurement, or the reason why there is none.

    Args:
        rate: share of patches that the gates were set to; ``active``, the one that the dtype made of it.
        milliseconds: median over the rounds, with their quartiles; as images_per_second, of the median.
        speedup: over the dense model in the same runtime, median over the rounds.
        macs_ratio: MACs of the dense model divided by those of this one.
        error_of_logits: largest difference to fp32, over the largest logit; beside it what the same model run by plain
            PyTorch in the same dtype has.
        top1: share of the images with the same highest logit as in fp32.
        failure: what went wrong; empty where nothing did.
    """

    measured: str
    gpu: str
    driver: str
    torch: str
    triton: str
    model: str
    dtype: str
    batch: int
    rate: float
    active: float | None
    candidate: str
    milliseconds: float | None = None
    milliseconds_low: float | None = None
    milliseconds_high: float | None = None
    images_per_second: float | None = None
    speedup: float | None = None
    macs_ratio: float | None = None
    skip_efficiency: float | None = None
    error_of_logits: float | None = None
    error_of_plain_logits: float | None = None
    top1: float | None = None
    failure: str = ""


class Table:
    """A CSV file that gets each row as soon as it is known."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        self.file = path.open("a", newline="")
        self.writer = csv.DictWriter(self.file, [field.name for field in fields(Row)])
        if new:
            self.writer.writeheader()

    def add(self, row: Row) -> None:
        self.writer.writerow(asdict(row))
        self.file.flush()
        result = row.failure or (
            f"{row.milliseconds:9.3f} ms  x{row.speedup or 0:.3f}  of MACs {row.macs_ratio or 0:.3f}  "
            f"efficiency {row.skip_efficiency or 0:.3f}  error {row.error_of_logits:.4f}"
        )
        print(f"{row.model} x {row.batch}, {row.rate:.0%} active, {row.candidate:17} {result}", flush=True)


class Models:
    """The models of one size in fp32 and in the timed dtype, with the same weights; the gates can be moved.

    Args:
        name: of a timm model, or tiny.
        dtype: that is timed.
    """

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.exact: dict[str, nn.Module] = {}
        for kind, spec in (
            ("dense", None),
            ("gated", "dyt:rate=0.5"),
            ("tome", "tome:r=8" if name != "tiny" else "tome:r=2"),
        ):
            torch.manual_seed(0)
            host = VisionTransformer(**TINY) if name == "tiny" else timm.create_model(name)
            model = dyntune.tune(host, spec) if spec else host
            self.exact[kind] = model.to(device).eval().requires_grad_(False)
        for parameter in (p for n, p in self.exact["gated"].named_parameters() if "up_proj" in n):
            parameter.normal_(std=0.02)  # an untrained adapter adds nothing, and an error in it would not be seen
        self.exact["gated"].fold()
        self.timed = {kind: copy.deepcopy(model).to(dtype) for kind, model in self.exact.items()}
        self.own = copy.deepcopy(self.timed["gated"])
        self.joints = joined(self.own.backbone, self.own.policies, None)

    def open(self, rate: float, images: Tensor) -> None:
        """Sets the gates of all gated models to a share of active patches; the tensors stay where they are."""
        gated = self.exact["gated"]
        set_gates(gated, images.float(), rate)
        for model in (self.timed["gated"], self.own):
            model.load_state_dict({n: p for n, p in gated.state_dict().items() if "dispatcher" in n}, strict=False)
        for unit in self.own.backbone.all_units():
            if key(unit) in self.joints:
                self.joints[key(unit)].read.bias[0].copy_(unit.dispatcher.gate.bias[0])

    def kind(self, candidate: str) -> str:
        """Which model a candidate runs."""
        name = candidate.split()[0]
        return "gated" if name in ("ours", "grouped", "gather") else name

    def forward(self, candidate: str, images: Tensor) -> Forward:
        """What is timed.

        Raises:
            DyntuneError: the candidate cannot run here.
        """
        kind, runtime = candidate.split()
        forward: Forward = self.timed[self.kind(candidate)]
        if kind in ("ours", "grouped"):
            products = "grouped" if kind == "grouped" else "triton"
            reasons = [supports(unit, products) for unit in self.own.backbone.units("mlp")]
            if any(reasons):
                raise dyntune.DyntuneError(next(filter(None, reasons)))
            joints = {unit.path: self.joints[key(unit)] for unit in self.own.backbone.units("mlp")}
            execution = DeviceCounts(joints, products)
            forward = partial(logits, self.own, execution)
        if runtime == "compiled":
            forward = torch.compile(forward, dynamic=False)
        return forward if runtime == "eager" else capture(forward, images)


def logits(model: dyntune.TunedModel, execution: DeviceCounts, images: Tensor) -> Tensor:
    return model.run(images, execution=execution).logits


def macs(model: nn.Module, images: Tensor) -> float:
    with dyntune.MacCounter() as counter:
        model(images)
    return counter.macs / len(images)


def differs(given: Tensor, exact: Tensor) -> tuple[float, float]:
    """The largest difference over the largest value, and the share of images with the same highest logit."""
    given = given.float()
    if not given.isfinite().all():
        return float("inf"), 0.0
    worst = (given - exact).abs().max() / exact.abs().max()
    return worst.item(), (given.argmax(-1) == exact.argmax(-1)).float().mean().item()


def disagreement(
    error: float, top1: float, plain_error: float, plain_top1: float, dtype: torch.dtype, images: int
) -> str:
    """Why a candidate's logits do not pass beside those of plain PyTorch in the same dtype; empty if they do."""
    if not math.isfinite(plain_error):
        return f"plain PyTorch's logits are not finite in {dtype}: there is no measure for these"
    # Gates near 0 open and close with the rounding, in plain PyTorch as here, so what it gets wrong is the measure.
    allowed = 2 * plain_error + 4 * torch.finfo(dtype).eps
    if not error <= allowed:
        return f"wrong logits: error {error:.3g}, allowed {allowed:.3g}"
    # Two logits may be equal but for rounding in any one image.
    floor = max(AGREEMENT[dtype], 2 * plain_top1 - 1) - 1 / images
    if top1 < floor:
        return f"wrong logits: the highest is that of fp32 in {top1:.1%} of the images, {floor:.1%} asked for"
    return ""


def rows_of(
    models: Models, forwards: dict[str, Forward], images: Tensor, options: argparse.Namespace, base: Callable[..., Row]
) -> Iterator[Row]:
    """Checks and times candidates with the gates as they are."""
    exact = {kind: model(images.float()) for kind, model in models.exact.items()}
    plain = {kind: differs(model(images), exact[kind]) for kind, model in models.timed.items()}
    counted = {kind: macs(model, images) for kind, model in models.timed.items()}
    active = statistics.fmean(float(gate.values.float().mean()) for gate in models.timed["gated"].run(images).gates)
    right: dict[str, Forward] = {}
    checks = {}
    for name, forward in forwards.items():
        kind = models.kind(name)
        row = partial(base, candidate=name, active=active if kind == "gated" else None)
        try:
            error, top1 = differs(forward(images), exact[kind])
        except Exception as failure:
            yield row(failure=said(failure))
            continue
        plain_error, plain_top1 = plain[kind]
        checked = {"error_of_logits": error, "error_of_plain_logits": plain_error, "top1": top1}
        wrong = disagreement(error, top1, plain_error, plain_top1, models.dtype, len(images))
        if wrong:
            yield row(**checked, failure=wrong)
            continue
        right[name], checks[name] = forward, (row, checked)
    if not right:
        return
    times = time_queued(right, images, rounds=options.rounds, seconds=options.milliseconds / 1000)
    for name, own in times.items():
        row, checked = checks[name]
        turn = Spread.of([1000 * second for second in own.seconds])
        reference = times.get(f"dense {name.split()[1]}")
        speedup = own.speedup(reference).median if reference else None
        ratio = counted["dense"] / counted[models.kind(name)]
        yield row(
            milliseconds=turn.median,
            milliseconds_low=turn.low,
            milliseconds_high=turn.high,
            images_per_second=1000 * len(images) / turn.median,
            speedup=speedup,
            macs_ratio=ratio,
            skip_efficiency=speedup / ratio if speedup else None,
            **checked,
        )


def said(failure: BaseException) -> str:
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"


def measure(plan: tuple, table: Table, options: argparse.Namespace, device: torch.device) -> None:
    """Works through the plan until the time is up."""
    machine = {
        "measured": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "none (interpreter)",
        "driver": driver() if device.type == "cuda" else "",
        "torch": torch.__version__,
        "triton": triton_version(),
        "dtype": options.dtype,
    }
    dtype = getattr(torch, options.dtype)
    end = time.monotonic() + options.seconds
    loaded: tuple[str, Models] | None = None
    for name, batch, candidates in plan:
        started = time.monotonic()
        wanted = [candidate for candidate in candidates if candidate in options.candidates]
        group = partial(Row, **machine, model=name, batch=batch)
        try:
            if loaded is None or loaded[0] != name:
                loaded = None  # its memory is needed for the next
                loaded = (name, Models(name, device, dtype))
            measure_group(loaded[1], wanted, batch, table, options, group, end)
        except Exception as failure:
            for candidate in wanted:
                table.add(group(rate=options.rates[0], active=None, candidate=candidate, failure=said(failure)))
        # What a compiler or a graph holds would fill the memory before the next group.
        torch._dynamo.reset()
        free(device)
        print(f"{name} x {batch}: {time.monotonic() - started:.0f} s, {end - time.monotonic():.0f} s left", flush=True)
        if time.monotonic() + 0.5 * (time.monotonic() - started) > end:
            break


def measure_group(
    models: Models,
    candidates: list[str],
    batch: int,
    table: Table,
    options: argparse.Namespace,
    group: Callable[..., Row],
    end: float,
) -> None:
    """Measures one model with one batch size at every rate; a rate that fails leaves a row for each candidate."""
    like = next(models.timed["dense"].parameters())
    size = models.exact["dense"].patch_embed.img_size
    images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1)).to(like)
    first = options.rates[0]
    models.open(first, images)
    forwards: dict[str, Forward] = {}
    for candidate in candidates:
        if time.monotonic() > end:
            break
        try:
            forwards[candidate] = models.forward(candidate, images)
            forwards[candidate](images)
        except Exception as failure:
            forwards.pop(candidate, None)
            table.add(group(rate=first, active=None, candidate=candidate, failure=said(failure)))
        free(images.device)
    for rate in options.rates if forwards else ():
        if time.monotonic() > end and rate != first:
            break
        left = set(forwards)
        try:
            models.open(rate, images)
            for row in rows_of(models, forwards, images, options, partial(group, rate=rate)):
                table.add(row)
                left.discard(row.candidate)
        except Exception as failure:
            for candidate in filter(left.__contains__, forwards):
                table.add(group(rate=rate, active=None, candidate=candidate, failure=said(failure)))
        free(images.device)


def free(device: torch.device) -> None:
    """Gives back what nothing holds any more, graphs and the frames of errors included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "missing"
    return triton.__version__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="CSV file; rows are appended")
    parser.add_argument("--seconds", type=float, default=500, help="time after which nothing new is begun")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--milliseconds", type=float, default=40, help="a candidate's time in a round")
    parser.add_argument("--models", nargs="+", default=(BASE, LARGE))
    parser.add_argument("--batches", type=int, nargs="+", help="only these batch sizes")
    parser.add_argument("--candidates", nargs="+", default=("gather eager", *EVERYTHING))
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU, through Triton's interpreter")
    options = parser.parse_args()
    if options.smoke:
        plan, device = SMOKE, torch.device("cpu")
        options.rounds, options.milliseconds = 2, 0.0
    elif not torch.cuda.is_available():
        raise SystemExit("no CUDA device: this measures on a GPU; --smoke tries the script on the CPU.")
    else:
        plan = tuple(
            group for group in PLAN if group[0] in options.models and group[1] in (options.batches or (group[1],))
        )
        device = torch.device("cuda")
    with torch.no_grad():
        measure(plan, Table(options.out), options, device)


if __name__ == "__main__":
    main()
