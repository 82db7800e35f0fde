"""Every architecture of timm's that is of a family we have: built on the meta device, wrapped, and given a method."""

import runpy
from pathlib import Path

import pytest

MODELS = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "timm_models.py"))
SHARES = 4
"""Parts of the list, each a test, so that processes can share the work."""


@pytest.mark.parametrize("share", range(SHARES))
def test_each_is_taken_or_refused_as_the_table_says(share):
    written = MODELS["read"]()
    names = list(MODELS["architectures"](MODELS["FILES"]))
    for other in MODELS["OTHERS"]:  # one of each family that we do not have
        names += list(MODELS["architectures"]([other]))[:1]
    found = {name: MODELS["verdict"](name) for name in names[share::SHARES]}
    # A newer timm has models that the table does not know yet; each must be taken or refused all the same.
    assert {name: answer for name, answer in found.items() if name in written} == {
        name: answer for name, answer in written.items() if name in found
    }


def test_the_table_is_of_this_timm_or_an_older_one():
    written = MODELS["read"]()
    assert len(set(MODELS["architectures"]()) & set(written)) > 150
    assert sum(answer == "yes" for answer in written.values()) > 150
    assert all(answer for answer in written.values())
