"""Which layer may know which, read from the syntax trees; and what ``import dyntune`` brings in."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dyntune

PACKAGE = Path(dyntune.__file__).parent
PARTS = {layer: sorted((PACKAGE / layer).glob("*.py")) for layer in ("methods", "policies", "presets")}
EVERY_PART = [path for files in PARTS.values() for path in files]
HEAVY = ("matplotlib", "sklearn", "accelerate", "typer")


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
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def within(names, *prefixes):
    return {name for name in names if any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)}


def test_there_is_something_to_check():
    assert all(len(files) >= 3 for files in PARTS.values())
    assert "dyntune.methods.base.TuningMethod" in imported(PACKAGE / "methods" / "full.py")


@pytest.mark.parametrize("path", EVERY_PART, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_parts_do_not_know_what_runs_them(path):
    above = ("forward", "assembly", "tuned", "training", "commands", "checkpoint", "cost", "registry", "cli")
    assert not within(imported(path), *(f"dyntune.{module}" for module in above))
    assert not within(imported(path), "timm")


@pytest.mark.parametrize(
    "path", PARTS["methods"] + PARTS["policies"], ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_methods_and_policies_do_not_know_each_other(path):
    layer = f"dyntune.{path.parent.name}"
    names = within(imported(path), "dyntune.methods", "dyntune.policies", "dyntune.presets")
    assert names - {layer} == within(names, f"{layer}.base")


def test_backbones_do_not_know_what_is_put_on_them():
    for path in sorted((PACKAGE / "backbones").glob("*.py")):
        assert not within(
            imported(path), *(f"dyntune.{layer}" for layer in ("methods", "policies", "presets", "forward"))
        )


def test_importing_the_package_is_light():
    program = f"import sys, dyntune; print(*(name for name in {HEAVY} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


LAYERS = (
    ("errors", "files", "losses", "matching"),
    ("spec", "tokens"),
    ("attention",),
    ("backbones", "data"),
    ("methods", "policies"),
    ("presets",),
    ("registry", "forward"),
    ("kernels",),
    ("cost",),
    ("assembly",),
    ("tuned",),
    ("modelcard", "published", "merging", "rates", "table5"),
    ("checkpoint",),
    ("training",),
    ("deployment",),
    ("comparison",),
    ("visualize",),
    ("noah",),
    ("report",),
    ("bench",),
    ("vtab",),
    ("commands",),
    ("cli",),
)


def top_level(path):
    """Modules of the package that a file imports when it is itself imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    froms = [node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
    return {name.split(".")[1] for name in froms if name.startswith("dyntune.")}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own == "__init__":
        return
    rank = {name: index for index, layer in enumerate(LAYERS) for name in layer}
    assert own in rank, f"{own} is in no layer"
    for other in top_level(path) - {own}:
        assert rank[other] < rank[own], f"{own} may not import {other}"
