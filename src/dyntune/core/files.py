"""Writing files so that a reader sees the old content or the new, who writes where, and reading JSON of anybody's."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dyntune.core.errors import DyntuneError, MachineError, in_one_line
from dyntune.core.limits import limit

try:
    import fcntl
except ImportError:  # there are no such locks on Windows: leftovers stay, and nobody notices a second writer
    fcntl = None  # type: ignore[assignment]

PATIENCE = 6.0
"""Seconds until a folder counts as in use: what a killed process has started may hold it for a moment."""
LARGEST_JSON = 16 * 2**20
"""Bytes of a JSON file that is read: the names of a hundred thousand classes are a tenth of it."""
_TRIES = 20
"""Temporary files that are made until one could be locked; without, where a file system refuses, as leftovers stay."""
_DEEPEST = 32
"""Objects and lists inside one another; what is written here has a handful."""
_LONGEST_NUMBER = 20
"""Characters of a whole number: those of 64 bits, with a sign."""
SEAL = "config_sha256"
"""The entry of a JSON object with the digest of all its other entries."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Has ``write`` fill a temporary file beside ``path`` and puts it in place once it is complete and on disk.

    What a killed process has left of an earlier attempt is removed.

    Raises:
        MachineError: there is no room for it, or another limit of the machine is reached; ``path`` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary: Path | None = None
    try:
        handle, temporary = _own_file_beside(path)
        with os.fdopen(handle, "rb") as held:
            write(temporary)
            with temporary.open("rb") as written:
                _lock(written.fileno())  # some libraries put a file of their own, for the owner alone, in its place
                os.fsync(written.fileno())
                temporary.chmod(stat.S_IMODE(os.fstat(held.fileno()).st_mode))
                temporary.replace(path)
    except DyntuneError:
        raise
    except Exception as error:
        words = limit(error, path.parent)
        if words is None:
            raise
        raise MachineError(f"{path} was not written: {words}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically; what is left of a file's name that is not UTF-8 is written as an escape."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_json(path: Path, data: Any) -> None:
    """Writes indented JSON atomically."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def room_beside(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path``, from which what is finished can be renamed to it.

    What killed processes have left of such folders is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    with contextlib.ExitStack() as stack:
        for _ in range(_TRIES):
            room = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)))
            with contextlib.suppress(FileNotFoundError):
                if stack.enter_context(_held(room)) and room.exists():
                    break
            stack.close()  # before it was locked, another process has taken it for a leftover
        else:
            room = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)))
        yield room


def _own_file_beside(path: Path) -> tuple[int, Path]:
    """A new temporary file, locked and open for reading, with the permissions that any new file has."""
    handle, temporary = _new_file_beside(path)
    for _ in range(_TRIES):
        if _lock(handle) and temporary.exists():
            break
        os.close(handle)  # before it was locked, another process has taken it for a leftover
        temporary.unlink(missing_ok=True)
        handle, temporary = _new_file_beside(path)
    return handle, temporary


def _new_file_beside(path: Path) -> tuple[int, Path]:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    return os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDONLY, 0o666), temporary


def remove_leftovers(path: Path) -> None:
    """Removes the temporary files and folders beside ``path`` whose writers are gone."""
    if fcntl is None:
        return
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}")  # as tempfile makes them, and files here
    try:
        found = [entry for entry in os.scandir(path.parent) if pattern.fullmatch(entry.name)]
    except OSError:
        return
    for entry in found:
        with contextlib.suppress(OSError):
            handle = os.open(entry.path, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    os.unlink(entry.path)
            finally:
                os.close(handle)


@contextlib.contextmanager
def alone_in(folder: Path, refusal: DyntuneError) -> Iterator[None]:
    """Holds ``folder``, which is made if it is not there; raises ``refusal`` where another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + PATIENCE
    with contextlib.ExitStack() as stack:
        while not stack.enter_context(_held(folder)):
            stack.close()
            if time.monotonic() > end:
                raise refusal
            time.sleep(0.1)
        yield


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """A lock on a folder for the time of the context, or False: another process has it."""
    if fcntl is None:
        yield True
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield _lock(handle)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    """Locks a file or folder until it is closed; True also where the file system knows no locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
    return True


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


def load_json(path: Path, most: int = LARGEST_JSON) -> Any:
    """As ``read_json``.

    Args:
        path: of the file.
        most: bytes that it may have.

    Raises:
        ValueError: see there.
        OSError: the file cannot be opened or read.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for, a device read for ever
        raise ValueError("it is no file")
    with path.open("rb") as file:
        return parse_json(file.read(most + 1), most)


def parse_json(text: bytes, most: int = LARGEST_JSON) -> Any:
    """What UTF-8 encoded JSON of at most so many bytes holds.

    Raises:
        ValueError: see ``read_json``.
    """
    if len(text) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    try:
        # Some editors begin a file with a mark of its encoding.
        data = json.loads(text.decode("utf-8-sig"), parse_int=_whole_number)
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
