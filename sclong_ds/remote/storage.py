"""Remote storage that is away for a while: ask again with longer and longer pauses, to a deadline.

What passes: no answer, a connection that breaks, a body that is cut, and the statuses 408, 425, 429
and 5xx. Everything else (403, 404, an unknown bucket, a wrong certificate) would be the same again
and is said at once. After the deadline the error has the number ETIMEDOUT, by which a training ends
with status 71 (`sclong_ds.job.failures`) and its job is started again. Clients of object stores
have error classes of their own and are not imported here: the classes are known by their names.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

WAIT_VARIABLE = "SCLONG_STORAGE_WAIT_S"
"""Seconds for which a request is repeated; 0: not at all."""
_WAIT_S = 300.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_NOTICE_S = 30.0
_PASSING_STATUSES = frozenset({408, 425, 429, *range(500, 600)}) - {501, 505}
_PASSING_NUMBERS = frozenset(
    {
        errno.EBUSY, errno.EAGAIN, errno.EIO, errno.EPIPE, errno.ETIMEDOUT, errno.ECONNRESET,
        errno.ECONNREFUSED, errno.ECONNABORTED, errno.EHOSTDOWN, errno.EHOSTUNREACH,
        errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET,
    }
)  # fmt: skip
_PASSING_CLASSES = frozenset(
    {
        "CutError", "TimeoutError", "ConnectionError", "ClientConnectionError",
        "ClientPayloadError", "HTTPClientError", "IncompleteRead", "IncompleteReadError",
        "ResponseStreamingError", "ProtocolError", "ChunkedEncodingError", "FSTimeoutError",
    }
)  # fmt: skip
"""Of aiohttp, botocore, urllib3, requests, http.client, fsspec and Python itself."""
_LASTING_CLASSES = frozenset(
    {
        "ClientConnectorCertificateError", "ClientSSLError", "ClientConnectorSSLError", "SSLError",
        "SSLCertVerificationError", "InvalidURL",
    }
)  # fmt: skip

T = TypeVar("T")
log = logging.getLogger(__name__)
_said = -_NOTICE_S
_said_lock = threading.Lock()


class CutError(OSError):
    """Less arrived than the server holds."""


def ask_storage(where: str, attempt: Callable[[], T], *, first_pause_s: float | None = None) -> T:
    """Return what an attempt gives, after as many as the deadline allows.

    Args:
        where: URL that is asked for.
        attempt: Asks once; must be harmless to repeat.
        first_pause_s: Pause before the second attempt; None: half a second.

    Raises:
        FileNotFoundError: There is no such file.
        TimeoutError: The storage failed in a way that passes, until the deadline.
        OSError: It failed in another way.
        ValueError: The URL is of no use, as the attempt raises it; or WAIT_VARIABLE is no number.
    """
    wait_s = _wait_s()
    began, pause_s = time.monotonic(), first_pause_s or _FIRST_PAUSE_S
    while True:
        try:
            return attempt()
        except UnusableUrlError:
            raise
        except Exception as error:
            # Clients of object stores have error classes of their own, some of them no OSError;
            # and some say "not found" of what they could not ask for.
            text = f"{where}: cannot be read ({type(error).__name__}: {error})"
            if not passes(error):
                if isinstance(error, FileNotFoundError):
                    raise FileNotFoundError(f"{where}: no such file") from error
                raise _named(error, text) from error
            waited_s = time.monotonic() - began
            if waited_s + pause_s > wait_s:
                raise TimeoutError(
                    errno.ETIMEDOUT, f"{text}; given up after {waited_s:.0f} s"
                ) from error
            _say(f"{text}; asked again for up to {wait_s - waited_s:.0f} s")
        # All ranks of a job run into the same trouble: they must not come back together.
        time.sleep(pause_s * random.uniform(0.5, 1.0))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _wait_s() -> float:
    given = os.environ.get(WAIT_VARIABLE)
    try:
        found = float(given) if given else _WAIT_S
    except ValueError:
        found = -1.0
    if not 0 <= found < math.inf:
        raise ValueError(f"{WAIT_VARIABLE} is '{given}', must be seconds, such as 300; 0: no wait")
    return found


class UnusableUrlError(ValueError):
    """A URL that no storage answers to."""


def passes(error: BaseException) -> bool:
    """Tell whether storage that failed so may be well again soon.

    Args:
        error: What a client raised; what caused it counts too.
    """
    chain = list(_chain(error))
    names = [{cls.__name__ for cls in type(link).__mro__} for link in chain]
    if any(found & _LASTING_CLASSES for found in names):
        return False
    for link, found in zip(chain, names, strict=True):
        status = _status(link)
        if found & _PASSING_CLASSES:
            return True
        if status is not None:
            return status in _PASSING_STATUSES
    if isinstance(error, FileNotFoundError | PermissionError):
        return False
    return any(isinstance(link, OSError) and link.errno in _PASSING_NUMBERS for link in chain)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what caused it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an error of a client names."""
    response = getattr(error, "response", None)
    found = [getattr(error, "status", None)]
    if found == [None]:
        found.append(getattr(error, "code", None))
    if isinstance(response, dict):  # botocore
        found.insert(0, response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    found.append(getattr(response, "status_code", None))
    for status in found:
        if isinstance(status, int | str) and str(status).isdecimal() and 100 <= int(status) < 600:
            return int(status)
    return None


def _named(error: Exception, text: str) -> OSError:
    """Return an OSError with another text; the error number, if any, gives its class."""
    number = error.errno if isinstance(error, OSError) else None
    return OSError(text) if number is None else OSError(number, text)


def _say(text: str) -> None:
    """Log a line, of all threads one in half a minute."""
    global _said
    with _said_lock:
        now = time.monotonic()
        if now - _said < _NOTICE_S:
            return
        _said = now
    log.warning("%s", text)
