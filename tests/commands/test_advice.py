"""What commands and errors tell people to do next: it works, as it was printed."""

import ast
import functools
import importlib
import io
import os
import re
import shlex
import shutil
import signal
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import timm
import typer.main
from torch import nn

import dyntune
from dyntune.commands import main as program
from dyntune.commands import train
from dyntune.commands.main import app, main
from dyntune.core import errors
from dyntune.core.errors import EXTRAS, how_to_install
from dyntune.data import load_data
from dyntune.training.progress import ProgressBar

ROOT = Path(__file__).parents[2]
COMMANDS = typer.main.get_command(app).commands
OPTIONS = {option for command in COMMANDS.values() for p in command.params for option in (*p.opts, *p.secondary_opts)}
OF_THE_PROGRAM = {"--help", "--version", "--no-x", "--tokens"}
OF_OTHERS = {"--nproc-per-node", "--shm-size"}
"""Options of every command, one that stands for others in a comment, and one that has another name now."""
QUICK = ("--epochs", "1", "--batch-size", "18", "--device", "cpu")


def dyntune_says(*arguments: object, status: int = 0) -> str:
    """What the program prints, on both streams, after its exit status has been checked."""
    said = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(said),
        redirect_stderr(said),
        pytest.raises(SystemExit) as ended,
    ):
        patch.setattr("sys.argv", ["dyntune", *map(str, arguments)])
        main()
    assert (ended.value.code or 0) == status, said.getvalue()
    return said.getvalue()


def the_next(said: str) -> str:
    """The one line after ``next:``."""
    (line,) = re.findall(r"^next: (.*)$", said, re.M)
    return line


def follow(line: str) -> str:
    """Runs a command that was printed."""
    program, *arguments = shlex.split(line)
    assert program == "dyntune"
    return dyntune_says(*arguments)


@pytest.fixture
def two(two_blocks) -> tuple[str, ...]:
    """Options of the small backbone."""
    return ("--model", "vit_two_blocks", "--weights", str(two_blocks))


@pytest.mark.parametrize("splits", [("train", "val", "test"), ("train", "val"), ("train",)], ids="-".join)
def test_after_train_the_run_is_evaluated_on_what_there_is(splits, photos, two, tmp_path, monkeypatch):
    data = tmp_path / "some photos"  # a name that a shell would split
    for split in splits:
        shutil.copytree(photos / split, data / split)
    monkeypatch.chdir(tmp_path)
    said = dyntune_says("train", "some photos", *two, "--method", "linear", "--out", "my runs/a", *QUICK)
    line = the_next(said)
    assert ("--split val" in line) == ("test" not in splits)
    assert "accuracy" in follow(line)


def test_after_train_the_run_is_evaluated_on_the_images_that_chose_it(photos, two, tmp_path):
    data = tmp_path / "photos"
    shutil.copytree(photos / "train", data / "train")
    (data / "train/red/broken.png").write_bytes(b"no picture")
    given = ("--val-fraction", "0.5", "--on-corrupt", "skip")
    line = the_next(dyntune_says("train", data, *two, "--method", "linear", "--out", tmp_path / "run", *QUICK, *given))
    said = " ".join(follow(line).split())
    images = load_data(data, val_fraction=0.5, on_corrupt="skip").val
    assert f"on {len(images)} val images" in said


def test_an_interrupted_training_goes_on_with_the_line_that_it_printed(photos, two, tmp_path, monkeypatch):
    class Impatient(ProgressBar):
        def step(self, *arguments, **figures):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train, "ProgressBar", Impatient)
    arguments = ("train", photos, *two, "--method", "linear", "--out", tmp_path / "run", *QUICK)
    said = dyntune_says(*arguments, status=1)
    assert "stopped in epoch 1" in said and "the state is saved" in said and "error" not in said
    monkeypatch.setattr(train, "ProgressBar", ProgressBar)
    assert "saved epoch 1" in follow(the_next(said))


@pytest.mark.parametrize("model", ["built in", "timm's", "transformers'"])
def test_what_merge_prints_builds_the_merged_model(model, photos, two, make_hf, tmp_path):
    if model == "built in":
        chosen = ()
    elif model == "timm's":
        chosen = two
    else:
        make_hf("vit").save_pretrained(tmp_path / "host")
        chosen = ("--model", f"hf:{tmp_path / 'host'}")
    dyntune_says("train", photos, *chosen, "--method", "lora", "--out", tmp_path / "run", *QUICK)
    out = tmp_path / ("merged" if model == "transformers'" else "merged.safetensors")
    *imports, expression = the_next(dyntune_says("merge", tmp_path / "run", "--out", out)).split("; ")
    names: dict[str, object] = {}
    exec("\n".join(imports), names)
    built = eval(expression, names)
    assert isinstance(built, nn.Module)
    merged = dyntune.load(tmp_path / "run").merge().state_dict()
    assert all(tensor.equal(merged[name]) for name, tensor in built.state_dict().items())
    # The library of the model alone is enough, but for the one backbone that it does not have.
    assert ("dyntune" in imports[0]) == (model == "built in")


def test_a_training_without_the_split_that_chooses_goes_with_the_option_that_the_error_names(photos, two, tmp_path):
    shutil.copytree(photos / "train", tmp_path / "data/train")
    given = ("train", tmp_path / "data", *two, "--method", "linear", "--out", tmp_path / "run", *QUICK)
    said = dyntune_says(*given, "--select", "test", status=1)
    assert "saved epoch 1" in dyntune_says(*given, *re.search(r"use (--select last)", said)[1].split())


def test_an_image_that_cannot_be_read_is_left_out_with_the_option_that_the_error_names(photos, two, tmp_path):
    shutil.copytree(photos, tmp_path / "data")
    (tmp_path / "data/train/red/broken.png").write_bytes(b"no picture")
    given = ("train", tmp_path / "data", *two, "--method", "linear", "--out", tmp_path / "run", *QUICK)
    said = dyntune_says(*given, status=1).replace("\n", " ")
    option = re.search(r"\((--on-corrupt skip)\)", said)[1]
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert "left out 1 image that" in dyntune_says(*given, *option.split())


def test_a_name_in_place_of_a_model_is_answered_with_a_line_that_works(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: (name, pretrained))
    with pytest.raises(errors.SpecError) as refused:
        dyntune.tune("vit_two_blocks", "linear")
    expression = re.search(r"tune\((timm\.create_model\(.*?\))", str(refused.value))[1]
    assert eval(expression) == ("vit_two_blocks", True)


def test_rates_out_of_reach_are_calibrated_with_the_line_that_the_error_names(make_host, images_for):
    model = dyntune.tune(make_host(), "dyt:rate=0.5").eval()
    images = images_for(model.backbone.host, 8)
    with pytest.raises(errors.SpecError, match=re.escape("model.set_rate(rate, data)")):
        model.set_rate(0.3)
    model.set_rate(0.3, images)
    data = [(image, 0) for image in images]
    model.calibration = dyntune.calibrate(model, data, rates=(0.4, 0.6))
    with pytest.raises(errors.SpecError) as refused:
        model.set_rate(0.95)
    rates = re.search(r"dyntune calibrate RUN DATA (--rates [\d.]+)", str(refused.value))[1]
    COMMANDS["calibrate"].make_context("calibrate", ["RUN", "DATA", *rates.split()])


LIMITS = ("CUDA out of memory. Tried to allocate 20 MiB.", "Too many open files.", "out of shared memory")


@pytest.mark.parametrize("name", COMMANDS)
def test_at_a_limit_of_the_machine_a_command_names_options_that_it_has(monkeypatch, name):
    own = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    named = set()
    for words in LIMITS:

        def fail(words=words):
            raise RuntimeError(words)

        monkeypatch.setattr(program, "_run", fail)
        said = " ".join(dyntune_says(name, status=1).split())
        assert re.search(r"What (takes less: a smaller model|helps: ulimit)|Give .*or more of it: docker", said), said
        assert not re.search(r"[,:(] ?[,.;)]", said), said
        named |= set(re.findall(r"(?<!\w)--[a-z][a-z-]+", said)) - OF_OTHERS
    readers = "--readers" if name == "vtab" else "--workers"  # which are jobs there
    assert named == own & {"--batch-size", "--accumulate", "--grad-checkpointing", readers}


def test_extras_are_the_packages_of_pyproject():
    given = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {
        extra: tuple(re.match(r"[\w-]+", requirement)[0] for requirement in requirements)
        for extra, requirements in given.items()
        if extra not in ("docs", "dev")
    } == EXTRAS
    assert how_to_install("hf") == "pip install transformers, or in a checkout of Dyntune pip install -e '.[hf]'"


@functools.cache
def texts() -> list[tuple[str, str]]:
    """Every text in the package's code, docstrings included, with its file; what is put in while it runs is X."""
    found = []
    for file in sorted((ROOT / "src").rglob("*.py")):
        inner = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                inner |= set(map(id, node.values))
                pieces = (value.value if isinstance(value, ast.Constant) else "X" for value in node.values)
                found.append((file.name, "".join(pieces)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
                found.append((file.name, node.value))
    return found


def pages() -> list[tuple[str, str]]:
    """Every page for people, with its file."""
    files = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
    return [(file.name, file.read_text()) for file in files]


def test_no_text_names_an_option_a_function_or_a_package_that_is_not_there():
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = {re.match(r"[\w-]+", one)[0] for one in requirements["dependencies"]} | {"numpy", "pillow", "triton"}
    packages |= {name for names in EXTRAS.values() for name in names} | {"X"}
    for file, text in texts():
        for option in re.findall(r"(?<![\w(-])--[a-z][\w-]*(?![\w:-])", text):  # and no variables of CSS
            assert option in OPTIONS | OF_THE_PROGRAM | OF_OTHERS, (file, option)
        for name in re.findall(r"(?<![\w./])dyntune\.([\w.]+)\(", text):
            holder, _, last = f"dyntune.{name}".rpartition(".")
            assert hasattr(importlib.import_module(holder), last), (file, name)
        for asked in re.findall(r"pip install ((?:[\w.>='-]+ ?)+)", text):
            if not asked.startswith("-e"):
                wanted = {re.match(r"'?([\w-]+)", word)[1] for word in asked.split() if word not in ("or", "in")}
                assert wanted <= packages, (file, asked)
    for file, text in [*texts(), *pages()]:
        assert not re.search(r"install '?dyntune\[[^\]]*\](?! @ )", text), f"{file}: Dyntune is on no package index"


def test_every_command_that_is_written_down_can_be_read():
    """Commands in examples, help, errors and pages: the command is there and takes these options and values."""
    read = 0
    for _, text in [*texts(), *pages()]:
        for line in re.findall(r"^(?:    )?(dyntune [a-z]+ .*)$", re.sub(r"\\\n\s*", "", text), re.M):
            line = line.partition("  #")[0].partition("   ")[0].strip()
            if re.search(r"\.\.\.|\w\|\w|`", line):
                continue  # choices, or an ellipsis
            _, name, *arguments = shlex.split(line)
            if not COMMANDS[name].hidden:
                COMMANDS[name].make_context(name, arguments)
                read += 1
    assert read > 50
