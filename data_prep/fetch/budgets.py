"""What the downloads share: bandwidth, room on the disk, and the patience of a server."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from urllib.parse import urlsplit


class Stopped(RuntimeError):
    """The program ends; whoever waits gives up."""


class Bandwidth:
    """Bytes a second over all downloads."""

    def __init__(self, bytes_per_s: float | None) -> None:
        """Begin with nothing owed.

        Args:
            bytes_per_s: None: no limit.
        """
        self._rate = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0

    def take(self, n_bytes: int, stop: threading.Event) -> None:
        """Wait until so many bytes may have come.

        Args:
            n_bytes: That came just now.
            stop: Ends the wait.

        Raises:
            Stopped: It was set.
        """
        if self._rate is None:
            return
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + n_bytes / self._rate
            wait = self._free_at - time.monotonic()
        if wait > 0 and stop.wait(wait):
            raise Stopped


class DiskBudget:
    """Bytes of files that may lie on the disk at once, those on their way included."""

    def __init__(self, most: int | None) -> None:
        """Begin with nothing on the disk.

        Args:
            most: Bytes; None: no limit.
        """
        self.most = most
        self.high_water = 0
        """Most bytes that were set aside at once."""
        self._held: dict[str, int] = {}
        self._coming: dict[str, int] = {}
        self._lock = threading.Lock()

    def hold(self, name: str, n_bytes: int) -> bool:
        """Set room aside for a file, or change what is set aside for it.

        Args:
            name: Of the file.
            n_bytes: All of it.

        Returns:
            Whether there is room; nothing changes where there is none.
        """
        with self._lock:
            total = sum(self._held.values()) - self._held.get(name, 0) + n_bytes
            if self.most is not None and total > self.most:
                return False
            self._held[name] = n_bytes
            self.high_water = max(self.high_water, total)
            return True

    def hold_at_least(self, name: str, n_bytes: int) -> bool:
        """Set room aside for a file, unless as much or more is set aside for it already.

        Args:
            name: Of the file.
            n_bytes: All of it, as far as is known.

        Returns:
            Whether there is room; nothing changes where there is none.
        """
        with self._lock:
            enough = self._held.get(name, -1) >= n_bytes
        return enough or self.hold(name, n_bytes)

    def expect(self, name: str, n_bytes: int, free: Callable[[], int]) -> bool:
        """Claim free bytes of the disk for what is still to come of a file.

        Without this, files that each fit would fill the disk together, and none would be whole.

        Args:
            name: Of the file.
            n_bytes: Still to come.
            free: Returns the bytes that the disk has left.

        Returns:
            Whether they are there beside what is still to come of other files.
        """
        with self._lock:
            others = sum(self._coming.values()) - self._coming.get(name, 0)
            if n_bytes > free() - others:
                return False
            self._coming[name] = n_bytes
            return True

    def came(self, name: str, n_bytes: int) -> None:
        """Count bytes that were written of a file.

        Args:
            name: Of the file.
            n_bytes: Written just now.
        """
        with self._lock:
            if name in self._coming:
                self._coming[name] = max(0, self._coming[name] - n_bytes)

    def expect_no_more(self, name: str) -> None:
        """Give back what was claimed for a file that came, or does not come now.

        Args:
            name: Of the file.
        """
        with self._lock:
            self._coming.pop(name, None)

    def release(self, name: str) -> None:
        """Give back the room of a file that is gone.

        Args:
            name: Of the file.
        """
        with self._lock:
            self._held.pop(name, None)


class Hosts:
    """When a server that asked for a pause may be asked again, for all downloads."""

    def __init__(self) -> None:
        """Begin with no pause."""
        self._until: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    def pause(self, url: str, seconds: float) -> None:
        """Let the server of an address rest.

        Args:
            url: The address.
            seconds: From now on.
        """
        host = urlsplit(url).netloc
        with self._lock:
            self._until[host] = max(self._until[host], time.monotonic() + seconds)

    def wait(self, url: str, stop: threading.Event) -> None:
        """Wait until the server of an address may be asked.

        Args:
            url: The address.
            stop: Ends the wait.

        Raises:
            Stopped: It was set.
        """
        while True:
            with self._lock:
                rest = self._until[urlsplit(url).netloc] - time.monotonic()
            if stop.is_set():
                raise Stopped
            if rest <= 0:
                return
            stop.wait(rest)
