"""Files of every kind, damaged and made up: what comes of them is right, the same, or refused in words.

``pytest tests/fuzz --fuzz-cases 10000`` makes so many cases of all kinds together.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("resource")

KINDS = ("adapters", "configurations", "calibrations", "states", "exports", "openvino", "tables")


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """What came of every case, by kind of file."""
    cases = -(-request.config.getoption("--fuzz-cases") // len(KINDS))
    result = tmp_path_factory.mktemp("fuzz") / "found.json"
    command = [sys.executable, str(Path(__file__).parent / "worker.py"), str(cases), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120 + cases, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(result.read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_anybody_is_right_the_same_or_refused(outcomes, kind):
    if kind not in outcomes:
        pytest.skip(f"{kind} is not installed")
    found = Counter(outcomes[kind])
    wrong = {f"case {outcomes[kind].index(what)}: {what}": n for what, n in found.items() if what not in ALLOWED}
    assert not wrong
    assert found["refused"] > sum(found.values()) / 4 and len(found) > 1, "cases of both kinds are tried"


ALLOWED = ("same", "right", "refused")
