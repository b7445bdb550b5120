"""A file behind an address, read from a given byte on, and what its errors mean.

http and https go through requests, which heeds the proxies, certificates and .netrc of the user;
s3, gs, ftp and file through fsspec. An error says whether it is worth another try, and when.
"""

from __future__ import annotations

import email.utils
import ftplib
import http.client
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from data_prep.manifest.address import without_secrets

CHUNK = 1 << 18
"""Bytes of one read."""
CONNECT_S = 15.0
LONGEST_PAUSE_S = 900.0
"""A server may ask for a longer pause; it gets this one."""
_BUSY = {408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524}
_REASONS = {
    401: "the server wants a sign-in (401)",
    403: "the server refuses it (403): not public, or the address has run out",
    404: "no such file on the server (404)",
    410: "the server has it no more (410)",
}
_own = threading.local()


class FetchError(ValueError):
    """What went wrong with a file, in one line."""

    def __init__(
        self,
        reason: str,
        *,
        again: bool = True,
        wait_s: float | None = None,
        most: int | None = None,
    ) -> None:
        """Describe the failure.

        Args:
            reason: Without the address.
            again: Another try may go well.
            wait_s: Pause that the server asks for.
            most: Tries that make sense in all; None: as many as allowed.
        """
        # Libraries name the address, perhaps with a signature, and reasons are written down.
        super().__init__(without_secrets(reason))
        self.again, self.wait_s, self.most = again, wait_s, most


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """What a server sends."""

    start: int
    """Place of the first byte in the file: the one asked for, or 0."""
    total: int | None
    """Bytes of the whole file; None where the server does not say."""
    mark: str
    """ETag or time of change, which another content has not; empty where there is none."""
    stream: Any
    """Has read(bytes)."""

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes, until the server has no more.

        Raises:
            FetchError: The connection broke or fell silent.
        """
        while True:
            with translated():
                chunk = self.stream.read(CHUNK)
            if not chunk:
                return
            yield chunk


@contextmanager
def open_remote(
    url: str, *, start: int = 0, mark: str = "", silence_s: float = 60.0
) -> Iterator[Body]:
    """Open a file at a byte.

    Args:
        url: Its address.
        start: First byte wanted; the server may begin at 0 all the same.
        mark: Of the bytes before it; a server whose file has another begins at 0.
        silence_s: Longest time without a byte, in seconds.

    Raises:
        FetchError: It cannot be had now, or at all.
    """
    if url.lower().startswith(("http://", "https://")):
        with translated(), _http(url, start=start, mark=mark, silence_s=silence_s) as body:
            yield body
    else:
        with translated(), _filesystem(url, start=start, mark=mark) as body:
            yield body


@contextmanager
def _http(url: str, *, start: int, mark: str, silence_s: float) -> Iterator[Body]:
    response = get(url, headers=_range(start, mark), silence_s=silence_s)
    with response:
        status, headers = response.status_code, response.headers
        # Bytes past the end: the file is shorter than what is here.
        if status not in (200, 206):
            if status == 416:
                raise FetchError("the file on the server is another one than before", wait_s=0.0)
            raise refusal(status, headers.get("Retry-After", ""))
        kind = headers.get("Content-Type", "").split(";")[0].strip().lower()
        if kind in ("text/html", "application/xhtml+xml"):
            raise FetchError(f"the server sends a web page ({kind}), not a file of data", most=3)
        first, total = 0, _number(headers.get("Content-Length"))
        if status == 206:
            first, total = _content_range(headers.get("Content-Range", ""))
            if first not in (0, start):
                raise FetchError(f"the server sends byte {first}, asked for {start}")
        new = headers.get("ETag") or headers.get("Last-Modified") or ""
        if first and mark and new and new != mark:
            raise FetchError("the file on the server changed between two parts", wait_s=0.0)
        yield Body(start=first, total=total, mark=new, stream=_Raw(response.raw))


def get(url: str, *, headers: dict[str, str] | None = None, silence_s: float = 60.0) -> Any:
    """Return the answer to a GET, its body not yet read; one session per thread.

    Args:
        url: An http or https address.
        headers: To send besides ours.
        silence_s: Longest time without a byte, in seconds.
    """
    import requests

    if not hasattr(_own, "session"):
        _own.session = requests.Session()
        _own.session.headers["User-Agent"] = "sclong_ds fetch"
        # A body compressed on the way has neither the length nor the bytes of the file.
        _own.session.headers["Accept-Encoding"] = "identity"
    return _own.session.get(url, headers=headers, stream=True, timeout=(CONNECT_S, silence_s))


class _Raw:
    """The bytes of an answer as they come; http.client alone raises for a body that was cut."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def read(self, size: int) -> bytes:
        return bytes(self._raw.read1(size, decode_content=False))


def _range(start: int, mark: str) -> dict[str, str]:
    if not start:
        return {}
    # Of a weak ETag a server may not compare parts.
    strong = {"If-Range": mark} if mark and not mark.startswith("W/") else {}
    return {"Range": f"bytes={start}-", **strong}


def _content_range(text: str) -> tuple[int, int | None]:
    """Return first byte and bytes in all of `bytes 5-9/10`."""
    span, _, total = text.removeprefix("bytes").strip().partition("/")
    first = _number(span.partition("-")[0])
    if first is None:
        raise FetchError(f"the server sends a part and does not say which ('{text[:50]}')")
    return first, _number(total)


def _number(text: str | None) -> int | None:
    return int(text) if text and text.strip().isdecimal() else None


def refusal(status: int, retry_after: str = "") -> FetchError:
    """Return the error of an HTTP status.

    Args:
        status: Not that of a success.
        retry_after: The header of that name: seconds or a date.
    """
    if status not in _BUSY:
        reason = _REASONS.get(status, f"the server answers with status {status}")
        return FetchError(reason, again=False)
    wait = _number(retry_after)
    seconds = float(wait) if wait is not None else None
    if seconds is None and retry_after:
        try:
            when = email.utils.parsedate_to_datetime(retry_after).timestamp()
            seconds = max(when - time.time(), 0.0)
        except ValueError:
            seconds = None
    if seconds is not None:
        seconds = min(seconds, LONGEST_PAUSE_S)
    return FetchError(f"the server is busy or broken (status {status})", wait_s=seconds)


@contextmanager
def _filesystem(url: str, *, start: int, mark: str) -> Iterator[Body]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise FetchError(f"{error}", again=False) from None
    info = filesystem.info(path)
    if info.get("type") == "directory":
        raise FetchError("is a folder, not a file", again=False)
    marks = (info.get(name) for name in ("ETag", "etag", "md5Hash", "LastModified", "mtime"))
    new = next((str(value) for value in marks if value), "")
    total = info.get("size")
    first = start if mark == new and (total is None or start <= total) else 0
    with filesystem.open(path, "rb") as stream:
        stream.seek(first)
        yield Body(start=first, total=total, mark=new, stream=stream)


@contextmanager
def translated() -> Iterator[None]:
    """Give the errors of every library the form of `FetchError`.

    Raises:
        FetchError: In their place.
    """
    try:
        yield
    except FetchError:
        raise
    except FileNotFoundError as error:
        raise FetchError(f"no such file ({error})", again=False) from error
    except PermissionError as error:
        raise FetchError(f"access is refused ({error})", again=False) from error
    except ftplib.error_perm as error:
        raise FetchError(f"the server refuses it ({error})", again=False) from error
    except _foreign() as error:
        if _never(error):
            raise FetchError(_plain(error), again=False) from error
        raise FetchError(f"connection: {_plain(error)}") from error


def _foreign() -> tuple[type[BaseException], ...]:
    """Return the errors of the libraries in use that stand for a failed connection."""
    found: list[type[BaseException]] = [OSError, EOFError, ftplib.Error, http.client.HTTPException]
    for module, name in (
        ("urllib3.exceptions", "HTTPError"),
        ("requests.exceptions", "RequestException"),
        ("aiohttp", "ClientError"),
        ("botocore.exceptions", "BotoCoreError"),
        ("gcsfs.retry", "HttpError"),
    ):
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)


def _never(error: BaseException) -> bool:
    """Tell whether an error of a request would come again: an address that makes no sense."""
    names = {
        "InvalidURL",
        "MissingSchema",
        "InvalidSchema",
        "TooManyRedirects",
        "LocationParseError",
    }
    return type(error).__name__ in names | {"NoCredentialsError"}


def _plain(error: BaseException) -> str:
    """Return an error in short; those of urllib3 hold memory addresses."""
    text = " ".join(str(error).split())
    inner = getattr(error, "reason", None) or (error.args[0] if error.args else None)
    if isinstance(inner, BaseException) and inner is not error:
        text = _plain(inner)
    elif isinstance(inner, str) and len(error.args) > 1:
        text = inner
    text = text.partition(">: ")[2] if text.startswith(("<", "(<")) and ">: " in text else text
    return (text or type(error).__name__)[:200]
