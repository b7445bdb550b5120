"""Remote storage that is away for a while is asked again; what would be the same again is not."""

from __future__ import annotations

import errno
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from served_files import FileServer

from sclong_ds.corpus.location import Location
from sclong_ds.job import failures
from sclong_ds.remote import storage
from sclong_ds.remote.storage import WAIT_VARIABLE, ask_storage, passes

CONTENT = bytes(range(256)) * 300


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(storage, "_FIRST_PAUSE_S", 0.02)
    monkeypatch.setenv(WAIT_VARIABLE, "60")
    server = FileServer({"corpus/data.bin": CONTENT})
    yield server
    server.stop()


@pytest.mark.thorough
@pytest.mark.parametrize("fault", ["503", "500", "429", "cut", "reset"])
def test_a_request_that_fails_in_passing_is_repeated(
    server: FileServer, tmp_path: Path, fault: str
) -> None:
    server.fault = lambda number: fault if number < 3 else ""
    folder = Location(f"{server.url}/corpus", cache_dir=tmp_path, version="1")
    reads: list[tuple[Callable[[], object], object]] = [
        (lambda: folder.read_range("data.bin", 300, 5000), CONTENT[300:5300]),
        (lambda: folder.read_bytes("data.bin"), CONTENT),
        (lambda: folder.exists("data.bin"), True),
        (lambda: folder.exists("none"), False),
        (lambda: folder.local_path("data.bin").read_bytes(), CONTENT),
    ]
    for read, expected in reads:
        server.requests = 0
        assert read() == expected
        # What is asked for without a body cannot be cut.
        assert server.requests >= (3 if expected == CONTENT or fault != "cut" else 1)


def test_a_server_that_comes_back_is_waited_for(server: FileServer) -> None:
    folder = Location(f"{server.url}/corpus")
    assert folder.read_range("data.bin", 0, 10) == CONTENT[:10]
    server.stop()
    threading.Timer(0.3, server.start).start()
    assert folder.read_range("data.bin", 10, 10) == CONTENT[10:20]


@pytest.mark.parametrize("fault", ["503", "reset", "away"])
def test_after_the_deadline_a_training_ends_with_71(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setenv(WAIT_VARIABLE, "0.1")
    folder = Location(f"{server.url}/corpus", cache_dir=tmp_path, version="1")
    server.fault = lambda number: fault
    if fault == "away":
        server.stop()
    said = r"corpus/data\.bin: cannot be read .*given up after"
    for read in (
        lambda: folder.read_range("data.bin", 0, 9),
        lambda: folder.local_path("data.bin"),
        lambda: folder.exists("data.bin"),
    ):
        with pytest.raises(TimeoutError, match=said) as met:
            read()
        assert failures.report(met.value, None) == 71
        assert failures.passes(ValueError(f"rank 3: {met.value}"))
    assert not [path for path in tmp_path.rglob("*.bin*") if path.suffix != ".lock"]


@pytest.mark.parametrize(("fault", "kind"), [("403", OSError), ("404", FileNotFoundError)])
def test_what_would_be_refused_again_is_asked_once(
    server: FileServer, fault: str, kind: type[OSError]
) -> None:
    server.fault = lambda number: fault
    folder = Location(f"{server.url}/corpus")
    with pytest.raises(kind, match=r"corpus/data\.bin") as met:
        folder.read_range("data.bin", 0, 10)
    assert server.requests == 1
    assert failures.report(met.value, None) == 1


class ClientError(Exception):
    """As botocore's."""

    def __init__(self, status: int) -> None:
        super().__init__(f"An error occurred ({status})")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


class HTTPClientError(Exception):
    """As botocore's, of which EndpointConnectionError is one."""


class NoCredentialsError(Exception):
    """As botocore's."""


def caused(error: OSError, cause: Exception) -> OSError:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ClientError(503), True),
        (ClientError(403), False),
        (caused(OSError(errno.EBUSY, "SlowDown"), ClientError(503)), True),
        # s3fs gives the number of a failed disk to every answer that it does not know.
        (caused(OSError(errno.EIO, "InvalidRequest"), ClientError(400)), False),
        (OSError(errno.EIO, "internal error"), True),
        (HTTPClientError("Could not connect to the endpoint"), True),
        (NoCredentialsError("Unable to locate credentials"), False),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (PermissionError("Forbidden"), False),
        (caused(OSError("cannot connect"), ssl.SSLCertVerificationError("self-signed")), False),
        (OSError(errno.ENOSPC, "no space left"), False),
        (RuntimeError("the client's own kind of error"), False),
    ],
)
def test_what_passes_is_told_by_status_number_and_class(error: Exception, expected: bool) -> None:
    assert passes(error) is expected


@pytest.mark.parametrize("given", ["5min", "-1", "nan", "inf"])
def test_wait_that_is_no_number_of_seconds_is_named(monkeypatch, given):
    monkeypatch.setenv(WAIT_VARIABLE, given)
    with pytest.raises(ValueError, match=f"{WAIT_VARIABLE} is '{given}', must be seconds"):
        ask_storage("s3://b", lambda: None)
