"""The process of ``test_fuzz.py``: damages files that Dyntune wrote, reads them, and writes down what came of it.

``python worker.py CASES RESULT.json`` makes so many cases of each kind of file, always the same ones, within limits on
memory and time.
"""

import copy
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import TensorDataset

import dyntune
from dyntune.core.errors import DyntuneError
from dyntune.core.files import sealed
from dyntune.data.vtab import LISTS, load_vtab_task
from dyntune.inference.export.folder import digests, open_export
from dyntune.model.adapter_folder import CONFIG, WEIGHTS
from dyntune.model.rates import Calibration
from dyntune.training.state import STATE, RunState

try:
    import openvino
except ImportError:
    openvino = None

MEMORY = 3 * 2**30
"""Bytes beyond those that the process has before the first case."""
SECONDS = 20
"""For one case."""
NASTY = (
    *(None, True, False, -1, 0, 1, 2, 7, 10**6, 10**9, 10**18, 10**40, 0.5, -0.5, 1e30, 1e308, -1e308),
    *(math.inf, -math.inf, math.nan, "", "x", "\x00", "../..", "/dev/zero", "x" * 100_000, [], [[]], {}, [0], ["a"]),
    *([1e308], [10**9, 10**9], {"a": 1}, "float16", "hf-hub:nobody/nothing", "local-dir:/", [None] * 3),
)


class OutOfTime(BaseException):
    """A case took longer than it may."""


def host():
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    return VisionTransformer(**shape).eval()


IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
DATA = TensorDataset(IMAGES, torch.arange(6) % 3)


def damaged(draw, content):
    """Bytes with a bit changed, a piece cut off, repeated, left out or overwritten."""
    content = bytearray(content)
    place = draw.randrange(len(content)) if content else 0
    match draw.choice(("bit", "bit", "bit", "cut", "twice", "hole", "zeros", "noise", "empty")):
        case "bit" if content:
            content[place] ^= 1 << draw.randrange(8)
        case "cut":
            del content[place:]
        case "twice":
            content[place:place] = content[: draw.randrange(1, 200)]
        case "hole":
            del content[place : place + draw.randrange(1, 200)]
        case "zeros":
            length = len(content[place : place + draw.randrange(1, 64)])
            content[place : place + length] = bytes(length)
        case "noise":
            length = len(content[place : place + draw.randrange(1, 64)])
            content[place : place + length] = draw.randbytes(length)
        case "empty":
            content.clear()
    return bytes(content)


def spoil(draw, folder, names):
    """Damages one of the files of a folder, or puts something else in its place."""
    path = folder / draw.choice(names)
    match draw.randrange(20):
        case 0:
            path.unlink()
        case 1:
            path.unlink()
            os.mkfifo(path)
        case 2:
            path.unlink()
            path.symlink_to("/dev/zero")
        case 3:
            path.unlink()
            path.symlink_to(path)
        case 4:
            path.unlink()
            path.mkdir()
        case 5:
            other = folder / draw.choice(names)
            path.write_bytes(other.read_bytes())
        case _:
            path.write_bytes(damaged(draw, path.read_bytes()))


def edited(draw, values):
    """A copy of JSON values with one of them replaced, removed or put beside others."""
    values = copy.deepcopy(values)
    holder, key = draw.choice(list(_places(values)))
    match draw.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[draw.choice(("x", "type", "name", "files", "__class__"))] = draw.choice(NASTY)
        case 2:
            for _ in range(draw.choice((10, 100, 3000))):
                holder[key] = [holder[key]]
        case 3 if isinstance(holder[key], int | float):
            holder[key] = holder[key] * draw.choice((-1, 2, 1e10, 1e300)) if holder[key] else draw.choice((1, 1e-300))
        case _:
            holder[key] = draw.choice(NASTY)
    return values


def _places(values):
    for key, item in list(values.items()) if isinstance(values, dict) else list(enumerate(values)):
        yield values, key
        if isinstance(item, dict | list):
            yield from _places(item)


def dumped(values):
    """JSON of values however deep they are nested."""
    text, depth = json.dumps, sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        return text(sealed(values)) if isinstance(values, dict) else text(values)
    finally:
        sys.setrecursionlimit(depth)


class Adapters:
    """Saved adapters: damaged anywhere, or with a configuration that was changed and sealed again."""

    names = (CONFIG, WEIGHTS)

    def __init__(self, room):
        self.whole = room / "adapter"
        model = dyntune.tune(host(), "dyt:bottleneck=2").eval()
        with torch.no_grad():
            for number, parameter in enumerate(model.tuned_state().values()):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
        model.classes = ("cat", "dog", "fox")
        model.calibration = Calibration(6, (0.3, 0.7), {"blocks.0.mlp": (-1.0, 1.0)}, {"blocks.0.mlp": (0.3, 0.7)})
        model.save(self.whole)
        self.config = json.loads((self.whole / CONFIG).read_text())
        self.logits = model(IMAGES)

    def change(self, draw, folder):
        spoil(draw, folder, self.names)

    def read(self, folder):
        model = dyntune.load(folder, backbone=host())
        same = torch.equal(model(IMAGES), self.logits) and model.classes == ("cat", "dog", "fox")
        return "same" if same and model.calibration.to_dict()["rates"] == (0.3, 0.7) else "wrong"


class Configurations(Adapters):
    """What a stranger may have written into the configuration: then the model is as it says."""

    entry: str | None = None

    def change(self, draw, folder):
        config = copy.deepcopy(self.config)
        config.pop("config_sha256")
        if self.entry is None:
            config = edited(draw, config)
        else:
            config[self.entry] = edited(draw, config[self.entry])
        (folder / CONFIG).write_text(dumped(config))

    def read(self, folder):
        model = dyntune.load(folder, backbone=host())
        config, said = json.loads((folder / CONFIG).read_text()), json.loads(json.dumps(model.describe()))
        images = IMAGES.to(next(model.parameters()).dtype)
        logits = model(images)
        if model.calibration is not None:
            model.set_rate(model.calibration.rates[0])
            logits = logits + model(images)
        agree = all(said[name] == config.get(name) for name in ("preprocessing", "classes", "calibration"))
        return "right" if agree and bool(logits.isfinite().all()) else "wrong"


class Calibrations(Configurations):
    """The same of a calibration."""

    entry = "calibration"


class States:
    """States of unfinished runs."""

    names = (STATE,)

    def __init__(self, room):
        self.whole = room / "run"
        self.fit(self.whole)
        self.state = RunState.read(self.whole)

    def fit(self, folder, **options):
        torch.manual_seed(0)
        model = dyntune.tune(host(), "dyt:bottleneck=2")
        dyntune.fit(model, DATA, out=folder, epochs=1, batch_size=3, device="cpu", **options)
        return model

    def change(self, draw, folder):
        if draw.randrange(3):
            spoil(draw, folder, self.names)
            return
        held = torch.load(folder / STATE, weights_only=True)
        del held["sha256"]  # as states of earlier versions are
        name = draw.choice(list(held))
        if isinstance(held[name], dict) and held[name] and draw.randrange(4):
            key = draw.choice(list(held[name]))
            value = held[name][key]
            held[name][key] = (
                draw.choice((value * math.nan, value[:0], value.double().expand(2, *value.shape)))
                if (isinstance(value, torch.Tensor) and value.ndim and value.is_floating_point())
                else draw.choice(NASTY)
            )
        else:
            held[name] = draw.choice(NASTY)
        torch.save(held, folder / STATE)
        (folder / "changed").touch()

    def read(self, folder):
        state = RunState.read(folder)
        if (folder / "changed").exists():
            model = self.fit(folder, resume=True)
            return "right" if all(bool(p.isfinite().all()) for p in model.parameters()) else "wrong"
        pairs = zip(_leaves(vars(state)), _leaves(vars(self.state)), strict=True)
        return "same" if all(type(a) is type(b) and _equal(a, b) for a, b in pairs) else "wrong"


def _leaves(value):
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value


def _equal(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


class Exports:
    """Folders of exported models, here one that says the mean of each channel."""

    runtime, names = "onnx", ("deploy.json", "model.onnx", "run.py")

    def __init__(self, room):
        self.whole = room / "export"
        self.whole.mkdir()
        self.write_model()
        (self.whole / "run.py").write_text("print('runs')\n" * 20)
        self.config = {
            **{"library": "dyntune", "format": 1, "spec": "dyt", "runtime": self.runtime, "precision": "fp32"},
            **{"opset": 18, "weight_bits": None, "gates": [], "task": "image-classification"},
            "classes": ["cat", "dog", "fox"],
            "preprocessing": {"size": [16, 16], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"},
            "files": digests(self.whole),
        }
        (self.whole / "deploy.json").write_text(json.dumps(sealed(self.config), indent=2))
        self.logits = open_export(self.whole, threads=1)(IMAGES)

    def write_model(self):
        weight = numpy_helper.from_array(np.eye(3, dtype=np.float32), "weight")
        nodes = [
            helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
        ]
        inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 16, 16])]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])]
        graph = helper.make_graph(nodes, "means", inputs, outputs, [weight])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
        model.ir_version = 10
        (self.whole / "model.onnx").write_bytes(model.SerializeToString())

    def change(self, draw, folder):
        if draw.randrange(2):
            spoil(draw, folder, self.names)
        else:
            (folder / "deploy.json").write_text(dumped(edited(draw, self.config)))
            (folder / "changed").touch()

    def read(self, folder):
        model = open_export(folder, threads=1)
        same = torch.equal(model(IMAGES), self.logits)
        if not (folder / "changed").exists():
            return "same" if same and model.config == sealed(self.config) else "wrong"
        config = json.loads((folder / "deploy.json").read_text())
        agree = model.preprocessing.to_dict() == config["preprocessing"] and config["classes"] in (
            None,
            list(model.classes or ()),
        )
        return "right" if same and agree else "wrong"


class OpenVino(Exports):
    """The same in OpenVINO, whose weights lie in a file of their own."""

    runtime, names = "openvino", ("deploy.json", "model.xml", "model.bin", "run.py")

    def write_model(self):
        images = openvino.opset13.parameter([-1, 3, 16, 16], np.float32, name="images")
        pooled = openvino.opset13.reduce_mean(images, np.array([2, 3]), keep_dims=False)
        logits = openvino.opset13.matmul(pooled, np.eye(3, dtype=np.float32), False, False)
        model = openvino.Model([logits], [images], "means")
        model.inputs[0].set_names({"images"})
        model.outputs[0].set_names({"logits"})
        openvino.save_model(model, self.whole / "model.xml", compress_to_fp16=False)


class Tables:
    """Lists of images and labels."""

    def __init__(self, room):
        self.whole = room / "task"
        (self.whole / "images").mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
        for number in range(6):
            Image.fromarray(pixels[number]).save(self.whole / "images" / f"{number}.png")
        for name in LISTS:
            lines = (f"images/{number}.png {number % 3}\n" for number in range(6))
            (self.whole / f"{name}.txt").write_text("".join(lines))

    def change(self, draw, folder):
        path = folder / f"{draw.choice(LISTS)}.txt"
        if draw.randrange(2):
            spoil(draw, folder, [f"{name}.txt" for name in LISTS])
            return
        lines = path.read_text().splitlines()
        lines[draw.randrange(len(lines))] = draw.choice(
            (
                *("", " ", "1", "images/0.png", "images/0.png x", "images/0.png -1", "images/0.png 1e3", "a b c 1"),
                *("images/0.png 999999999", f"images/0.png {'9' * 5000}", "/dev/zero 1", "../task/images/0.png 1"),
                *("images 1", "images/none.png 1", "images/0.png\x001", "images/0.png \u0661", "\ufeffimages/1.png 1"),
                *("images/0.png 1 # red", "images/../images/0.png 1", "x" * 100_000 + " 1", "images/0.png\t2", "'a' 1"),
            )
        )
        path.write_text("\n".join(lines))

    def read(self, folder):
        data = load_vtab_task(folder)
        for split in (data.train, data.val, data.test):
            shift = None
            for index, label in enumerate(split.targets):
                path = Path(split.paths[index])
                if not path.is_relative_to(folder) or not path.is_file():
                    return "wrong"
                lines = [line.split() for name in LISTS for line in (folder / f"{name}.txt").read_text().split("\n")]
                meant = {int(line[-1]) for line in lines if line and line[0].endswith(path.name)}
                shift = 0 if shift is None and label in meant else shift
                if not {label, label + 1} & meant:
                    return "wrong"
        return "right"


KINDS = {kind.__name__.lower(): kind for kind in (Adapters, Configurations, Calibrations, States, Exports, Tables)}
if openvino is not None:
    KINDS["openvino"] = OpenVino


def outcome(kind, draw, folder):
    """Damages a copy of what is whole and reads it: ``same``, ``right``, ``refused``, or what must not be."""
    shutil.copytree(kind.whole, folder, symlinks=True)
    try:
        kind.change(draw, folder)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        return kind.read(folder)
    except DyntuneError as error:
        return "refused" if str(error).strip() else "refused without a word"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        shutil.rmtree(folder)


def main(cases, result):
    torch.set_num_threads(1)
    torch.set_grad_enabled(True)
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(OutOfTime()))
    found = {}
    with tempfile.TemporaryDirectory() as room:
        kinds = {name: kind(Path(room) / name) for name, kind in KINDS.items() if (Path(room) / name).mkdir() is None}
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
        for name, kind in kinds.items():
            found[name] = [
                outcome(kind, random.Random(f"{name} {number}"), Path(room) / name / "case") for number in range(cases)
            ]
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
