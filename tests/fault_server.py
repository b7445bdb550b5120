"""A server on this machine that lists and sends files, and does it wrongly on demand."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = (
    *("404", "403", "429", "503", "cut", "trickle", "silent", "html", "no_range", "late_range"),
    *("no_length", "drop", "flipped_mark", "weak"),
)
"""Statuses, and: the body ends early; it comes byte by byte; it does not come; a web page; the
range is ignored; the range begins elsewhere; the length is not told; the connection is closed
before an answer; the ETag differs from one request to the next; the ETag is weak."""


@dataclass
class FaultServer:
    """What is served, and what goes wrong."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    """By path, as /a.h5ad."""
    listing: Any = None
    """JSON of /datasets, or bytes."""
    pages: int = 0
    """Entries a page of the listing; 0: all."""
    fault: Callable[[str, int], str] = lambda path, number: ""
    """Returns the fault of the n-th request (from 0) for a path; empty for none."""
    cut_at: float = 0.5
    """Share of the body that comes before a cut."""
    retry_after: str = "0"
    needs: str = ""
    """What the query of a file must hold; others are refused with 403."""
    requests: Counter[str] = field(default_factory=Counter)
    """By path."""
    ranges: list[str] = field(default_factory=list)
    sent: int = 0
    faults_made: Counter[str] = field(default_factory=Counter)
    lock: Any = field(default_factory=threading.Lock)

    def url(self, path: str) -> str:
        return self.address + path


@contextmanager
def serving() -> Iterator[FaultServer]:
    """Serve on a free port until the block ends."""
    state = FaultServer()

    class Handler(_Handler):
        shared = state

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Say nothing of clients that hang up."""

    server = Server(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    shared: FaultServer

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        shared, path = self.shared, self.path.partition("?")[0]
        with shared.lock:
            number = shared.requests[path]
            shared.requests[path] += 1
            fault = shared.fault(path, number)
            shared.faults_made[fault] += 1
            shared.ranges.append(self.headers.get("Range", ""))
        if fault == "drop":
            self.close_connection = True
            return
        if fault.isdigit():
            self._answer(int(fault), b"no", {"Retry-After": shared.retry_after})
        elif fault == "html":
            self._answer(200, b"<html>maintenance</html>", {"Content-Type": "text/html"})
        elif path == "/datasets":
            self._list()
        elif shared.needs not in self.path.partition("?")[2]:
            self._answer(403, b"no signature", {})
        elif path not in shared.files:
            self._answer(404, b"no such file", {})
        else:
            self._file(shared.files[path], fault, number)

    def _list(self) -> None:
        shared, headers = self.shared, {"Content-Type": "application/json"}
        found = shared.listing
        if isinstance(found, bytes):
            self._answer(200, found, headers)
            return
        if shared.pages:
            first = int(self.path.partition("from=")[2] or 0)
            if first + shared.pages < len(found):
                headers["Link"] = f'</datasets?from={first + shared.pages}>; rel="next"'
            found = found[first : first + shared.pages]
        self._answer(200, json.dumps(found).encode(), headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _file(self, body: bytes, fault: str, number: int) -> None:
        mark = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        if fault == "flipped_mark":
            mark = f'"{number}"'
        first, wanted = 0, self.headers.get("Range")
        valid = self.headers.get("If-Range") in (None, mark)
        if wanted and fault != "no_range" and valid:
            first = int(wanted.removeprefix("bytes=").partition("-")[0])
            if first >= len(body):
                self._answer(416, b"", {"Content-Range": f"bytes */{len(body)}"})
                return
            first = max(first - 3, 1) if fault == "late_range" else first
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        self.send_header("ETag", f"W/{mark}" if fault == "weak" else mark)
        rest = body[first:]
        if fault == "no_length":
            self.close_connection = True
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self._send(rest, fault)

    def _send(self, rest: bytes, fault: str) -> None:
        if fault in ("cut", "silent"):
            rest = rest[: int(len(rest) * self.shared.cut_at)]
        step = 1 if fault == "trickle" else 1 << 16
        for place in range(0, len(rest), step):
            with self.shared.lock:
                self.shared.sent += len(rest[place : place + step])
            self.wfile.write(rest[place : place + step])
            if fault == "trickle":
                self.wfile.flush()
                time.sleep(0.02)
        if fault == "silent":
            self.wfile.flush()
            time.sleep(1.0)
        if fault in ("cut", "silent"):
            self.close_connection = True


def entry(name: str, **changes: Any) -> dict[str, Any]:
    """Return an entry as the curation API writes it, cut to what is read."""
    fields = {
        "dataset_id": name,
        "dataset_version_id": f"{name}-v1",
        "collection_id": "c1",
        "collection_doi": "10.1/2",
        "title": " A  title\n",
        "citation": "Publication: https://doi.org/10.1/2",
        "organism": [{"label": "Homo sapiens", "ontology_term_id": "NCBITaxon:9606"}],
        "tissue": [{"label": "lung", "ontology_term_id": "UBERON:0002048"}],
        "assay": [{"label": "10x 3' v3", "ontology_term_id": "EFO:0009922"}],
        "disease": [{"label": "normal", "ontology_term_id": "PATO:0000461"}],
        "suspension_type": ["cell"],
        "cell_count": 100,
        "primary_cell_count": 60,
        "assets": [
            {"filetype": "RDS", "filesize": 1, "url": "https://x/a.rds"},
            {"filetype": "H5AD", "filesize": 1234, "url": f"https://x/{name}-v1.h5ad"},
        ],
    } | changes
    return {key: value for key, value in fields.items() if value != "absent"}
