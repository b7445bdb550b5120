"""A small object store on this machine: files of a folder by range, with delays and faults.

    python -m benchmarks.object_store FOLDER CONTROL.json     (prints its port; ends with stdin)

Answers GET and HEAD of `/bucket/KEY` as S3 and plain HTTP servers do, from FOLDER/KEY. CONTROL.json
is read again at most every 0.1 s: `{"delay": 0.05, "busy": 0.05, "cut": 0.03, "slow": 0.01,
"denied": 0}` are the seconds before an answer and the shares of requests that are answered 503,
whose body breaks off, that take 20 delays and 2 s longer, and that are answered 403.
`GET /__stats` returns what was asked for.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

_RANGE = re.compile(rb"\r\nrange: *bytes=(\d*)-(\d*)", re.IGNORECASE)


class ObjectStore:
    """The folder that is served, what is to go wrong, and what was asked for."""

    def __init__(self, folder: Path, control: Path) -> None:
        """Begin with counts of 0.

        Args:
            folder: Folder of the objects.
            control: JSON file with the delay and the faults.
        """
        self._folder, self._control = folder, control
        self._told: dict[str, float] = {}
        self._read_at = -1.0
        self._random = random.Random(0)
        self.stats = {"requests": 0, "heads": 0, "busy": 0, "cut": 0, "slow": 0, "denied": 0}
        self.stats["bytes"] = 0

    def _wish(self, name: str) -> float:
        if time.monotonic() - self._read_at > 0.1:
            self._told, self._read_at = json.loads(self._control.read_bytes()), time.monotonic()
        return float(self._told.get(name, 0.0))

    def _happens(self, fault: str) -> bool:
        happens = self._random.random() < self._wish(fault)
        self.stats[fault] += happens
        return happens

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of a connection."""
        try:
            while await self._answer(await reader.readuntil(b"\r\n\r\n"), writer):
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, request: bytes, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False: the connection ends."""
        method, path, _ = request.split(b" ", 2)
        if path == b"/__stats":
            writer.write(_head(200, len(text := json.dumps(self.stats).encode())) + text)
            return True
        self.stats["requests"] += 1
        self.stats["heads"] += method == b"HEAD"
        slow = self._happens("slow")
        await asyncio.sleep(self._wish("delay") * (21 if slow else 1) + 2 * slow)
        if self._happens("busy"):
            writer.write(_head(503, 0))
            return True
        if self._happens("denied"):
            writer.write(_head(403, 0))
            return True
        file = self._folder / path.decode().split("?")[0].split("/", 2)[2]
        if not file.is_file():
            writer.write(_head(404, 0))
            return True
        start, stop, size, status = 0, 0, file.stat().st_size, 200
        stop = size
        if asked := _RANGE.search(request):
            first, last = asked[1], asked[2]
            start = int(first) if first else max(0, size - int(last))
            stop = min(size, int(last) + 1) if first and last else size
            status = 206
        extra = f"Content-Range: bytes {start}-{stop - 1}/{size}\r\n" if status == 206 else ""
        writer.write(_head(status, stop - start, extra))
        if method == b"HEAD":
            return True
        with file.open("rb") as content:
            content.seek(start)
            body = content.read(stop - start)
        cut = self._happens("cut")
        writer.write(body[: len(body) // 2] if cut else body)
        self.stats["bytes"] += len(body)
        if cut:
            await writer.drain()
        return not cut


def _head(status: int, length: int, extra: str = "") -> bytes:
    return (
        f"HTTP/1.1 {status} X\r\nContent-Length: {length}\r\nAccept-Ranges: bytes\r\n"
        f'ETag: "1"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n{extra}\r\n'
    ).encode()


async def _main(folder: Path, control: Path) -> None:
    store: Any = ObjectStore(folder, control)
    server = await asyncio.start_server(store.serve, "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    # Ends with the process that started it.
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), Path(sys.argv[2])))
