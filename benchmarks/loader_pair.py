"""CPU of the loader beside that of another checkout: paired, alternating, in one run.

    python -m benchmarks.loader_pair OTHER_CHECKOUT --out FOLDER [--cells N] [--rounds N]
        [--json OUT]

Each checkout makes corpora of the same h5ad files, one for each of four seeds, since the order of
cells alone changes the cost by 3%; a process for each corpus opens it and stays. Each round, for
each kind of output, all processes read one epoch in turn, on one core, in a random sequence. As in
training a loader is opened once and goes from epoch to epoch: memory that is touched for the first
time is not counted, which costs up to twice the work itself on virtual machines whose host takes
free pages back. Prints for each output the CPU microseconds a cell of both checkouts (mean over the
seeds, median over the rounds), the ratio of these, and the median, smallest and largest ratio of a
round. An epoch of each output is read before the first round and not counted.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.environment import write_result
from benchmarks.loader_prepare import ROOT, SYNTHETIC, environ

ROUNDS, CELLS, BATCH, SEEDS = 15, 24_000, 256, (1, 2, 3, 4)
KINDS = ("packed", "csr", "dense", "dense_norm")
_ANSWER = """
import sys, time
from pathlib import Path
from benchmarks.loader_cells import SourceCells
from benchmarks.loader_own import OwnStore
store = OwnStore(Path(sys.argv[1]), SourceCells(Path(sys.argv[2])), batch=int(sys.argv[3]))
kind, started = None, time.process_time()
for line in sys.stdin:
    if line.strip() != kind:
        kind = line.strip()
        steps = iter(store.loader(kind, 0, 10**9, prefetch_batches=0))
    n_cells = 0
    while n_cells < store.stream.epoch_visits:
        (batch,) = next(steps).micro_batches
        n_cells += len(batch.cell_ids)
    # From answer to answer: a thread may read on between them.
    seconds, started = time.process_time() - started, time.process_time()
    print(seconds / n_cells, flush=True)
"""


class Reader:
    """A process that holds a corpus of one checkout open and reads an epoch when asked."""

    def __init__(self, root: Path, corpus: Path, sources: Path) -> None:
        """Start the process.

        Args:
            root: Root of the checkout.
            corpus: Corpus folder that this checkout made.
            sources: Folder of the h5ad files.
        """
        command = [sys.executable, "-W", "ignore", "-c", _ANSWER]
        self._process = subprocess.Popen(
            [*command, str(corpus), str(sources), str(BATCH)], cwd=root,
            env=environ() | {"PYTHONPATH": str(root)}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def epoch(self, kind: str) -> float:
        """Read the next epoch.

        Args:
            kind: One of KINDS.

        Returns:
            CPU seconds a cell.

        Raises:
            RuntimeError: The process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(kind, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args}: ended with {self._process.wait()}")
        return float(line)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def make_corpora(out: Path, roots: dict[str, Path], n_cells: int) -> None:
    """Write the h5ad files, and the corpora of each checkout, where they are not there yet.

    Args:
        out: Scratch folder: `h5ad`, and a corpus for each checkout and seed (`here1`).
        roots: Checkouts by name.
        n_cells: Cells of a corpus.

    Raises:
        ValueError: The folder was made for another number of cells.
    """
    made = out / "cells"
    if made.exists() and int(made.read_text()) != n_cells:
        raise ValueError(f"{out}: made for {made.read_text()} cells, asked for {n_cells}; choose "
                         "another --out folder")  # fmt: skip
    if not made.exists():
        shutil.rmtree(out / "h5ad", ignore_errors=True)
        write = [sys.executable, "-c", SYNTHETIC, str(out / "h5ad"), str(n_cells)]
        subprocess.run(write, cwd=ROOT, env=environ(), check=True)
        made.write_text(str(n_cells))
    for name, root in roots.items():
        missing = [seed for seed in SEEDS if not (out / f"{name}{seed}/corpus.json").exists()]
        if not missing:
            continue
        staged = out / f"{name}_staged"
        shutil.rmtree(staged, ignore_errors=True)
        _prepare(root, "convert", str(out / "h5ad/manifest.tsv"), "--out", str(staged))
        for seed in missing:
            corpus = out / f"{name}{seed}"
            shutil.rmtree(corpus, ignore_errors=True)
            shutil.copytree(staged, corpus)
            rest = ["--validation-fraction", "0", "--seed", str(seed)]
            _prepare(root, "finalize", str(corpus), *rest)
            shutil.rmtree(corpus / "staging")
        shutil.rmtree(staged)


def _prepare(root: Path, *arguments: str) -> None:
    """Run a command of `data_prep` of a checkout."""
    command = [sys.executable, "-W", "ignore", "-m", "data_prep", *arguments]
    env = environ() | {"PYTHONPATH": str(root)}
    subprocess.run(command, cwd=root, env=env, check=True, stdout=subprocess.DEVNULL)


def measure(readers: dict[str, list[Reader]], rounds: int) -> dict[str, dict[str, Any]]:
    """Read an epoch of each output with all processes in turn, round after round.

    Args:
        readers: Processes by checkout (here, there), one for each seed.
        rounds: Epochs of each output and process.

    Returns:
        For each output the CPU microseconds a cell of each round, and how they compare.
    """
    result, turns = {}, [(name, k) for name in readers for k in range(len(SEEDS))]
    draw = random.Random(0)
    for kind in KINDS:
        costs: dict[str, list[float]] = {name: [] for name in readers}
        for number in range(rounds + 1):
            found = dict.fromkeys(readers, 0.0)
            for name, k in draw.sample(turns, len(turns)):
                found[name] += readers[name][k].epoch(kind) * 1e6 / len(SEEDS)
            if number:
                for name in readers:
                    costs[name].append(found[name])
        pairs = zip(costs["here"], costs["there"], strict=True)
        ratios = sorted(here / there for here, there in pairs)
        medians = {name: statistics.median(all_) for name, all_ in costs.items()}
        result[kind] = medians | {
            "ratio": medians["here"] / medians["there"],
            "median_ratio": statistics.median(ratios),
            "least_ratio": ratios[0],
            "largest_ratio": ratios[-1],
            "rounds": costs,
        }
        print(
            f"{kind:<10} us a cell: here {medians['here']:6.2f}  there {medians['there']:6.2f}  "
            f"ratio {result[kind]['ratio']:.3f}; of the rounds {statistics.median(ratios):.3f} "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f} over {rounds})",
            flush=True,
        )
    return result


def main() -> int:
    """Make both corpora, read them in turn, and print one line for each output."""
    parser = argparse.ArgumentParser(description="The loader beside that of another checkout.")
    parser.add_argument("other", type=Path, metavar="OTHER_CHECKOUT")
    parser.add_argument("--out", type=Path, required=True, help="scratch folder")
    parser.add_argument("--cells", type=int, default=CELLS, help=f"default {CELLS}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures as JSON")
    args = parser.parse_args()
    other, out = args.other.resolve(), args.out.resolve()
    if not (other / "data_prep").is_dir():
        parser.error(f"{other}: no data_prep here; give the root of a checkout")
    out.mkdir(parents=True, exist_ok=True)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    roots = {"here": ROOT, "there": other}
    make_corpora(out, roots, args.cells)
    readers = {
        name: [Reader(root, out / f"{name}{seed}", out / "h5ad") for seed in SEEDS]
        for name, root in roots.items()
    }
    try:
        result = measure(readers, args.rounds)
    finally:
        for reader in (*readers["here"], *readers["there"]):
            reader.close()
    if args.json:
        write_result(args.json, "loader_pair", result, other=str(other))
    return 0


if __name__ == "__main__":
    sys.exit(main())
