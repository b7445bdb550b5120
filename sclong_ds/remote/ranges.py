"""Parts of remote files: time limits of our own, and a second request where the first is slow.

Clients of object stores wait for minutes and ask again by themselves, one try after the other, with
ten connections at a time. Here they may keep as many connections open as a rank reads with, wait as
long as is said below, and fail at once: `sclong_ds.remote.storage` decides what is asked again.

A request that takes longer than nineteen of twenty did is sent a second time, and the first answer
counts: on object storage a few requests in a thousand take seconds, and a batch waits for the
slowest one. At most one request in twenty is sent twice, so that a storage that is slow as a whole
gets no more to do.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

CONNECT_S, READ_S = 5.0, 20.0
"""Longest wait for a connection, and for the next bytes of an answer."""
SLOWEST_BYTES_S = 250_000
"""A whole answer may take READ_S and its bytes at this rate."""
CONNECTIONS = 128
_FROM_END = frozenset({"http", "https", "s3", "s3a", "gs", "gcs"})
"""Protocols whose clients ask for the last bytes of a file without its size; adlfs cannot."""
_KNOWN, _FEWEST, _QUICKEST_S = 200, 20, 0.1
_SECOND_SHARE, _SECONDS_AT_FIRST = 0.05, 2


def client_options(url: str) -> dict[str, Any]:
    """Return what fsspec is told about a URL: limits, connections, and one try for each request.

    Args:
        url: An fsspec URL; of those not known here nothing is said.
    """
    protocol = url.partition("://")[0]
    if "::" in url:
        return {}
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        limits = ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=READ_S)
        return {"client_kwargs": {**_told(protocol, "client_kwargs"), "timeout": limits}}
    if protocol in ("s3", "s3a"):
        settings = {
            "connect_timeout": CONNECT_S, "read_timeout": READ_S,
            "max_pool_connections": CONNECTIONS, "retries": {"total_max_attempts": 1},
        }  # fmt: skip
        return {"config_kwargs": settings | _told("s3", "config_kwargs")}
    return {}


def try_once(files: Any) -> None:
    """Keep a client from asking again by itself: s3fs does, up to five times and 40 s.

    Args:
        files: An fsspec file system that nothing else uses.
    """
    if type(getattr(files, "retries", None)) is int:
        files.retries = 1


class RangeRequests:
    """The range requests of a process to one file system.

    Attributes:
        asked: Requests sent, those sent a second time included.
        sent_twice: Second requests.
    """

    def __init__(self, files: Any) -> None:
        """Begin without knowing how long requests take.

        Args:
            files: An fsspec file system; one that is not asynchronous is asked as it is.
        """
        self._files = files
        self._asynchronous = bool(getattr(files, "async_impl", False) and files.loop)
        protocols = getattr(files, "protocol", ())
        protocols = {protocols} if isinstance(protocols, str) else set(protocols)
        self._from_end = self._asynchronous and bool(protocols & _FROM_END)
        self._took_s: deque[float] = deque(maxlen=_KNOWN)
        self._patience_s: float | None = None
        self.asked = self.sent_twice = 0

    def read(self, path: str, start: int, stop: int | None) -> bytes:
        """Return bytes of a file.

        Args:
            path: File of the file system.
            start: First byte; negative: counted from the end, with `stop` None.
            stop: The byte after the last.

        Raises:
            Exception: As the client does.
        """
        if start < 0 and not self._from_end:
            start = max(0, int(self._files.size(path)) + start)
        if not self._asynchronous:
            self.asked += 1
            return bytes(self._files.cat_file(path, start=start, end=stop))
        loop = self._files.loop
        return asyncio.run_coroutine_threadsafe(self._first(path, start, stop), loop).result()

    async def _first(self, path: str, start: int, stop: int | None) -> bytes:
        """Return the first answer to one request, or to two."""
        began = time.monotonic()
        waiting = {self._sent(path, start, stop)}
        everyone = set(waiting)
        try:
            done, waiting = await asyncio.wait(waiting, timeout=self._patience())
            if not done and self.sent_twice < _SECONDS_AT_FIRST + _SECOND_SHARE * self.asked:
                self.sent_twice += 1
                waiting.add(self._sent(path, start, stop))
                everyone |= waiting
            while True:
                good = [task for task in done if task.exception() is None]
                if good:
                    self._learn(time.monotonic() - began)
                    return good[0].result()
                if not waiting:
                    return next(iter(done)).result()
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in everyone:
                if task.done() and not task.cancelled():
                    task.exception()  # seen: the loop says nothing of it
                task.cancel()

    def _sent(self, path: str, start: int, stop: int | None) -> asyncio.Task[bytes]:
        self.asked += 1
        size = 0 if stop is None else stop - start
        request = self._files._cat_file(path, start=start, end=stop)
        return asyncio.ensure_future(
            asyncio.wait_for(request, CONNECT_S + READ_S + size / SLOWEST_BYTES_S)
        )

    def _patience(self) -> float | None:
        """Return the seconds after which a request is sent again; None: not known yet."""
        return self._patience_s

    def _learn(self, took_s: float) -> None:
        self._took_s.append(took_s)
        n = len(self._took_s)
        if n >= _FEWEST and (n < _KNOWN or self.asked % _FEWEST == 0):
            self._patience_s = max(_QUICKEST_S, 1.5 * sorted(self._took_s)[n * 95 // 100])


def _told(protocol: str, name: str) -> dict[str, Any]:
    """Return what the configuration of fsspec on this machine says."""
    from fsspec.config import conf

    return dict(conf.get(protocol, {}).get(name) or {})
