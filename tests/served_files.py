"""A server of files on this machine that fails as object stores do: busy, cut off, away."""

from __future__ import annotations

import re
import ssl
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer:
    """Serves files by range over HTTP; `fault` tells what becomes of a request."""

    def __init__(self, files: Mapping[str, bytes], tls: ssl.SSLContext | None = None) -> None:
        """Start it on a free port of this machine.

        Args:
            files: Path below the server to content.
            tls: With its certificate; None: plain HTTP.
        """
        self._tls = tls
        self.files = files
        self.fault: Callable[[int], str] = lambda number: ""
        """From the number of a request to "", a status, "cut" (its body breaks off), "changed" (a
        byte of it is another), "hang" (until `released`) or "reset"."""
        self.released = threading.Event()
        self.requests = 0
        self.port = 0
        self._server: ThreadingHTTPServer | None = None
        self.start()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Begin to answer, on the port of before."""
        served = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                served.answer(self, with_body=False)

            def do_GET(self) -> None:
                served.answer(self, with_body=True)

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: object, client_address: object) -> None:
                """Say nothing of clients that are gone."""

        self._server = Server(("127.0.0.1", self.port), Handler)
        if self._tls is not None:
            self._server.socket = self._tls.wrap_socket(self._server.socket, server_side=True)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Stop answering: connections are refused."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def answer(self, request: BaseHTTPRequestHandler, *, with_body: bool) -> None:
        """Answer one request, or fail at it."""
        self.requests += 1
        fault = self.fault(self.requests)
        if self._server is None or fault == "reset":
            request.close_connection = True
            request.connection.close()
            return
        content = self.files.get(request.path.lstrip("/"))
        status = int(fault) if fault.isdecimal() else 404 if content is None else 200
        whole = len(content or b"")
        body = (content or b"") if status == 200 else b"reduce your rate"
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
        if status == 200 and asked:
            first, last = int(asked[1] or max(0, whole - int(asked[2]))), whole - 1
            last = int(asked[2]) if asked[1] and asked[2] else last
            body, status = body[first : last + 1], 206
        if fault == "changed" and with_body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault == "hang":
            self.released.wait(30)
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.send_header("Accept-Ranges", "bytes")
        if status == 206:
            request.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{whole}")
        if fault == "cut":
            request.close_connection = True
        request.end_headers()
        if with_body:
            request.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
