"""Many small datasets through the whole data preparation, as a job array would run it.

    python -m benchmarks.simulate_datasets --out FOLDER [--datasets N] [--json OUT]

Writes N seeded datasets (1,618 unless told otherwise; 20 to 62 cells each, every format in turn,
some genes unknown, some cells empty, every eleventh unusable or damaged in one of six ways) and a
manifest to FOLDER/raw, then runs the real commands: `convert --task I --tasks 4` as four processes
at a time, twice, `status`, `finalize` and `verify`. Checks that the ledger is complete and says of
each dataset what was made of it. Prints the time per dataset and the peak memory of each command.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import psutil
from scipy import io, sparse
from tqdm import tqdm

from benchmarks.environment import write_result
from benchmarks.synthetic_corpus import cell_types, draw_cells
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.files.atomic import write_atomic

N_DATASETS, TASKS = 1618, 4
BROKEN_EVERY = 11
N_GENES = 2_000
TISSUES = ("blood", "lung", "liver", "heart", "kidney", "brain", "skin", "gut", "spleen", "eye")


def _table(counts: sparse.csr_matrix, genes: Sequence[str], name: str) -> anndata.AnnData:
    cells = [f"{name}-{row}" for row in range(counts.shape[0])]
    obs = pd.DataFrame({"donor_id": [f"{name}-d{row % 3}" for row in range(len(cells))]}, cells)
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=list(genes)))


def _h5ad(counts: sparse.csr_matrix, genes: Sequence[str], path: Path) -> Path:
    path = path.with_suffix(".h5ad")
    _table(counts.astype(np.float32), genes, path.stem).write_h5ad(path)
    return path


def _h5ad_raw(counts: sparse.csr_matrix, genes: Sequence[str], path: Path) -> Path:
    """Counts in raw.X, X log-normalised: how most published files are."""
    path = path.with_suffix(".h5ad")
    adata = _table(counts.astype(np.float32), genes, path.stem)
    adata.raw = adata.copy()
    adata.X = _logged(counts)
    adata.write_h5ad(path, compression="gzip")
    return path


def _tenx_h5(counts: sparse.csr_matrix, genes: Sequence[str], path: Path) -> Path:
    path = path.with_suffix(".h5")
    with h5py.File(path, "w") as root:
        group = root.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(counts, name)
        group["shape"] = counts.shape[::-1]
        group["barcodes"] = np.array([f"{path.stem}-{i}" for i in range(counts.shape[0])], "S")
        for name in ("id", "name"):
            group[f"features/{name}"] = np.array(genes, "S")
        group["features/genome"] = np.array(["GRCh38"] * len(genes), "S")
        group["features/feature_type"] = np.array(["Gene Expression"] * len(genes), "S")
    return path


def _tenx_mtx(counts: sparse.csr_matrix, genes: Sequence[str], path: Path) -> Path:
    path.mkdir()
    io.mmwrite(path / "matrix.mtx", counts.T.tocoo(), field="integer", symmetry="general")
    matrix = (path / "matrix.mtx").read_bytes()
    (path / "matrix.mtx").unlink()
    texts = {
        "matrix.mtx": matrix,
        "barcodes.tsv": "".join(f"{path.name}-{i}\n" for i in range(counts.shape[0])).encode(),
        "features.tsv": "".join(f"{g}\t{g}\tGene Expression\n" for g in genes).encode(),
    }
    for name, text in texts.items():
        (path / f"{name}.gz").write_bytes(gzip.compress(text, mtime=0))
    return path


def _loom(counts: sparse.csr_matrix, genes: Sequence[str], path: Path) -> Path:
    path = path.with_suffix(".loom")
    with h5py.File(path, "w") as root:
        root["matrix"] = counts.T.toarray()
        root["row_attrs/Accession"] = list(genes)
        root["col_attrs/CellID"] = [f"{path.stem}-{i}" for i in range(counts.shape[0])]
    return path


def _csv(counts: sparse.csr_matrix, genes: Sequence[str], path: Path) -> Path:
    path = path.with_suffix(".csv.gz")
    cells = [f"{path.stem}-{i}" for i in range(counts.shape[0])]
    pd.DataFrame(counts.T.toarray(), index=list(genes), columns=cells).to_csv(path)
    return path


WRITERS: tuple[Callable[[sparse.csr_matrix, Sequence[str], Path], Path], ...] = (
    _h5ad, _h5ad_raw, _tenx_h5, _tenx_mtx, _loom, _csv,
)  # fmt: skip
UNUSABLE = ("cut", "logged", "mouse", "absent", "alien", "empty")
EXPECTED = {
    "cut": "failed",
    "logged": "excluded",
    "mouse": "excluded",
    "absent": "failed",
    "alien": "excluded",
    "empty": "failed",
}
"""What the ledger must say of each kind of unusable dataset."""


def _logged(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    scale = sparse.diags_array(1e4 / np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1))
    return sparse.csr_matrix(scale @ counts).log1p().astype(np.float32)


def _write_unusable(kind: str, counts: sparse.csr_matrix, genes: list[str], path: Path) -> Path:
    if kind == "absent":
        return path.with_suffix(".h5ad")
    if kind == "logged":
        counts = _logged(counts)
        counts.data *= np.float32(1.37)
    if kind == "empty":
        counts = sparse.csr_matrix(counts.shape, dtype=np.int32)
    if kind == "alien":
        genes = [f"contig{number}" for number in range(len(genes))]
    path = _h5ad(counts, genes, path)
    if kind == "cut":
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
    return path


def write_datasets(out: Path, n_datasets: int) -> dict[str, str]:
    """Write the datasets and FOLDER/manifest.tsv.

    Args:
        out: Folder, created.
        n_datasets: Number of datasets.

    Returns:
        Per dataset the status that the ledger must show.
    """
    out.mkdir(parents=True)
    ids = np.array(GeneVocabulary.bundled().ids)
    types = cell_types(N_GENES, seed=0)
    expected, lines = {}, ["dataset_id\tpath\torganism\ttissue\tdonor_column"]
    previous: tuple[sparse.csr_matrix, list[str]] | None = None
    for number in tqdm(range(n_datasets), unit="dataset", disable=not sys.stderr.isatty()):
        rng = np.random.default_rng([7, number])
        name = f"d{number:04d}"
        genes = ids[np.sort(rng.choice(len(ids), N_GENES, replace=False))].tolist()
        n_cells, depth = int(rng.integers(20, 61)), float(rng.lognormal(6.5, 0.5))
        unknown = rng.choice(N_GENES, int(N_GENES * rng.beta(1, 12)), replace=False)
        for gene in unknown.tolist():
            genes[gene] = f"novel{gene}"
        counts = next(draw_cells(types, n_cells, seed=number, mean_depth=depth))
        if number % 7 == 3:
            counts = sparse.vstack([counts, counts[:2] * 0], format="csr", dtype=np.int32)
        organism = "human"
        if number % BROKEN_EVERY == BROKEN_EVERY - 1:
            kind = UNUSABLE[number // BROKEN_EVERY % len(UNUSABLE)]
            path = _write_unusable(kind, counts, genes, out / name)
            expected[name] = EXPECTED[kind]
            organism = "mouse" if kind == "mouse" else organism
        else:
            if number % 20 == 1 and previous is not None:
                # The same cells uploaded twice, in another file and format.
                counts, genes = previous
            path = WRITERS[number % len(WRITERS)](counts, genes, out / name)
            expected[name] = "ok"
            previous = counts, genes
        tissue = TISSUES[int(rng.integers(len(TISSUES)))]
        donor = "donor_id" if path.suffix == ".h5ad" and expected[name] == "ok" else ""
        lines.append(f"{name}\t{path.name}\t{organism}\t{tissue}\t{donor}")
    write_atomic(out / "manifest.tsv", ("\n".join(lines) + "\n").encode())
    return expected


class _PeakMemory(threading.Thread):
    """Watches the resident memory of processes and their children."""

    def __init__(self, processes: Sequence[subprocess.Popen]) -> None:
        super().__init__(daemon=True)
        self.processes, self.peak_mib = processes, 0.0

    def run(self) -> None:
        while any(process.poll() is None for process in self.processes):
            total = 0
            for process in self.processes:
                try:
                    tree = psutil.Process(process.pid)
                    total += sum(
                        p.memory_info().rss for p in [tree, *tree.children(recursive=True)]
                    )
                except psutil.Error:
                    continue  # it ended just now
            self.peak_mib = max(self.peak_mib, total / 2**20)
            time.sleep(0.1)


def _run(commands: Sequence[Sequence[str]]) -> tuple[list[tuple[int, str, str]], dict[str, float]]:
    """Run commands of data_prep at the same time; return status, output, errors and the cost."""
    start = time.perf_counter()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "data_prep", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        for command in commands
    ]
    watch = _PeakMemory(processes)
    watch.start()
    outputs = [process.communicate() for process in processes]
    watch.join()
    cost = {
        "wall_s": time.perf_counter() - start,
        "peak_mib": watch.peak_mib,
    }
    return [(p.returncode, *out) for p, out in zip(processes, outputs, strict=True)], cost


def simulate(
    out: Path, n_datasets: int, *, tasks: int = TASKS, again: bool = True
) -> dict[str, Any]:
    """Write the datasets, run all commands, check what they leave.

    Args:
        out: Folder, created; FOLDER/corpus is the corpus.
        n_datasets: Number of datasets.
        tasks: Tasks of the array, all at a time.
        again: Run the array a second time, which has only the failed datasets to do.

    Returns:
        Cost of each command, datasets by status, cells, duplicates.

    Raises:
        RuntimeError: The ledger is not what it must be, or a command failed.
    """
    expected = write_datasets(out / "raw", n_datasets)
    corpus, manifest = str(out / "corpus"), str(out / "raw" / "manifest.tsv")
    array = [
        ["convert", manifest, "--out", corpus, "--task", str(i), "--tasks", str(tasks)]
        for i in range(tasks)
    ]
    costs: dict[str, dict[str, float]] = {}
    _, costs["convert"] = _run(array)
    if again:
        _, costs["convert again"] = _run(array)
    (status,), costs["status"] = _run([["status", corpus, "--json"]])
    found = {d["dataset_id"]: d for d in json.loads(status[1])["datasets"]}
    wrong = [
        f"{name}: {found[name]['status']} ({found[name]['reason']})"
        if name in found
        else f"{name}: not in the ledger"
        for name, wanted in expected.items()
        if name not in found or found[name]["status"] != wanted
    ]
    if wrong or len(found) != n_datasets:
        raise RuntimeError(f"{len(wrong)} wrong in the ledger: {'; '.join(wrong[:5])}")
    reports = {}
    for command in ("finalize", "verify"):
        (done,), costs[command] = _run([[command, corpus, "--json"]])
        if done[0]:
            raise RuntimeError(f"{command}: {done[2].strip().splitlines()[-1]}")
        reports[command] = json.loads(done[1])
    return {
        "n_datasets": n_datasets,
        "tasks": tasks,
        "statuses": dict(Counter(d["status"] for d in found.values())),
        "n_cells": reports["verify"]["n_cells"],
        "duplicates_dropped": reports["finalize"]["duplicates_dropped"],
        "costs": costs,
    }


def main() -> int:
    """Run the simulation and print its figures."""
    parser = argparse.ArgumentParser(description="Many small datasets through data_prep.")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--datasets", type=int, default=N_DATASETS, help=f"default {N_DATASETS}")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures as JSON")
    args = parser.parse_args()
    result = simulate(args.out, args.datasets)
    statuses = ", ".join(f"{n} {status}" for status, n in sorted(result["statuses"].items()))
    print(f"{args.datasets} datasets ({statuses}), {result['n_cells']} cells in the corpus, "
          f"{result['duplicates_dropped']} duplicates dropped")  # fmt: skip
    print(f"{'command':<14} {'wall s':>8} {'s/dataset':>10} {'peak MiB':>9}")
    for command, cost in result["costs"].items():
        per = cost["wall_s"] / args.datasets
        print(f"{command:<14} {cost['wall_s']:>8.1f} {per:>10.4f} {cost['peak_mib']:>9.0f}")
    if args.json:
        write_result(args.json, "simulate_datasets", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
