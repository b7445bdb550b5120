"""A headless Chromium, driven through its debugging pipe: open a page, ask it, take its picture."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
"""The program; None: not installed."""


class Browser:
    """One page of a browser.

    Args:
        width: Width of the window, pixels.
    """

    def __init__(self, *, width: int = 1500) -> None:
        assert CHROMIUM is not None
        self.requested: list[str] = []
        """URLs that pages have asked for."""
        self.errors: list[str] = []
        """What went wrong in the pages' scripts."""
        self._width, self._last_id, self._left = width, 0, b""
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        options = (
            "--headless --no-sandbox --disable-gpu --hide-scrollbars --disable-dev-shm-usage "
            f"--remote-debugging-pipe --user-data-dir={self._profile.name} about:blank"
        )
        self._process = subprocess.Popen(
            ["bash", "-c", f"exec {CHROMIUM} {options} 3<&{theirs_in} 4>&{theirs_out}"],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self._call(f"{domain}.enable")
        self._resize(1200)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def open(self, url: str) -> None:
        """Go to a page."""
        self._call("Page.navigate", url=url)

    def ask(self, script: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        return answer["result"].get("value")

    def wait_until(self, script: str, *, seconds: float = 120) -> None:
        """Wait until an expression is true in the page."""
        deadline = time.monotonic() + seconds
        while not self.ask(script):
            text = str(self.ask("document.body ? document.body.innerText : ''"))
            assert time.monotonic() < deadline, f"never: {script}\n{text[-3000:]}"
            time.sleep(0.3)

    def text(self) -> str:
        """Return the text that the page shows."""
        return str(self.ask("document.body.innerText"))

    def picture(self, path: Path, *, height: int | None = None) -> Path:
        """Write what the page looks like as PNG, from its top; None: the whole page."""
        self._resize(height or int(self.ask("document.documentElement.scrollHeight")))
        data = self._call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))
        return path

    def _resize(self, height: int) -> None:
        self._call(
            "Emulation.setDeviceMetricsOverride", width=self._width, height=height,
            deviceScaleFactor=1, mobile=False,
        )  # fmt: skip

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": params}
        if not method.startswith("Target."):
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last_id:
                assert "error" not in answer, answer
                return answer["result"]
            if answer.get("method") == "Network.requestWillBeSent":
                self.requested.append(answer["params"]["request"]["url"])
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(answer["params"])[:500])

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            block = os.read(self._in, 1 << 20)
            assert block, "the browser has ended"
            self._left += block
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)
