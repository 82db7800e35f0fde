"""Prints the lowest version of each direct dependency that pyproject.toml admits, as constraints for pip and uv.

python scripts/lowest.py > constraints.txt
"""

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def lowest(project: dict) -> list[str]:
    """``name==version`` for every requirement of a project and of its extras, in the order of the file.

    Raises:
        ValueError: a requirement does not begin with a lowest version, so that none could be tested.
    """
    extras = project["optional-dependencies"].values()
    pinned = []
    for requirement in (*project["dependencies"], *(one for extra in extras for one in extra)):
        if requirement.startswith(f"{project['name']}["):
            continue
        found = re.match(r"([\w.-]+)>=([\w.]+)", requirement)
        if found is None:
            raise ValueError(f"{requirement!r} in pyproject.toml names no lowest version; write NAME>=VERSION")
        pinned.append(f"{found[1]}=={found[2]}")
    return pinned


if __name__ == "__main__":
    try:
        print("\n".join(lowest(tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"])))
    except ValueError as error:
        sys.exit(str(error))
