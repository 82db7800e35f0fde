"""Files that are written whole or not at all, what killed writers leave, and two that write to one folder."""

import errno
import multiprocessing
import os
import signal
import stat
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dyntune.core import files
from dyntune.core.errors import DyntuneError, MachineError
from dyntune.core.files import alone_in, load_json, remove_leftovers, room_beside, write_atomically, write_text

CONTEXT = multiprocessing.get_context("forkserver")
"""Not fork: what a thread of this process holds would be held for ever in the copy."""


def _full(number=errno.ENOSPC, filename=None):
    def write(path):
        path.write_text("half")
        raise OSError(number, os.strerror(number), *([filename] if filename else []))

    return write


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (_full(), "no room left on the disk in .*MB free"),
        (_full(errno.EDQUOT), "no room left"),
        (_full(errno.EFBIG), "larger than may be written"),
        (_full(errno.EMFILE), "too many files are open.*ulimit"),
        (lambda path: _raise(MemoryError()), "memory"),
        (
            lambda path: _raise(RuntimeError("PytorchStreamWriter failed writing file data/1: write failed")),
            "room",
        ),
        (lambda path: _raise(RuntimeError("I/O error: No space left on device (os error 28)")), "no room"),
    ],
)
def test_a_limit_is_one_sentence_and_what_was_there_stays(tmp_path, write, words):
    file = tmp_path / "file"
    write_text(file, "old")
    with pytest.raises(MachineError, match=f"{file} was not written: .*{words}"):
        write_atomically(file, write)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def _raise(error):
    raise error


def test_a_library_that_says_nothing_of_the_reason_is_understood_where_the_disk_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr("dyntune.core.limits._free", lambda folder: 0)
    with pytest.raises(MachineError, match="no room left"):
        write_atomically(tmp_path / "file", lambda path: _raise(RuntimeError("something failed")))


@pytest.mark.parametrize("error", [ValueError("no space for this"), PermissionError(errno.EACCES, "no"), KeyError("a")])
def test_other_errors_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error)) as caught:
        write_atomically(tmp_path / "file", lambda path: _raise(error))
    assert caught.value is error and not list(tmp_path.iterdir())


def _killed(folder):
    def write(path):
        path.write_bytes(b"x" * 1000)
        os.kill(os.getpid(), signal.SIGKILL)

    with room_beside(folder / "model") as room:
        (room / "part").write_text("a whole model")
        write_atomically(folder / "file", write)


def _writing(folder, ready):
    def write(path):
        path.write_text("slow")
        ready.set()
        time.sleep(60)

    with room_beside(folder / "model"), alone_in(folder, DyntuneError("no")):
        write_atomically(folder / "file", write)


def test_what_killed_writers_left_is_removed_by_the_next(tmp_path):
    process = CONTEXT.Process(target=_killed, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    own = tmp_path / ".file.mine"
    own.write_text("no leftover: another name")
    assert len(list(tmp_path.iterdir())) == 3
    write_text(tmp_path / "file", "new")
    with room_beside(tmp_path / "model") as room:
        assert not list(room.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".file.mine", "file"]


def test_who_is_still_writing_keeps_his_files_and_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.2)
    ready = CONTEXT.Event()
    process = CONTEXT.Process(target=_writing, args=(tmp_path, ready))
    process.start()
    try:
        assert ready.wait(120)
        write_text(tmp_path / "file", "new")
        with room_beside(tmp_path / "model"):
            pass
        kept = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
        assert sorted(name.rsplit(".", 1)[0] for name in kept) == [".file", ".model"]
        with pytest.raises(DyntuneError, match="in use"), alone_in(tmp_path, DyntuneError("in use")):
            pass
    finally:
        process.kill()
        process.join()
    with alone_in(tmp_path, DyntuneError("in use")):  # with him his lock is gone
        write_text(tmp_path / "file", "newer")


def test_what_another_takes_for_a_leftover_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    lock, times = files._lock, []

    def late(handle):
        times.append(handle)
        if len(times) in (1, 4):
            remove_leftovers(tmp_path / "file")
            remove_leftovers(tmp_path / "model")
        return lock(handle)

    monkeypatch.setattr(files, "_lock", late)
    write_text(tmp_path / "file", "whole")
    assert len(times) == 3 and (tmp_path / "file").read_text() == "whole"
    with room_beside(tmp_path / "model") as room:
        assert len(times) == 5 and [*tmp_path.glob(".model.*")] == [room]
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


def test_a_folder_that_is_gone_before_it_can_be_locked_is_made_again(tmp_path, monkeypatch):
    held, seen = files._held, []

    def late(folder):
        seen.append(folder)
        if len(seen) == 1:
            folder.rmdir()
        return held(folder)

    monkeypatch.setattr(files, "_held", late)
    with room_beside(tmp_path / "model") as room:
        assert len(seen) == 2 and [*tmp_path.iterdir()] == [room]
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux tells")
def test_where_locks_are_refused_files_are_written_without(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_lock", lambda handle: False)
    handles = len([*Path("/proc/self/fd").iterdir()])
    write_text(tmp_path / "file", "whole")
    with room_beside(tmp_path / "model") as room:
        assert {*tmp_path.iterdir()} == {room, tmp_path / "file"}
    assert [*tmp_path.iterdir()] == [tmp_path / "file"] and (tmp_path / "file").read_text() == "whole"
    assert len([*Path("/proc/self/fd").iterdir()]) == handles


def test_a_file_that_a_library_puts_in_its_place_is_locked_too(tmp_path, monkeypatch):
    def by_a_library(path):
        save_file({"weight": torch.ones(2)}, path)

    def chmod(path, mode):
        remove_leftovers(tmp_path / "weights")
        assert path.exists()

    monkeypatch.setattr(Path, "chmod", chmod)
    write_atomically(tmp_path / "weights", by_a_library)
    assert load_file(tmp_path / "weights")["weight"].tolist() == [1, 1]


def test_a_file_has_the_permissions_that_any_new_file_has(tmp_path):
    def by_a_library(path):
        path.unlink()
        path.touch(mode=0o600)

    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "text")
        write_atomically(tmp_path / "weights", by_a_library)
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "weights")] == [0o640, 0o640]


def test_one_process_may_hold_a_folder_again_after_it_let_go(tmp_path):
    for _ in range(2):
        with alone_in(tmp_path / "folder", DyntuneError("in use")):
            assert (tmp_path / "folder").is_dir()


def test_json_that_an_editor_has_marked_as_utf8_is_read(tmp_path):
    (tmp_path / "x.json").write_text('{"a": "\u00e9"}', encoding="utf-8-sig")
    assert load_json(tmp_path / "x.json") == {"a": "\u00e9"}
