"""The loader beside other loaders, on the same cells, in one run, with the claims as gates.

    python -m benchmarks.loader --work FOLDER --peers-python PATH [--cells N] [--json OUT]
    python -m benchmarks.loader --work FOLDER --make-peers
    python -m benchmarks.loader --work FOLDER --tiny

Makes the stores in FOLDER (`benchmarks.loader_prepare`), checks that every contender delivers every
source cell as it is, and times all of them in turn on one core: medians of the rounds, cells a
second of CPU time and of wall time (`benchmarks.loader_race`). Batches that can be kept (owned) are
compared with batches that can be kept, those that the next one overwrites (borrowed) with such
ones. Then, on all cores, with batches made ahead, cells a second of wall time. Also: bytes a
non-zero value, cost of conversion, waits of a pretended training step, reading from disk, exact
resume, and the same order on 1, 2 and 4 ranks.

The other loaders need Python 3.12 or newer with `annbatch[zarrs]==0.3.1 numba psutil`;
`--make-peers` installs them to FOLDER/peers with the python3.12 on the path. scDataset,
bionemo-scdl and torch are measured as well where that Python has them. Without such a Python only
our loader is measured. --tiny is a check that the benchmark works: its times say nothing and are
not judged.

Exit status 1 when a gate fails.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import write_result
from benchmarks.loader_prepare import environ, prepare

PEERS = ("annbatch[zarrs]==0.3.1", "numba", "psutil")
DEFAULT, LZ4, ZSTD, PLAIN = (
    "annbatch f32 lz4 (default)",
    "annbatch u16 lz4",
    "annbatch u16 zstd",
    "annbatch u16 uncompressed",
)
OWN_ZSTD, OWN_PLAIN = "own zstd", "own uncompressed"
FULL = {"n_cells": 40_000, "rounds": 7, "batch": 256, "conversions": 3, "stall_epochs": 3,
        "npz_cells": 5_000, "h5ad_cells": 2_000}  # fmt: skip
TINY = {"n_cells": 600, "rounds": 2, "batch": 64, "conversions": 1, "stall_epochs": 1,
        "npz_cells": 64, "h5ad_cells": 64}  # fmt: skip
log = logging.getLogger("loader")


@dataclass(frozen=True, slots=True)
class Gate:
    """One claim and what was measured."""

    claim: str
    value: float | None
    """None: not measured."""
    passed: bool | None
    """None: not judged."""


def best(
    rows: list[dict[str, Any]], kind: str, name: str, *, owned: bool | None = None
) -> float | None:
    """Return the cells a CPU-second of the fastest settings of the stores that a name begins.

    Args:
        rows: Of the race.
        kind: packed, sparse, dense or ready.
        name: Beginning of the stores' names.
        owned: Batches that can be kept, those that cannot, or (None) both.
    """
    rates = [
        row["cells_per_cpu_s"]
        for row in rows
        if row["kind"] == kind
        and row["name"].startswith(name)
        and (owned is None or row["owned"] is owned)
    ]
    return max(rates, default=None)


def fastest_peer(rows: list[dict[str, Any]], kind: str, *, owned: bool) -> float | None:
    """Return the cells a CPU-second of the fastest of all other loaders."""
    rates = [best(rows, kind, name, owned=owned) for name in ("annbatch", "scDataset", "bionemo")]
    return max((rate for rate in rates if rate is not None), default=None)


def gates(result: dict[str, Any], *, timed: bool) -> list[Gate]:
    """Return the claims about the loader.

    Args:
        result: All figures.
        timed: Judge those that depend on time.
    """
    rows, stores = result["race"], result["stores"]

    def ratio(ours: float | None, theirs: float | None) -> float | None:
        return None if ours is None or theirs is None else ours / theirs

    def at_least(claim: str, value: float | None, least: float) -> Gate:
        judged = timed and value is not None
        return Gate(f"{claim} >= {least}", value, value >= least if judged else None)  # type: ignore[operator]

    def against_all(kind: str, *, owned: bool) -> float | None:
        ours = best(rows, kind, "own", owned=owned)
        return ratio(ours, fastest_peer(rows, kind, owned=owned))

    sparse = best(rows, "sparse", OWN_ZSTD, owned=True)
    disk = ratio(stores[OWN_ZSTD]["bytes_per_value"], stores.get(LZ4, {}).get("bytes_per_value"))
    worst = max(
        row["worst_ms"]
        for row in result["stall"]
        if row["name"].startswith(OWN_ZSTD) and row["step_ms"] == 10
    )
    whole = [
        ("every source cell, once, from every contender", True),
        ("resumed = unbroken, cells and counts", result["resume"]["same"]),
        ("the same order on 1, 2 and 4 ranks", result["ranks"]["same"]),
        ("an epoch holds every cell once", result["ranks"]["complete"]),
    ]
    exact = f"{LZ4}, 256"  # the name of another store begins with that of LZ4
    lz4 = [row for row in rows if not row["name"].startswith(exact)]
    return [
        at_least("model-ready, borrowed / the fastest other", against_all("ready", owned=False), 2),
        at_least("model-ready, owned / the fastest other", against_all("ready", owned=True), 2),
        at_least("sparse, owned / the fastest other", against_all("sparse", owned=True), 1),
        at_least("sparse zstd, owned / u16 lz4", ratio(sparse, best(lz4, "sparse", LZ4)), 0.9),
        at_least("sparse zstd, owned / u16 zstd", ratio(sparse, best(rows, "sparse", ZSTD)), 1.35),
        at_least("packed uncompressed, owned / annbatch's best sparse",
                 ratio(best(rows, "packed", OWN_PLAIN, owned=True),
                       best(rows, "sparse", "annbatch")), 1.8),
        # At a few hundred cells the gene list outweighs the cells.
        Gate("bytes zstd / u16 lz4 <= 0.6", disk,
             disk <= 0.6 if timed and disk is not None else None),
        Gate("longest wait after the first batch, 10 ms steps <= 25 ms", worst,
             worst <= 25 if timed else None),
        *(Gate(claim, float(held), held) for claim, held in whole),
    ]  # fmt: skip


def _memory(row: dict[str, Any]) -> str:
    return "owned" if row["owned"] else "borrowed"


def print_tables(result: dict[str, Any], verdicts: list[Gate]) -> None:
    """Print all figures."""
    rows = result["race"]
    ours = {(row["name"], row["kind"], row["owned"]): row["cells_per_cpu_s"] for row in rows}
    print(f"\n{'store':<28} {'output':<7} {'settings':<15} {'memory':<8} {'cells/CPU-s':>11} "
          f"{'min':>8} {'max':>8} {'cells/s':>8} {'zstd/this':>9} {'raw/this':>8}")  # fmt: skip
    for row in sorted(rows, key=lambda row: (row["kind"], row["name"].startswith("own") is False)):
        rates = row["all_cells_per_cpu_s"]
        shares = [
            ours[name, row["kind"], row["owned"]] / row["cells_per_cpu_s"]
            for name in (OWN_ZSTD, OWN_PLAIN)
        ]
        print(f"{row['name']:<28} {row['kind']:<7} {row['settings']:<15} {_memory(row):<8} "
              f"{row['cells_per_cpu_s']:>11,.0f} {min(rates):>8,.0f} {max(rates):>8,.0f} "
              f"{row['cells_per_wall_s']:>8,.0f} {shares[0]:>9.2f} {shares[1]:>8.2f}")  # fmt: skip
    print(f"\n{'all cores, made ahead':<28} {'output':<7} {'settings':<27} {'memory':<8} "
          f"{'cells/s':>8} {'cells/CPU-s':>11}")  # fmt: skip
    for row in sorted(result["ahead"], key=lambda row: (row["kind"], -row["cells_per_wall_s"])):
        print(f"{row['name']:<28} {row['kind']:<7} {row['settings']:<27} {_memory(row):<8} "
              f"{row['cells_per_wall_s']:>8,.0f} {row['cells_per_cpu_s']:>11,.0f}")  # fmt: skip
    print(f"\n{'store':<28} {'B/value':>8} {'convert cells/s':>15} {'a CPU-s':>9} {'peak MiB':>9}")
    for name, store in result["stores"].items():
        print(f"{name:<28} {store['bytes_per_value']:>8.3f} {store['cells_per_s']:>15,.0f} "
              f"{store.get('cells_per_cpu_s', float('nan')):>9,.0f} "
              f"{store.get('peak_mib', float('nan')):>9,.0f}")  # fmt: skip
    print(f"\n{'pretended training step':<35} {'output':<7} {'step ms':>7} {'useful':>7} "
          f"{'worst wait ms':>13} {'first ms':>9}")  # fmt: skip
    for row in result["stall"]:
        print(f"{row['name']:<35} {row['kind']:<7} {row['step_ms']:>7.0f} {row['useful']:>7.3f} "
              f"{row['worst_ms']:>13.1f} {row['first_ms']:>9.1f}")  # fmt: skip
    print(f"\n{'not in the page cache':<35} {'output':<7} {'cells/s':>8} {'MB read':>8}")
    for row in result["cold"]:
        print(f"{row['name']:<35} {row['kind']:<7} {row['cells_per_wall_s']:>8,.0f} "
              f"{row['bytes_read'] / 1e6:>8,.1f}")  # fmt: skip
    waits = ", ".join(f"{wait:.0f}" for wait in result["resume"]["first_batch_ms"])
    print(f"\nfirst batch after a resume: {waits} ms")
    for line in result["left_out"]:
        print(f"left out: {line}")
    print()
    for gate in verdicts:
        verdict = {True: "PASS", False: "FAIL", None: "not judged"}[gate.passed]
        value = "-" if gate.value is None else f"{gate.value:.2f}"
        print(f"{gate.claim:<62} {value:>7}  {verdict}")


def make_peers(folder: Path) -> Path:
    """Install the other loaders and return their Python.

    Args:
        folder: Folder of the virtual environment; used as it is where it exists.

    Raises:
        FileNotFoundError: No python3.12 on the path.
    """
    python = folder / "bin/python"
    if not python.exists():
        found = shutil.which("python3.12")
        if found is None:
            raise FileNotFoundError("no python3.12 on the path, which annbatch needs; install it, "
                                    "or name one with annbatch: --peers-python")  # fmt: skip
        subprocess.run([found, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS], check=True)
    return python


def _missing(python: Path | None) -> list[str]:
    """Return what cannot be measured, and why; stops when annbatch is missing."""
    if python is None:
        return ["all other loaders: no --peers-python or --make-peers"]
    ask = "import importlib.util as u, json; print(json.dumps([bool(u.find_spec(n)) for n in %r]))"
    names = ["annbatch", "torch", "bionemo", "scdataset"]
    done = subprocess.run([python, "-c", ask % names], check=True, capture_output=True, text=True)
    has = dict(zip(names, json.loads(done.stdout), strict=True))
    if not has["annbatch"]:
        raise FileNotFoundError(f"{python} has no annbatch: pip install {' '.join(PEERS)}")
    lines = {
        "torch": "annbatch's documented way through torch tensors: no torch in that Python",
        "bionemo": "bionemo-scdl: not installed in that Python",
        "scdataset": "scDataset: not installed in that Python",
    }
    return [line for name, line in lines.items() if not has[name]]


def _measure(
    part: str, work: Path, settings: dict[str, Any], *, cores: list[int]
) -> dict[str, Any]:
    """Run the measuring process on chosen cores."""
    given, out = work / "settings.json", work / f"{part}.json"
    given.write_text(json.dumps(settings))
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # before the child's thread pools count the cores
    try:
        command = [settings["python"], "-m", "benchmarks.loader_race", part, work, given, out]
        threads = {"RAYON_NUM_THREADS": str(len(cores))}  # those of annbatch's codecs
        subprocess.run(command, env=environ() | threads, check=True)
    finally:
        os.sched_setaffinity(0, usable)
    return json.loads(out.read_text())


def run(work: Path, size: dict[str, int], python: Path | None) -> dict[str, Any]:
    """Prepare and measure.

    Args:
        work: Folder of the stores.
        size: FULL or TINY, with changes.
        python: Python of the other loaders, or None.

    Returns:
        All figures.
    """
    left_out = _missing(python)
    work.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[-1:])
    try:
        names = ("n_cells", "npz_cells", "conversions")
        result = prepare(work, python=python, **{name: size[name] for name in names})
    finally:
        os.sched_setaffinity(0, cores)
    settings = size | {"peers": python is not None, "python": str(python or sys.executable)}
    result |= _measure("race", work, settings, cores=cores[-1:])
    # A training step leaves the loader's threads a core of their own.
    result |= _measure("stall", work, settings, cores=cores[-2:])
    result |= _measure("ahead", work, settings, cores=cores)
    return result | {"settings": settings, "left_out": left_out}


def main() -> int:
    """Run the benchmark and print tables and gates."""
    parser = argparse.ArgumentParser(description="The loader beside other loaders.")
    parser.add_argument("--work", type=Path, required=True, help="folder for the stores")
    parser.add_argument("--cells", type=int, help=f"default {FULL['n_cells']}")
    parser.add_argument("--rounds", type=int, help=f"default {FULL['rounds']}")
    parser.add_argument("--conversions", type=int, help=f"default {FULL['conversions']}")
    parser.add_argument("--tiny", action="store_true", help="check that the benchmark works")
    peers = parser.add_mutually_exclusive_group()
    peers.add_argument("--peers-python", type=Path, metavar="PATH", help="Python with annbatch")
    peers.add_argument("--make-peers", action="store_true", help="install it to WORK/peers")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures as JSON")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    work = args.work.resolve()
    size = dict(TINY if args.tiny else FULL)
    size |= {"n_cells": args.cells} if args.cells else {}
    size |= {"rounds": args.rounds} if args.rounds else {}
    size |= {"conversions": args.conversions} if args.conversions else {}
    size["npz_cells"] = min(size["npz_cells"], size["n_cells"])
    size["h5ad_cells"] = min(size["h5ad_cells"], size["n_cells"])
    python = make_peers(work / "peers") if args.make_peers else args.peers_python
    # Not resolved: a virtual environment's Python is a link to another one.
    result = run(work, size, python and python.absolute())
    verdicts = gates(result, timed=not args.tiny)
    print_tables(result, verdicts)
    if args.json:
        judged = [asdict(gate) for gate in verdicts]
        write_result(args.json, "loader", result | {"gates": judged})
    return 1 if any(gate.passed is False for gate in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
