"""Stopping a run from outside: the first Ctrl-C or SIGTERM lets the running step end, so that nothing is lost."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from dyntune.core.errors import TrainingError


class TrainingInterrupted(TrainingError):
    """The user, or the system, asked a run to stop; its state is saved."""


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the running step; a second one acts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
