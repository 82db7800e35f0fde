"""Which layer may know which, read from the syntax trees; and what ``import dyntune`` brings in."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import dyntune
from dyntune.parts import policies

PACKAGE = Path(dyntune.__file__).parent
PARTS = {room: sorted((PACKAGE / "parts" / room).glob("*.py")) for room in ("methods", "policies", "presets")}
EVERY_PART = [path for files in PARTS.values() for path in files if path.name != "__init__.py"]
HEAVY = ("matplotlib", "sklearn", "accelerate", "typer", "transformers", "peft", "dyntune.inference.export")
KERNELS = "dyntune.inference.kernels"


def imported(path):
    """Full names of everything that a file imports, at any depth of nesting."""
    module = ".".join(("dyntune", *path.relative_to(PACKAGE).with_suffix("").parts))
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join((*module.split(".")[: -node.level], *([base] if base else [])))
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def within(names, *prefixes):
    return {name for name in names if any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)}


def test_there_is_something_to_check():
    assert all(len(files) >= 2 for files in PARTS.values())
    assert "dyntune.parts.methods.base.TuningMethod" in imported(PACKAGE / "parts" / "methods" / "full.py")


@pytest.mark.parametrize("path", EVERY_PART, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_parts_do_not_know_what_runs_them(path):
    assert not within(imported(path), "dyntune.model", "dyntune.parts.registry")
    assert not within(imported(path), "timm")


@pytest.mark.parametrize(
    "path",
    [path for path in EVERY_PART if path.parent.name != "presets"],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_methods_and_policies_do_not_know_each_other(path):
    layer = f"dyntune.parts.{path.parent.name}"
    names = within(imported(path), *(f"dyntune.parts.{room}" for room in PARTS))
    assert names == within(names, *(f"{layer}.{base}" for base in ("base", *policies.BASES)))


@pytest.fixture(scope="module")
def loaded():
    """What a fresh process has loaded after ``import dyntune``, after the kernels' package, and after the commands."""
    lines = "import json, sys, dyntune", f"import {KERNELS}", "import dyntune.commands.main"
    program = "\n".join(["found = []", *(f"{line}; found.append([*sys.modules])" for line in lines)])
    program += "\nprint(json.dumps(found))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=600)
    return json.loads(result.stdout)


def test_importing_the_package_is_light(loaded):
    assert "dyntune" in loaded[0] and not {*HEAVY} & {*loaded[0]}


def test_a_command_does_not_wait_for_what_it_does_not_use(loaded):
    assert "dyntune.commands.visualize" in loaded[2] and not {"matplotlib", "tensorboard"} & {*loaded[2]}


def test_no_kernel_is_imported_before_it_runs(loaded):
    names = {name.removeprefix(f"{KERNELS}.") for name in loaded[1] if name.startswith(f"{KERNELS}.")}
    assert "execution" in names
    assert not names & {"arithmetic", "compaction", "gathering", "grouped", "joint", "product"}


ROOMS = ("core", "data", "backbones", "parts", "model", "training", "inference", "studies", "commands")
"""From the ground up: a room knows those before it."""


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_know_those_below_alone(path):
    """All imports count, those inside functions and those for types alone too."""
    own = path.relative_to(PACKAGE).parts[0]
    if own in ("__init__.py", "__main__.py"):
        return
    known = {name.split(".")[1] for name in within(imported(path), "dyntune") if name.count(".")}
    for room in known & set(ROOMS):
        assert ROOMS.index(room) <= ROOMS.index(own), f"{own} may not import {room}"


def test_the_root_is_small():
    entries = [entry.name for entry in PACKAGE.iterdir() if entry.name not in ("__pycache__", "py.typed")]
    assert set(entries) == {"__init__.py", "__main__.py", *ROOMS}


def test_no_circle_of_files():
    """In the order in which no file imports a later one, every file finds its place."""
    paths = {
        ".".join(("dyntune", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    waiting = {module: _modules(imported(path), paths) - {module} for module, path in paths.items()}
    while ready := {module for module, needs in waiting.items() if not needs}:
        waiting = {module: needs - ready for module, needs in waiting.items() if module not in ready}
    assert not waiting


def _modules(names, known):
    """The files that imported names come from: the longest part of each name that is one."""
    found = set()
    for name in names:
        while name and name not in known:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {""}
