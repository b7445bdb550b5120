"""Read a finished corpus again and check everything about it.

    python -m data_prep verify CORPUS [--sources N]

Checks the SHA-256 of every file (and of the staged inputs that are still there), decodes every
cell, recomputes totals, duplicates, splits and gene statistics, and compares them with what is
stored. Writes nothing in the corpus.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.dedup import Progress, find_duplicates
from data_prep.finalize import PRODUCTS, files_below
from data_prep.gene_statistics import gene_statistics
from data_prep.splits import read_donors
from data_prep.verify_sources import DEFAULT_SEED, check_sources
from sclong_ds.files import file_sha256
from sclong_ds.store import SPLITS, CellStore, Corpus, read_catalogue

MOST_PROBLEMS = 100
"""Problems that a report lists; `n_problems` counts all."""
# What zarr, zstd, numpy and json raise on changed bytes; RuntimeError is a broken zstd frame.
_DAMAGE = (
    ValueError,
    RuntimeError,
    OSError,
    LookupError,
    TypeError,
    EOFError,
    zlib.error,
    zipfile.BadZipFile,
)


def verify(
    corpus: str | Path,
    *,
    sources: int = 0,
    seed: int = DEFAULT_SEED,
    require_sources: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Check a corpus.

    Args:
        corpus: Folder of a finished corpus.
        sources: Cells to read again from their sources (`verify_sources.py`).
        seed: Of the draw of these cells.
        require_sources: Whether a source that is gone or changed is a problem.
        progress: Called with (stage, done, all), in cells.

    Returns:
        A report: ok (bool), problems (list of str), n_problems, n_cells, n_genes, n_values,
        n_files, splits and hash; the numbers are None where the catalogue is damaged. With
        `sources`, `sources` says what was read again; a corpus with other problems is not.

    Raises:
        FileNotFoundError: No such folder, or not finalized.
    """
    corpus = Path(corpus)
    report: dict[str, Any] = dict.fromkeys(("n_cells", "n_genes", "n_values", "splits", "hash"))
    problems: list[str] = []
    n_files = 0
    try:
        catalogue = read_catalogue(corpus)
    except ValueError as error:
        problems.append(str(error))
    else:
        report |= {name: catalogue[name] for name in report}
        n_files = _check_files(corpus, catalogue, problems)
        try:
            _check_contents(Corpus(corpus), problems, progress)
        except _DAMAGE as error:
            problems.append(f"contents not checked to the end: {_one_line(error)}")
        if sources and not problems:
            found = check_sources(Corpus(corpus), sources, seed=seed, progress=progress)
            report["sources"] = found.summary()
            problems += found.problems + (found.missing() if require_sources else [])
    return {
        "ok": not problems,
        "problems": problems[:MOST_PROBLEMS],
        "n_problems": len(problems),
        "n_files": n_files,
        **report,
    }


def _check_files(corpus: Path, catalogue: Mapping[str, Any], problems: list[str]) -> int:
    """Compare every file with its checksum; return the number of files read."""
    path = corpus / "checksums.json"
    if not path.is_file():
        problems.append("checksums.json: missing")
        return 0
    if file_sha256(path) != catalogue["checksums_sha256"]:
        problems.append("checksums.json: damaged (its checksum differs)")
        return 1
    checksums = json.loads(path.read_bytes())
    for name, expected in checksums["files"].items():
        if not (corpus / name).is_file():
            problems.append(f"{name}: missing")
        elif file_sha256(corpus / name) != expected:
            problems.append(f"{name}: damaged (its checksum differs)")
    found = {
        path.relative_to(corpus).as_posix()
        for product in PRODUCTS[:-1]
        for path in files_below(corpus / product)
    }
    problems += [
        f"{name}: not part of the corpus" for name in sorted(found - {*checksums["files"]})
    ]
    # Staging may be deleted once the corpus is finished, so only changes count.
    present = [name for name in checksums["inputs"] if (corpus / name).is_file()]
    problems += [
        f"{name}: differs from what finalize read (damaged, or converted again: run finalize)"
        for name in present
        if file_sha256(corpus / name) != checksums["inputs"][name]
    ]
    return len(checksums["files"]) + len(present) + 2


def _check_contents(corpus: Corpus, problems: list[str], progress: Progress | None) -> None:
    _check_catalogue(corpus, problems)
    readable = _check_cells(corpus.cells, problems, progress)
    _check_rows(corpus, problems)
    if not readable:
        return
    with tempfile.TemporaryDirectory(prefix="sclong_ds-verify-") as scratch:
        repeated = find_duplicates([corpus.cells], Path(scratch) / "digests", progress=progress)[0]
    if repeated.any():
        first = int(np.flatnonzero(repeated)[0])
        problems.append(f"cells.zarr: {repeated.sum()} cells repeat others, the first is {first}")
    _check_statistics(corpus, problems, progress)


def _check_catalogue(corpus: Corpus, problems: list[str]) -> None:
    """Check that the catalogue, the genes and the splits fit each other and the cells."""
    cells, catalogue = corpus.cells, corpus.catalogue
    n_genes = {cells.n_genes, catalogue["n_genes"], len(corpus.genes)}
    if len(n_genes) > 1:
        problems.append(f"corpus.json, genes.tsv and cells.zarr differ in genes: {sorted(n_genes)}")
    borders = [corpus.splits[name] for name in SPLITS]
    joined = [position for border in borders for position in (border.start, border.stop)]
    if joined[1:-1:2] != joined[2::2] or joined[0] != 0 or joined[-1] != len(cells):
        problems.append(f"corpus.json: splits {borders} do not cover {len(cells)} cells once")
    inside = [b for b in joined if b not in cells.chunk_rows]
    if inside:
        problems.append(f"cells.zarr: the split border {inside[0]} lies inside a chunk")
    if sum(dataset.n_cells for dataset in corpus.datasets) != len(cells):
        problems.append("corpus.json: the datasets' cells do not add up")


def _check_cells(cells: CellStore, problems: list[str], progress: Progress | None) -> bool:
    """Decode every chunk and compare it with the row tables; return whether all were readable."""
    n_values, readable = 0, True
    for chunk in range(len(cells.chunk_rows) - 1):
        first, last = int(cells.chunk_rows[chunk]), int(cells.chunk_rows[chunk + 1])
        try:
            counts = cells.read_chunk(chunk)
        except _DAMAGE as error:
            problems.append(f"cells.zarr: cells {first} to {last - 1}: {_one_line(error)}")
            readable = False
            continue
        n_values += counts.nnz
        totals = np.asarray(counts.sum(axis=1, dtype=np.int64)).ravel()
        for name, found, stored in (
            ("row_total", totals, cells.row_total[first:last]),
            ("row_nnz", np.diff(counts.indptr), cells.row_nnz[first:last]),
        ):
            wrong = np.flatnonzero(found != stored)
            if len(wrong):
                problems.append(f"cells.zarr/{name}: wrong for cell {first + wrong[0]}")
        if not _increasing(counts.indices, counts.indptr):
            problems.append(f"cells.zarr: cells {first} to {last - 1}: genes are not in order")
        if progress:
            progress("cells", last, len(cells))
    if readable and n_values != cells.n_values:
        problems.append(f"cells.zarr: {n_values} values, its attributes say {cells.n_values}")
    return readable


def _increasing(indices: np.ndarray, indptr: np.ndarray) -> bool:
    steps = np.diff(indices.astype(np.int64))
    borders = indptr[1:-1]
    steps[borders[(borders > 0) & (borders < len(indices))] - 1] = 1
    return bool((steps > 0).all())


def _check_rows(corpus: Corpus, problems: list[str]) -> None:
    """Check the datasets, splits, annotation rows and held-out groups of all cells."""
    dataset, obs_row = corpus.row_dataset, corpus.cells.table("obs_row")
    if len(dataset) and int(dataset.max()) >= len(corpus.datasets):
        problems.append(f"cells.zarr/dataset: no dataset {int(dataset.max())}")
        return
    for name in SPLITS:
        border = corpus.splits[name]
        found = np.bincount(dataset[border.start : border.stop], minlength=len(corpus.datasets))
        for info, n_cells in zip(corpus.datasets, found.tolist(), strict=True):
            if info.split_cells[name] != n_cells:
                problems.append(f"{info.dataset_id}: {n_cells} cells in {name}, "
                                f"corpus.json says {info.split_cells[name]}")  # fmt: skip
    splits_of: dict[str, set[str]] = {}
    ends = [corpus.splits[name].stop for name in SPLITS]
    # One sort instead of a look at all cells for each of a thousand datasets.
    order = np.argsort(dataset, kind="stable")
    borders = np.searchsorted(dataset, np.arange(len(corpus.datasets) + 1), sorter=order)
    for code, info in enumerate(corpus.datasets):
        here = order[borders[code] : borders[code + 1]]
        rows = obs_row[here]
        if len(np.unique(rows)) != len(here):
            problems.append(f"{info.dataset_id}: a row of its annotation is used twice")
        n_staged = info.n_cells + info.duplicates_dropped
        if len(here) and int(rows.max()) >= n_staged:
            problems.append(f"{info.dataset_id}: a cell without annotation")
            continue
        donors, donor = read_donors(corpus.obs_path(info.dataset_id), n_staged)
        split = np.searchsorted(ends, here, side="right")
        for pair in np.unique(len(SPLITS) * donor[rows].astype(np.int64) + split).tolist():
            group, part = divmod(pair, len(SPLITS))
            name = (donors or ("",))[group]
            by_donor = name and corpus.catalogue["split_unit"] == "donor"
            key = f"donor {name}" if by_donor else f"dataset {info.dataset_id}"
            splits_of.setdefault(key, set()).add(SPLITS[part])
    if corpus.catalogue["split_unit"] != "cell":
        shared = sorted(key for key, splits in splits_of.items() if len(splits) > 1)
        problems += [f"{key}: cells in {', '.join(sorted(splits_of[key]))}" for key in shared]


def _check_statistics(corpus: Corpus, problems: list[str], progress: Progress | None) -> None:
    stored = corpus.gene_stats
    found = gene_statistics(
        corpus.cells, corpus.splits["train"], target_sum=stored.target_sum, progress=progress
    )
    exact = ("n_expressing", "total_counts")
    close = ("mean_expressed", "mean_expressed_all", "var_expressed_all")
    wrong = [n for n in exact if not np.array_equal(getattr(stored, n), getattr(found, n))]
    # log1p differs in the last bit between processors.
    wrong += [n for n in close if not np.allclose(getattr(stored, n), getattr(found, n), 1e-9, 0)]
    problems += [f"gene_stats.npz: {name} does not fit the training cells" for name in wrong]


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
