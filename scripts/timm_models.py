"""Which of timm's architectures Dyntune takes, and why not the others: writes docs/timm_models.csv.

    python scripts/timm_models.py

Each is built without weights, put behind the backbone interface, and given a method.
"""

from __future__ import annotations

import csv
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import timm

from dyntune.backbones.hosts import wrap
from dyntune.core.errors import BackboneError
from dyntune.core.shapes import shapes_only
from dyntune.model.assembly import install
from dyntune.parts.registry import resolve

TABLE = Path(__file__).parents[1] / "docs" / "timm_models.csv"
MODULES = (
    *("vision_transformer", "deit", "vision_transformer_hybrid", "vitamin", "eva", "naflexvit", "beit"),
    "vision_transformer_relpos",
)
"""timm's files whose models are of a family that Dyntune has."""
YES = "yes"


def architectures() -> Iterator[str]:
    """The names of every architecture of those files, without tags."""
    for module in MODULES:
        yield from timm.list_models(module=module)


def verdict(name: str) -> str:
    """``yes``, or why a model is refused."""
    with warnings.catch_warnings(), shapes_only():
        warnings.simplefilter("ignore")
        host = timm.create_model(name)
        try:
            install(wrap(host), resolve(["adaptformer"]))
        except BackboneError as error:
            return str(error).removeprefix(f"{type(host).__name__} is not supported: ").split(". Supported")[0]
    return YES


def read() -> dict[str, str]:
    """The table: verdict by architecture."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return {row["architecture"]: row["taken"] for row in csv.DictReader(file)}


def main() -> None:
    """Writes the table, and says on standard error how many are taken."""
    verdicts = {name: verdict(name) for name in architectures()}
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["architecture", "taken"])
        writer.writerows(verdicts.items())
    taken = sum(answer == YES for answer in verdicts.values())
    print(f"{taken} of {len(verdicts)} architectures of timm {timm.__version__} are taken", file=sys.stderr)


if __name__ == "__main__":
    main()
