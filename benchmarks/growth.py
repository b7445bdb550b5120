"""Growth of a corpus by a part, beside a finalize of all datasets: seconds, bytes, peak of disk.

    python -m benchmarks.growth --out FOLDER [--cells N] [--datasets N] [--new N] [--json OUT]

Stages datasets of made cells (2,000 genes each). One folder is finalized with all of them; another
without the last ones, and again when they have come, which adds a part. Counts the bytes that files
of before have changed, and the most that the folder took while the command ran, staging aside,
looked at every 50 ms.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.environment import write_result
from benchmarks.finalize_tasks import stage
from data_prep.corpus.finalize import finalize

N_CELLS, N_DATASETS, N_NEW = 44_000, 11, 1
LOOK_S = 0.05


def disk_bytes(folder: Path) -> int:
    """Return the bytes of all files but those of staging; one with two names counts once."""
    sizes = {}
    # os.walk passes over what is gone meanwhile.
    for place, folders, names in os.walk(folder):
        if Path(place) == folder and "staging" in folders:
            folders.remove("staging")
        for name in names:
            with suppress(FileNotFoundError):
                about = os.stat(os.path.join(place, name))
                sizes[about.st_ino] = about.st_size
    return sum(sizes.values())


def measured(folder: Path) -> dict[str, Any]:
    """Finalize a folder; return seconds, CPU seconds, and the peak of its disk."""
    peak, over = disk_bytes(folder), threading.Event()

    def look() -> None:
        nonlocal peak
        while not over.wait(LOOK_S):
            peak = max(peak, disk_bytes(folder))

    watcher = threading.Thread(target=look)
    watcher.start()
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    finalize(folder)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    over.set()
    watcher.join()
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    size = disk_bytes(folder)
    return {"wall_s": wall, "cpu_s": cpu, "peak_bytes": max(peak, size), "bytes": size}


def products(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every finished file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
        and path.relative_to(folder).parts[0] not in ("staging", "ledger", ".locks")
    }


def without(corpus: Path, other: Path, names: set[str]) -> None:
    """Copy what is staged, without some datasets."""
    shutil.copytree(
        corpus, other, ignore=lambda _, found: [n for n in found if n.partition(".")[0] in names]
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="scratch folder, must not exist")
    parser.add_argument("--cells", type=int, default=N_CELLS)
    parser.add_argument("--datasets", type=int, default=N_DATASETS)
    parser.add_argument("--new", type=int, default=N_NEW, help="datasets that come later")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    everything, grown = args.out / "all", args.out / "grown"
    stage(everything, n_cells=args.cells, n_datasets=args.datasets)
    new = {f"made{number}" for number in range(args.datasets - args.new, args.datasets)}
    without(everything, grown, new)
    at_once, first = measured(everything), measured(grown)
    before = products(grown)
    for name in sorted(new):
        shutil.copytree(everything / "staging" / name, grown / "staging" / name)
        shutil.copyfile(everything / "ledger" / f"{name}.json", grown / "ledger" / f"{name}.json")
    growth = measured(grown)
    after = products(grown)
    changed = sorted(name for name, digest in before.items() if after.get(name) != digest)
    rewritten = sum((grown / n).stat().st_size for n in changed if n.startswith(("cells", "obs")))
    for name, row in (("all at once", at_once), ("before", first), ("growth", growth)):
        print(
            f"{name:12} {row['wall_s']:7.1f} s, {row['cpu_s']:7.1f} CPU s, "
            f"{row['bytes'] / 1e6:8.1f} MB, peak {row['peak_bytes'] / 1e6:8.1f} MB"
        )
    ratio = growth["cpu_s"] / at_once["cpu_s"]
    peak = growth["peak_bytes"] / growth["bytes"]
    print(
        f"growth takes {ratio:.2f} of the CPU time of a finalize of all, its peak is {peak:.2f} "
        f"times the corpus; bytes of cells rewritten: {rewritten}; changed: {', '.join(changed)}"
    )
    result = {
        "cells": args.cells, "datasets": args.datasets, "new": args.new, "at_once": at_once,
        "first": first, "growth": growth, "rewritten_bytes": rewritten, "changed": changed,
    }  # fmt: skip
    if args.json:
        write_result(args.json, "growth", result)


if __name__ == "__main__":
    main()
