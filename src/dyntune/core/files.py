"""Writing files so that a reader sees the old content or the new, and reading JSON that anybody may have written."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dyntune.core.errors import DyntuneError, in_one_line

LARGEST_JSON = 16 * 2**20
"""Bytes of a JSON file that is read: the names of a hundred thousand classes are a tenth of it."""
_DEEPEST = 32
"""Objects and lists inside one another; what is written here has a handful."""
_LONGEST_NUMBER = 20
"""Characters of a whole number: those of 64 bits, with a sign."""
SEAL = "config_sha256"
"""The entry of a JSON object with the digest of all its other entries."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Has ``write`` fill a temporary file beside ``path`` and puts it in place once it is complete and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, data: Any) -> None:
    """Writes indented JSON atomically."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, error: type[DyntuneError]) -> Any:
    """The content of a JSON file, whoever has written it.

    Raises:
        DyntuneError: of the kind ``error``: it is no file of JSON, or larger, deeper or with longer numbers than any
            that is written here.
    """
    try:
        return load_json(path)
    except (ValueError, OSError) as problem:
        raise error(f"{path} is not readable JSON: {in_one_line(problem)}.") from problem


def load_json(path: Path) -> Any:
    """As ``read_json``.

    Raises:
        ValueError: see there.
        OSError: the file cannot be opened or read.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for, a device read for ever
        raise ValueError("it is no file")
    with path.open("rb") as file:
        return parse_json(file.read(LARGEST_JSON + 1))


def parse_json(text: bytes) -> Any:
    """What UTF-8 encoded JSON holds.

    Raises:
        ValueError: see ``read_json``.
    """
    if len(text) > LARGEST_JSON:
        raise ValueError(f"it has more than {LARGEST_JSON:,} bytes")
    try:
        data = json.loads(text.decode("utf-8"), parse_int=_whole_number)
    except (RecursionError, MemoryError):
        raise ValueError(f"it is nested more than {_DEEPEST} deep") from None
    level = [data]
    for _ in range(_DEEPEST):
        level = [
            item
            for holder in level
            if isinstance(holder, dict | list)
            for item in (holder.values() if isinstance(holder, dict) else holder)
        ]
        if not level:
            return data
    raise ValueError(f"it is nested more than {_DEEPEST} deep")


def sealed(data: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with the digest of its entries among them, so that a damaged one is noticed."""
    return data | {SEAL: _entries_digest(data)}


def seal_holds(data: dict[str, Any]) -> bool:
    """Whether the entries are those that were sealed; of an object without a seal nobody knows better."""
    return SEAL not in data or data[SEAL] == _entries_digest(data)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entries_digest(data: dict[str, Any]) -> str:
    """Digest of the entries but the seal, however the file is indented and in whatever order they stand."""
    entries = {key: value for key, value in data.items() if key != SEAL}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _whole_number(text: str) -> int:
    if len(text) > _LONGEST_NUMBER:
        raise ValueError(f"it has a whole number of {len(text)} digits")
    return int(text)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
