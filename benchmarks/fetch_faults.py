"""Fetches made datasets from a server that fails at random, killed again and again.

    python -m benchmarks.fetch_faults [--datasets 200] [--share 0.3] [--kills 6]

A server on this machine lists datasets of 20 to 400 kB and answers a share of the requests with a
fault; some datasets are never to be had (404, 403, another length than the list says). `fetch` runs
with a disk budget of 60% of all bytes and is killed with SIGKILL at random times, then runs to its
end, then again without a budget. Prints what was asked for, what failed and why, the most bytes on
the disk beside the budget, and how many files are lost: servable, and not there byte for byte.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import h5py
import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from fault_server import FaultServer, entry, serving

from data_prep.fetch.download import STATE

FAULTS = ("404", "403", "429", "503", "cut", "cut", "html", "drop", "flipped_mark", "no_range")
"""Of the passing kind here; a 404 or 403 ends a file's tries until the next run."""
LEAST_LOOKS = 50
"""At the disk, of a trial that takes seconds."""


def main() -> None:
    """Run the trial and print its figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--datasets", type=int, default=200)
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with serving() as server, tempfile.TemporaryDirectory() as folder:
        never = make_datasets(server, args.datasets, rng)
        draw = random.Random(args.seed + 1)

        def fault(path: str, number: int) -> str:
            lost = never.get(path, "")
            if lost.isdigit():
                return lost
            return draw.choice(FAULTS) if draw.random() < args.share else ""

        server.fault = fault
        print(json.dumps(trial(server, never, Path(folder) / "raw", args.kills, rng), indent=1))


def make_datasets(server: FaultServer, number: int, rng: random.Random) -> dict[str, str]:
    """Fill the server; return the paths that are never to be had, with the reason."""
    server.listing = []
    for i in range(number):
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            values = np.random.default_rng(i).integers(0, 256, rng.randint(20_000, 400_000))
            file["X"] = values.astype(np.uint8)
        server.files[f"/{i}.h5ad"] = buffer.getvalue()
    never = dict(
        zip(rng.sample(sorted(server.files), 6), ("404", "403", "length") * 2, strict=True)
    )
    for path, data in server.files.items():
        size = len(data) + (never.get(path) == "length")
        asset = {"filetype": "H5AD", "filesize": size, "url": server.url(path)}
        server.listing.append(entry(f"d{path[1:-5]}", assets=[asset]))
    return never


def trial(
    server: FaultServer, never: dict[str, str], out: Path, kills: int, rng: random.Random
) -> dict[str, object]:
    """Fetch under kills and a budget, then without; return the figures."""
    total = sum(map(len, server.files.values()))
    budget, log, began = int(0.6 * total), "", time.monotonic()
    command = [sys.executable, "-m", "data_prep", "fetch", "--from", "cellxgene", "--parallel", "8"]
    command += ["--out", str(out), "--listing", server.url("/datasets")]
    watch = Watch(out)
    for _ in range(kills):
        process = subprocess.Popen(
            [*command, "--max-bytes", str(budget), "--max-rate", "8MB"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        timer = threading.Timer(rng.uniform(0.8, 2.5), process.kill)
        timer.start()
        log += process.communicate()[1]
        timer.cancel()
    done = subprocess.run([*command, "--max-bytes", str(budget)], capture_output=True, text=True)
    log += done.stderr
    under_budget = watch.stop()
    runs = 0
    while runs < 12:
        runs += 1
        done = subprocess.run(command, capture_output=True, text=True)
        log += done.stderr
        if f"error: {len(never)} of" in done.stderr:
            break
    wrong = [
        path
        for path, data in server.files.items()
        if path not in never and not same(out / f"d{path[1:]}", data)
    ]
    manifest = (out / "manifest.tsv").read_text()
    reasons = re.findall(r"^# not fetched: \S+ (.*)$", manifest, re.MULTILINE)
    return {
        "datasets": len(server.files),
        "requests": sum(server.requests.values()),
        "faults_made": dict(server.faults_made),
        "retried": log.count("trying again"),
        "runs": kills + 1 + runs,
        "killed": kills,
        "failed": dict(Counter(re.sub(r"\d{4,}", "N", reason) for reason in reasons)),
        "lost": len(wrong),
        "bytes": total,
        "bytes_sent": server.sent,
        "budget": budget,
        "most_on_disk_under_budget": under_budget,
        "parts_left": len(list(out.rglob("*.part"))),
        "seconds": round(time.monotonic() - began, 1),
    }


class Watch:
    """Looks every 10 ms how many bytes of files and parts lie in a folder of `fetch`."""

    def __init__(self, folder: Path) -> None:
        self._folders = (folder, folder / STATE)
        self._most, self._looks, self._end = 0, 0, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def stop(self) -> int:
        """Return the most bytes seen.

        Raises:
            RuntimeError: It looked too seldom, or ended early: the figure would mean nothing.
        """
        ended_early = not self._thread.is_alive()
        self._end.set()
        self._thread.join()
        if ended_early or self._looks < LEAST_LOOKS or not self._most:
            raise RuntimeError(f"the disk was looked at {self._looks} times, {self._most} bytes")
        return self._most

    def _look(self) -> None:
        while not self._end.wait(0.01):
            self._most = max(self._most, sum(map(bytes_in, self._folders)))
            self._looks += 1


def bytes_in(folder: Path) -> int:
    """Return the bytes of the files and parts that lie in a folder; of one that is not there, 0."""
    total = 0
    try:
        for entry in os.scandir(folder):
            if entry.name.endswith((".h5ad", ".part")):
                with contextlib.suppress(FileNotFoundError):
                    total += os.stat(entry.path).st_size
    except FileNotFoundError:
        return 0
    return total


def same(path: Path, data: bytes) -> bool:
    """Tell whether a file is there byte for byte."""
    return path.is_file() and path.read_bytes() == data


if __name__ == "__main__":
    main()
