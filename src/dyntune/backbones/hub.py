"""Hugging Face's hub: whether it can be reached, which is found out quickly, and its cache alone where it cannot."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

PATIENCE = float(os.environ.get("DYNTUNE_HUB_PATIENCE", 2.0))
"""Seconds in which a connection must come about; without a network huggingface_hub tries for most of a minute."""
_REMEMBERED = 30.0
"""Seconds for which an answer holds: one command asks for several files."""
_known: tuple[float, bool] | None = None
_lock = threading.Lock()
_alone = 0
"""How many are inside ``cache_alone``, perhaps in several threads."""
_outside = False
"""Whether the hub was not to be asked before the first of them came."""


@contextlib.contextmanager
def quickly() -> Iterator[str | None]:
    """What is asked of the hub inside comes from its cache, or fails at once, where the hub cannot be reached.

    Yields:
        Why that is so, for people; None where the hub answers, or the user has said that it is not to be asked.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _reachable(constants.ENDPOINT):
        yield None
        return
    with cache_alone():
        host = urlsplit(constants.ENDPOINT).hostname
        yield f"{host} cannot be reached (tried for {PATIENCE:g} s), and the cache does not have it"


@contextlib.contextmanager
def cache_alone() -> Iterator[None]:
    """What is asked of the hub inside comes from its cache, or fails at once."""
    global _alone, _outside
    from huggingface_hub import constants

    with _lock:
        if not _alone:
            _outside = constants.HF_HUB_OFFLINE
        _alone += 1
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        with _lock:
            _alone -= 1
            if not _alone:
                constants.HF_HUB_OFFLINE = _outside


def downloads() -> bool:
    """Whether files of other places than the hub may be fetched: not inside ``cache_alone``."""
    return _alone == 0


def _reachable(endpoint: str) -> bool:
    """Whether the hub, or the proxy in front of it, takes a connection."""
    global _known
    now = time.monotonic()
    if _known is None or now - _known[0] > _REMEMBERED:
        _known = now, _connects(endpoint)
    return _known[1]


def _connects(endpoint: str) -> bool:
    address = urlsplit(endpoint)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(address.hostname or ""):
        address = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    place = address.hostname or "", address.port or (80 if address.scheme == "http" else 443)
    connected, ended = threading.Event(), threading.Event()

    def connect(address: tuple[Any, ...]) -> None:
        with contextlib.suppress(OSError):
            socket.create_connection(address[:2], PATIENCE).close()
            connected.set()
            ended.set()

    def look_up() -> None:
        with contextlib.suppress(OSError):
            found = {entry[4] for entry in socket.getaddrinfo(*place, type=socket.SOCK_STREAM)}
            # All at once: one of several may lead nowhere, as where IPv6 is only half set up.
            attempts = [threading.Thread(target=connect, args=(address,), daemon=True) for address in found]
            for attempt in attempts:
                attempt.start()
            for attempt in attempts:
                attempt.join()
        ended.set()

    # Looking a name up takes as long as it likes, which no timeout of a socket changes.
    threading.Thread(target=look_up, daemon=True).start()
    ended.wait(PATIENCE)
    return connected.is_set()
