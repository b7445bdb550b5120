"""The measuring process of the loader benchmark; `python -m benchmarks.loader` starts it.

    python -m benchmarks.loader_race race|stall|ahead WORK SETTINGS OUT

SETTINGS and OUT are JSON files. `race` checks every contender against the source cells, then times
all of them in turn, round after round; `stall` has batches consumed by a pretended training step;
`ahead` times what uses all cores. Runs in the Python of the other loaders, on the cores that it is
started on.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import distributions
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.loader_cells import (
    TARGET_SUM,
    Contender,
    Loaded,
    SourceCells,
    as_csr,
    fingerprints,
    h5ad_contender,
    npz_contender,
)
from benchmarks.loader_own import KINDS, PREFETCH_BATCHES, OwnStore

OWN = ("own zstd", "own uncompressed")
NPZ_BATCH = 64
CHECKED_READY_BATCHES = 3
STEPS_S = (0.010, 0.050)
COLD = (*OWN, "annbatch f32 lz4 (default)", "annbatch u16 lz4", "annbatch u16 uncompressed")
log = logging.getLogger("loader_race")


def check(contender: Contender, source: SourceCells, wanted: NDArray[np.uint64]) -> None:
    """Read an epoch and compare every cell with the source; it warms up the contender as well.

    Args:
        contender: What to read.
        source: The files.
        wanted: (cells,) fingerprints of the source cells.

    Raises:
        ValueError: A cell is missing, comes twice or differs.
    """
    seen = np.zeros(source.n_cells, np.int64)
    for number, batch in enumerate(contender.batches(0, True)):
        assert batch.cells is not None
        seen[batch.cells] += 1
        if contender.kind != "ready":
            right = fingerprints(as_csr(batch.counts, source.n_genes)) == wanted[batch.cells]
        elif number < CHECKED_READY_BATCHES:
            raw = source.dense(batch.cells)
            totals = np.maximum(raw.sum(axis=1, dtype=np.float64, keepdims=True), 1)
            values = np.asarray(batch.counts)
            right = np.isclose(values, np.log1p(raw * (TARGET_SUM / totals)), 1e-4).all(axis=1)
        else:
            continue
        if not right.all():
            raise ValueError(f"{contender}: {(~right).sum()} cells of a batch differ")
    if seen.max() > 1 or seen.sum() != contender.n_cells:
        raise ValueError(f"{contender}: {(seen > 1).sum()} cells come twice, {seen.sum()} in all")


def race(contenders: list[Contender], rounds: int) -> list[dict[str, Any]]:
    """Time every contender once a round, an epoch each, in another order every round.

    Args:
        contenders: All of them.
        rounds: Number of rounds.

    Returns:
        For each contender its cells a second of wall and of CPU time: median and all rounds.
    """
    rates: list[tuple[list[float], list[float]]] = [([], []) for _ in contenders]
    for number in range(1, rounds + 1):
        log.info("round %d of %d", number, rounds)
        for k in np.random.default_rng(number).permutation(len(contenders)):
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            n_cells = sum(batch.n_cells for batch in contenders[k].batches(number, False))
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            rates[k][0].append(n_cells / wall)
            rates[k][1].append(n_cells / cpu)
    return [
        {
            "name": contender.name,
            "kind": contender.kind,
            "settings": contender.settings,
            "owned": contender.owned,
            "cells_per_cpu_s": statistics.median(cpus),
            "cells_per_wall_s": statistics.median(walls),
            "all_cells_per_cpu_s": cpus,
            "all_cells_per_wall_s": walls,
        }
        for contender, (walls, cpus) in zip(contenders, rates, strict=True)
    ]


def _own_contents(store: OwnStore, batches: Iterator[Any]) -> list[tuple[list[int], list[int]]]:
    """Return the ids and fingerprints of one rank's cells in each step."""
    return [
        (
            [i for micro in step.micro_batches for i in micro.cell_ids.tolist()],
            [f for micro in step.micro_batches for f in fingerprints(micro.counts).tolist()],
        )
        for step in batches
    ]


def resume(store: OwnStore) -> dict[str, Any]:
    """Stop at several batches, continue with a fresh loader, and compare with an unbroken run.

    Args:
        store: Our store.

    Returns:
        Whether ids and contents are the same, and the wait for the first batch after each stop.
    """
    epoch, batch = store.stream.epoch_visits, store.batch
    end = epoch + 3 * batch
    with store.loader("csr", 0, end) as loader:
        unbroken = _own_contents(store, loader)
    same, waits = True, []
    for stop in sorted({1, len(unbroken) // 2, epoch // batch, len(unbroken) - 1}):
        with store.loader("csr", 0, end) as loader:
            before = _own_contents(store, (next(loader) for _ in range(stop)))
            position = loader.position
        start = time.perf_counter()
        with store.loader("csr", position, end) as loader:
            first = next(loader)
            waits.append(1e3 * (time.perf_counter() - start))
            after = _own_contents(store, chain([first], loader))
        same &= before + after == unbroken
    return {"same": same, "first_batch_ms": waits}


def rank_orders(store: OwnStore) -> dict[str, Any]:
    """Compare an epoch on 1, 2 and 4 ranks: order, contents, and that no cell is missing.

    Args:
        store: Our store.

    Returns:
        Whether all three gave the same cells in the same places, every cell once.
    """
    orders = []
    micro, epoch = store.batch // 4, store.stream.epoch_visits
    for world in (1, 2, 4):
        ranks = []
        for rank in range(world):
            with store.loader(
                "csr", 0, epoch, rank=rank, world_size=world, micro_batch_size=micro
            ) as loader:
                ranks.append(
                    [
                        [
                            list(zip(m.cell_ids.tolist(), fingerprints(m.counts), strict=True))
                            for m in step.micro_batches
                        ]
                        for step in loader
                    ]
                )
        steps = zip(*ranks, strict=True)
        order = [
            cell for step in steps for row in zip(*step, strict=True) for m in row for cell in m
        ]
        orders.append(order)
    complete = sorted(cell for cell, _ in orders[0]) == list(range(len(store.corpus)))
    return {"same": orders[0] == orders[1] == orders[2], "complete": complete}


def forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache (pages that are mapped stay)."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def cold(contenders: list[Contender], folders: dict[str, Path]) -> list[dict[str, Any]]:
    """Time one epoch of each contender after its files left the page cache; medians of 3.

    Args:
        contenders: Those to time.
        folders: Where the files of each are.

    Returns:
        Cells a second of wall time and bytes read from the disk.
    """
    rows = []
    for contender in contenders:
        rates, sizes = [], []
        for number in range(3):
            forget(folders[contender.name])
            read, start = _bytes_read(), time.perf_counter()
            n_cells = sum(batch.n_cells for batch in contender.batches(number, False))
            rates.append(n_cells / (time.perf_counter() - start))
            sizes.append(_bytes_read() - read)
        rows.append(
            {
                "name": contender.name,
                "kind": contender.kind,
                "cells_per_wall_s": statistics.median(rates),
                "bytes_read": statistics.median(sizes),
            }
        )
    return rows


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def stall(batches: Iterator[Loaded], step_s: float) -> dict[str, float]:
    """Consume batches with a sleep in place of each training step.

    Args:
        batches: Any loader.
        step_s: Seconds of a step.

    Returns:
        Share of the time after the first batch that went to steps, the wait for the first batch
        and the longest one after it.
    """
    waits, useful = [], 0.0
    asked = time.perf_counter()
    for _ in batches:
        got = time.perf_counter()
        waits.append(got - asked)
        time.sleep(step_s)
        asked = time.perf_counter()
        useful += asked - got
    waited = sum(waits[1:])
    return {
        "useful": useful / (useful + waited),
        "first_ms": 1e3 * waits[0],
        "worst_ms": 1e3 * max(waits[1:]),
    }


def stalls(work: Path, source: SourceCells, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the stall test of our loader and of annbatch, as shipped and with a user's thread.

    Args:
        work: Folder of the stores.
        source: The source files.
        settings: Of the benchmark.
    """
    epochs, size = settings["stall_epochs"], settings["batch"]
    own = OwnStore(work / "own_zstd", source, batch=size)
    visits = epochs * own.stream.epoch_visits

    def ours(output: str) -> Iterator[Loaded]:
        with own.loader(output, 0, visits) as loader:
            for step in loader:
                yield Loaded(len(step.cell_ids), step.micro_batches[0].counts, None)

    runs: list[tuple[str, str, Callable[[], Iterator[Loaded]]]] = [
        (f"{OWN[0]} (queue {PREFETCH_BATCHES})", KINDS[output], partial(ours, output))
        for output in ("csr", "dense_norm")
    ]
    # Two batches of each compile what there is to compile, and open the files.
    warm_up: list[Callable[[], Iterator[Loaded]]] = [
        partial(ours, "csr"),
        partial(ours, "dense_norm"),
    ]
    if settings["peers"]:
        from benchmarks import loader_peers as peers

        def ahead(contender: Contender) -> Iterator[Loaded]:
            return peers.read_ahead(_epochs(contender, epochs), peers.QUEUE)

        peers.use_zarrs()
        name = peers.LZ4
        store = peers.Annbatch(peers.folder_of(name, work), batch=size)
        for kind in ("sparse", "ready"):
            plain = store.contender(name, kind, peers.ARGUMENTS[1])
            fresh = store.contender(name, kind, peers.ARGUMENTS[1], fresh=True)
            warm_up.append(partial(_epochs, plain, 1))
            runs += [
                (f"{name} as shipped", kind, partial(_epochs, plain, epochs)),
                (f"{name} + user thread", kind, partial(ahead, fresh)),
            ]
    for opened in warm_up:
        list(islice(opened(), 2))
    rows = []
    for step_s in STEPS_S:
        for name, kind, start in runs:
            log.info("%s, %s: steps of %.0f ms", name, kind, 1e3 * step_s)
            rows.append({"name": name, "kind": kind, "step_ms": 1e3 * step_s})
            rows[-1] |= stall(start(), step_s)
    return rows


def _epochs(contender: Contender, number: int) -> Iterator[Loaded]:
    for epoch in range(number):
        yield from contender.batches(epoch, False)


def run_race(work: Path, source: SourceCells, settings: dict[str, Any]) -> dict[str, Any]:
    """Check and time everything but the stalls.

    Args:
        work: Folder of the stores.
        source: The source files.
        settings: Of the benchmark.
    """
    size = settings["batch"]
    stores = {name: OwnStore(work / name.replace(" ", "_"), source, batch=size) for name in OWN}
    contenders = [
        store.contender(name, output, owned=owned)
        for name, store in stores.items()
        for output in KINDS
        for owned in (False, True)
    ]
    folders = {name: work / name.replace(" ", "_") / "cells.zarr" for name in OWN}
    if settings["peers"]:
        from benchmarks import loader_peers as peers

        contenders += peers.contenders(work, batch=size)
        folders |= {name: peers.folder_of(name, work) for name in peers.STORES}
    npz = npz_contender(work / "npz", settings["npz_cells"], batch=NPZ_BATCH)
    folders[npz.name] = work / "npz"
    contenders += [npz, h5ad_contender(source, settings["h5ad_cells"], batch=size)]
    wanted = source.fingerprints()
    for contender in contenders:
        log.info("every cell of %s, %s %s", contender.name, contender.kind, contender.settings)
        check(contender, source, wanted)
    result: dict[str, Any] = {"race": race(contenders, settings["rounds"])}
    log.info("resume, ranks, cold reading")
    result["resume"], result["ranks"] = resume(stores[OWN[0]]), rank_orders(stores[OWN[0]])
    result["cold"] = cold(
        [
            c
            for c in contenders
            if c is npz
            or (
                c.name in COLD
                and c.settings in ("csr", "512x16")
                and c.kind == "sparse"
                and c.owned is (c.name not in OWN)
            )
        ],
        folders,
    )
    return result


def run_ahead(work: Path, source: SourceCells, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Time the ways that use all cores: batches are made ahead while one waits for the next.

    Args:
        work: Folder of the stores.
        source: The source files.
        settings: Of the benchmark.
    """
    size = settings["batch"]
    contenders = [
        OwnStore(work / name.replace(" ", "_"), source, batch=size).ahead(name, output)
        for name in OWN
        for output in ("csr", "dense_norm")
    ]
    if settings["peers"]:
        from benchmarks import loader_peers as peers

        peers.use_zarrs()
        contenders += peers.contenders_ahead(work, batch=size)
    wanted = source.fingerprints()
    for contender in contenders:
        check(contender, source, wanted)
    return race(contenders, settings["rounds"])


def main() -> int:
    """Measure and write the figures."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    part, work, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[4])
    settings = json.loads(Path(sys.argv[3]).read_text())
    source = SourceCells(work / "h5ad")
    if part == "stall":
        result: dict[str, Any] = {"stall": stalls(work, source, settings)}
    elif part == "ahead":
        result = {"ahead": run_ahead(work, source, settings)}
    else:
        result = run_race(work, source, settings)
        result["python"] = platform.python_version()
        result["installed"] = {d.name: d.version for d in distributions()}
    out.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
