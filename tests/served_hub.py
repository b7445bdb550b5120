"""A model hub on this machine: as much of its API as the hub's client uses here."""

from __future__ import annotations

import base64
import hashlib
import json
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0" * 40


class Hub:
    """Keeps the files of repositories in memory; published ones can be fetched again."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        """Start it on a free port of this machine.

        Args:
            tls: With its certificate; None: plain HTTP.
        """
        self._tls = tls
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.file(self, with_body=False)

            def do_GET(self) -> None:
                if self.path.startswith("/api/"):
                    hub.info(self)
                else:
                    hub.file(self, with_body=True)

            def do_POST(self) -> None:
                hub.change(self)

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self._server.server_address[1]}"

    def stop(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()

    def info(self, request: BaseHTTPRequestHandler) -> None:
        """Answer what is in a repository."""
        parts = request.path.partition("?")[0].split("/")
        name = "/".join(parts[3:5])
        if name not in self.repositories:
            answer(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        files = self.repositories[name]
        if "tree" in parts:
            rows = [
                {"type": "file", "path": path, "size": len(data), "oid": oid(data)}
                for path, data in files.items()
            ]
            answer(request, 200, json.dumps(rows).encode())
            return
        about = {
            "id": name, "modelId": name, "sha": COMMIT, "private": name in self.private,
            "tags": [], "siblings": [{"rfilename": path} for path in files],
        }  # fmt: skip
        answer(request, 200, json.dumps(about).encode())

    def file(self, request: BaseHTTPRequestHandler, *, with_body: bool) -> None:
        """Answer a file, or its headers."""
        org, name, _, _, *path = request.path.partition("?")[0].strip("/").split("/")
        data = self.repositories.get(f"{org}/{name}", {}).get("/".join(path))
        if data is None:
            answer(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"ETag": f'"{oid(data)}"', "X-Repo-Commit": COMMIT}
        answer(request, 200, data, headers, with_body=with_body)

    def change(self, request: BaseHTTPRequestHandler) -> None:
        """Make a repository, say how to upload, or take a commit."""
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        parts = request.path.split("/")
        if request.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.repositories.setdefault(name, {})
            if asked.get("private") or asked.get("visibility") == "private":
                self.private.add(name)
            answer(request, 200, json.dumps({"url": f"{self.url}/{name}", "id": name}).encode())
        elif request.path.startswith("/api/validate-yaml"):
            answer(request, 200, b'{"errors": [], "warnings": []}')
        elif "preupload" in parts:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            answer(request, 200, json.dumps({"files": files}).encode())
        else:
            name = "/".join(parts[3:5])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.repositories[name][line["value"]["path"]] = content
            about = {"commitUrl": f"{self.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT}
            answer(request, 200, json.dumps(about).encode())


def oid(data: bytes) -> str:
    """Return the id of a file's content."""
    return hashlib.sha1(data).hexdigest()


def answer(
    request: BaseHTTPRequestHandler,
    status: int,
    body: bytes,
    headers: dict[str, str] | None = None,
    *,
    with_body: bool = True,
) -> None:
    """Send an answer."""
    request.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
        request.send_header(name, value)
    request.end_headers()
    if with_body:
        request.wfile.write(body)
