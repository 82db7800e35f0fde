"""scripts/lowest.py says which versions ``make test-oldest`` installs."""

import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "lowest.py"


def test_every_requirement_is_pinned_to_its_lowest_version():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True)
    pinned = done.stdout.splitlines()
    assert "torch==2.8" in pinned and "onnxruntime==1.24.1" in pinned
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert len(pinned) == len(project["dependencies"]) + sum(map(len, extras.values())) - 1  # the extras in dev


def test_a_requirement_without_a_lowest_version_is_named():
    project = {"name": "mine", "dependencies": ["torch>=2.8", "timm<2"], "optional-dependencies": {}}
    with pytest.raises(ValueError, match=r"'timm<2'.*NAME>=VERSION"):
        runpy.run_path(str(SCRIPT))["lowest"](project)
