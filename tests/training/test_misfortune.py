"""Commands that are killed between any two file operations, or whose disk fills up: the next call sets it right.

Which moments are tried is decided by a seed; ``--misfortunes 50`` tries so many for each command instead of one.
"""

import functools
import hashlib
import random
import re
import shutil
import signal

import pytest
import torch
from processes import Command, KilledAt, NoRoom
from typer.testing import CliRunner

import dyntune
from dyntune.backbones.builtin import BUILTIN_BACKBONE
from dyntune.backbones.hosts import create_backbone
from dyntune.commands.main import app
from dyntune.data.drawn.vtab_mini import write_vtab_mini

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def things(photos, tmp_path_factory):
    """What the commands are given: images, a small benchmark, an adapter with gates and one that folds."""
    root = tmp_path_factory.mktemp("things")
    shutil.copytree(photos, root / "photos")
    write_vtab_mini(root / "mini", test_images=12, train_images=16, val_images=8)
    for name, spec in (("gated", "dyt"), ("folds", "lora")):
        torch.manual_seed(0)
        model = dyntune.tune(create_backbone(BUILTIN_BACKBONE, num_classes=3), spec)
        model.classes = ("blue", "green", "red")
        model.save(root / name)
    return root


COMMANDS = {
    "train": "train photos --resume --method linear --out out",
    "compare": "compare photos --resume --methods linear --out out",
    "noah": "noah photos --population 2 --generations 1 --parents 1 --supernet-epochs 1 --out out",
    "vtab": "vtab mini --tasks digits --methods linear --retry-failed --out out",
    "export": "export gated --runtime torch --out out",
    "merge": "merge folds --out out.safetensors",
    "calibrate": "calibrate gated photos --images 8 --rates 0.5",
}
SAME = {
    "train": ("out/dyntune.safetensors", "out/last/dyntune.safetensors", "out/log.jsonl"),
    "compare": ("out/linear/dyntune.safetensors",),
    "noah": ("out/dyntune.safetensors", "out/supernet/dyntune.safetensors"),
    "vtab": ("out/table.csv",),
    "export": ("out/model.pt2",),
    "merge": ("out.safetensors",),
    "calibrate": ("gated/dyntune.json", "gated/dyntune.safetensors"),
}
"""Files that must be there at the end, and hold what they would hold if nothing had happened."""
TRAINS = ("train", "compare", "noah", "vtab")
SHORT = ("--epochs", "1", "--batch-size", "36", "--device", "cpu")
SIZES_ALONE = ("log.jsonl", "model.pt2")
"""Of these, in which times and the like stand, the size is looked at, roughly."""


def words_of(name, place):
    """The command line, in which what is given lies in ``place`` and so does what comes out."""
    names = {"photos", "mini", "gated", "folds", "out", "out.safetensors"}
    words = [str(place / word) if word in names else word for word in COMMANDS[name].split()]
    return [*words, *SHORT] if name in TRAINS else words


def finish(name, place):
    """Runs a command to its end in this process; what is complete already is told so."""
    done = CliRunner().invoke(app, words_of(name, place))
    whole = name in ("export", "merge") and "is there already" in str(done.exception)
    assert done.exit_code == 0 or whole, (done.output, done.exception)


def digests(name, place):
    found = {}
    for file in SAME[name]:
        data = (place / file).read_bytes()
        found[file] = len(data) if file.endswith(SIZES_ALONE) else hashlib.sha256(data).hexdigest()
    return found


def roughly(expected):
    """Digests to compare others with, in which sizes need not be met to the byte."""
    return {file: pytest.approx(v, rel=0.05, abs=500) if isinstance(v, int) else v for file, v in expected.items()}


def leftovers(place):
    return [path for path in place.rglob(".*") if re.fullmatch(r"\..+\.[a-z0-9_]{8}", path.name)]


@pytest.fixture(scope="module")
def undisturbed(things, tmp_path_factory):
    """``undisturbed(name)``: what a command comes to, how often it touches files, and the largest that it writes."""

    @functools.cache
    def run(name):
        place = shutil.copytree(things, tmp_path_factory.mktemp(name) / "place")
        given = {path for path in place.rglob("*")}
        command = Command(words_of(name, place), place / "errors", KilledAt(place, count=place / "count"))
        status, errors = command.ended()
        assert status == 0, errors
        largest = max(path.stat().st_size for path in {*place.rglob("*")} - given if path.is_file())
        return digests(name, place), int((place / "count").read_text()), largest

    return run


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(metafunc.config.getoption("--misfortunes")))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_was_killed_ends_as_if_it_had_not_been(things, undisturbed, tmp_path, name, seed):
    expected, events, _ = undisturbed(name)
    moment = random.Random(f"{name} {seed}").randint(1, events)
    place = shutil.copytree(things, tmp_path / "place")
    status, errors = Command(words_of(name, place), place / "errors", KilledAt(place, moment)).ended()
    assert status in (-signal.SIGKILL, 0), errors
    finish(name, place)
    assert digests(name, place) == roughly(expected)
    assert not leftovers(place)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_without_room_says_so_and_leaves_what_was_there(things, undisturbed, tmp_path, name, seed):
    expected, _, largest = undisturbed(name)
    room = random.Random(f"{name} {seed}").randint(2_000, max(2_001, largest - 1))
    place = shutil.copytree(things, tmp_path / "place")
    before = dyntune.load(place / "gated").saved_state()
    status, errors = Command(words_of(name, place), place / "errors", NoRoom(room)).ended()
    assert status in (0, 1) and "Traceback" not in errors, errors
    if status:
        assert errors.count("error:") <= 1 and ("may be written" in errors or "no room" in errors), errors
    after = dyntune.load(place / "gated").saved_state()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    finish(name, place)
    assert digests(name, place) == roughly(expected)
    assert not leftovers(place)
