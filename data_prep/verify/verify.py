"""Read a finished corpus again and check everything about it.

    python -m data_prep verify CORPUS [--sources N]

Compares every file (and the staged inputs that are still there) with its checksums
(`verify_files.py`), decodes every cell, recomputes totals, origins, duplicates, splits and gene
statistics, and compares them with what is stored. The report says of each link of the chain from
source files to cells whether it was checked. Writes nothing in the corpus.
"""

from __future__ import annotations

import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.annotations.columns import Annotations, ColumnPlan, column_of, plan_columns
from data_prep.corpus.gene_statistics import gene_statistics
from data_prep.corpus.split.plan import read_donors
from data_prep.corpus.split.rule import rule_of
from data_prep.passes.dedup import Progress, find_duplicates
from data_prep.verify.files import (
    CATALOGUE,
    CELLS,
    CHUNKS,
    COLUMNS,
    DUPLICATES,
    MEASURED,
    ORIGIN,
    ROWS,
    SOURCES,
    STATISTICS,
    Links,
    check_files,
)
from data_prep.verify.sources import DEFAULT_SEED, check_sources
from sclong_ds.annotations.columns import CellColumn, ColumnInfo
from sclong_ds.corpus.catalogue import SPLITS, read_catalogue
from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.corpus.corpus import Corpus

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
        n_files, splits and hash; the numbers are None where the catalogue is damaged. `links` says
        per link of the chain: link, checked (bool), files, reason (why it was not checked). With
        `sources`, `sources` says what was read again; a corpus with other problems is not.

    Raises:
        FileNotFoundError: No such folder, or not finalized.
    """
    corpus = Path(corpus)
    report: dict[str, Any] = dict.fromkeys(("n_cells", "n_genes", "n_values", "splits", "hash"))
    problems: list[str] = []
    links, n_files = Links(), 0
    try:
        catalogue = read_catalogue(corpus)
    except ValueError as error:
        problems.append(str(error))
    else:
        links.checked(CATALOGUE, 1)
        report |= {name: catalogue.get(name) for name in report}
        n_files = check_files(corpus, catalogue, links, problems)
        try:
            _check_contents(Corpus(corpus), links, problems, progress)
        except _DAMAGE as error:
            problems.append(f"contents not checked to the end: {_one_line(error)}")
        if not sources:
            links.skipped(SOURCES, "give --sources N to read N cells again")
        elif not problems:
            found = check_sources(Corpus(corpus), sources, seed=seed, progress=progress)
            report["sources"] = found.summary()
            problems += found.problems + (found.missing() if require_sources else [])
            links.checked(SOURCES, found.datasets)
            if not found.datasets:
                links.skipped(SOURCES, "the sources are gone, changed, or removed after conversion")
    return {
        "ok": not problems,
        "problems": problems[:MOST_PROBLEMS],
        "n_problems": len(problems),
        "n_files": n_files,
        "links": links.report(),
        **report,
    }


def _check_contents(
    corpus: Corpus, links: Links, problems: list[str], progress: Progress | None
) -> None:
    _check_catalogue(corpus, problems)
    readable = _check_cells(corpus, links, problems, progress)
    _check_rows(corpus, problems)
    links.checked(ROWS, len(corpus.datasets))
    _check_columns(corpus, links, problems)
    _check_origin(corpus, links, problems)
    if not readable:
        return
    with tempfile.TemporaryDirectory(prefix="sclong_ds-verify-") as scratch:
        repeated = find_duplicates(corpus.cells, Path(scratch) / "digests", progress=progress)
    if repeated.any():
        first = int(np.flatnonzero(repeated)[0])
        problems.append(f"cells.zarr: {repeated.sum()} cells repeat others, the first is {first}")
    links.checked(DUPLICATES, _n_shards(corpus))
    _check_statistics(corpus, problems, progress)
    links.checked(STATISTICS, 1)


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


def _check_cells(
    corpus: Corpus, links: Links, problems: list[str], progress: Progress | None
) -> bool:
    """Decode every chunk and compare it with the row tables; return whether all were readable."""
    cells, measured, dataset = corpus.cells, corpus.measured_genes, corpus.row_dataset
    # Damage of a table is reported once, and not for each chunk.
    tables = (cells.row_total, cells.row_nnz, cells.row_entries)
    n_values, readable, unmeasured = 0, True, -1
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
            ("row_total", totals, tables[0][first:last]),
            ("row_nnz", np.diff(counts.indptr), tables[1][first:last]),
        ):
            wrong = np.flatnonzero(found != stored)
            if len(wrong):
                problems.append(f"cells.zarr/{name}: wrong for cell {first + wrong[0]}")
        if not _increasing(counts.indices, counts.indptr):
            problems.append(f"cells.zarr: cells {first} to {last - 1}: genes are not in order")
        if measured is not None and unmeasured < 0:
            of_cell = np.repeat(dataset[first:last], np.diff(counts.indptr))
            wrong = np.flatnonzero(~measured[of_cell, counts.indices])
            if len(wrong):
                unmeasured = first + int(np.searchsorted(counts.indptr, wrong[0], "right")) - 1
        if progress:
            progress("cells", last, len(cells))
    if readable and n_values != cells.n_values:
        problems.append(f"cells.zarr: {n_values} values, its attributes record {cells.n_values}")
    if unmeasured >= 0:
        problems.append(f"measured_genes.npy: cell {unmeasured} has counts of a gene not measured")
    _note_cells(corpus, links)
    return readable


def _note_cells(corpus: Corpus, links: Links) -> None:
    """Note the links that decoding all cells has checked."""
    links.checked(CELLS, _n_shards(corpus))
    if corpus.measured_genes is None:
        links.skipped(MEASURED, "the corpus is of version 1")
        links.skipped(CHUNKS, "the corpus is of version 1")
    else:
        links.checked(MEASURED, 1)
        links.checked(CHUNKS, _n_shards(corpus))


def _n_shards(corpus: Corpus) -> int:
    return sum(name.startswith(("gap/c/", "count/c/")) for name in corpus.cells.file_names())


def _increasing(indices: np.ndarray, indptr: np.ndarray) -> bool:
    steps = np.diff(indices.astype(np.int64))
    borders = indptr[1:-1]
    steps[borders[(borders > 0) & (borders < len(indices))] - 1] = 1
    return bool((steps > 0).all())


def _check_rows(corpus: Corpus, problems: list[str]) -> None:
    """Check the datasets, splits, annotation rows and held-out groups of all cells."""
    dataset, obs_row = np.asarray(corpus.row_dataset), corpus.cells.table("obs_row")
    if len(dataset) and int(dataset.max()) >= len(corpus.datasets):
        problems.append(f"cells.zarr/dataset: no dataset {int(dataset.max())}")
        return
    for name in SPLITS:
        border = corpus.splits[name]
        found = np.bincount(dataset[border.start : border.stop], minlength=len(corpus.datasets))
        for info, n_cells in zip(corpus.datasets, found.tolist(), strict=True):
            if info.split_cells[name] != n_cells:
                problems.append(f"{info.dataset_id}: {n_cells} cells in {name}, "
                                f"corpus.json records {info.split_cells[name]}")  # fmt: skip
    splits_of: dict[str, set[str]] = {}
    ends = [corpus.splits[name].stop for name in SPLITS]
    # One sort instead of a look at all cells for each of a thousand datasets.
    order = np.argsort(dataset, kind="stable")
    borders = np.searchsorted(dataset, np.arange(len(corpus.datasets) + 1), sorter=order)
    rule = corpus.catalogue.get("split_rule")
    whole = rule is not None and rule_of(rule).whole_donors
    for code, info in enumerate(corpus.datasets):
        here = order[borders[code] : borders[code + 1]]
        rows = obs_row[here]
        if len(np.unique(rows)) != len(here):
            problems.append(f"{info.dataset_id}: a row of its annotation is used twice")
        n_staged = info.n_cells + info.duplicates_dropped
        if len(here) and int(rows.max()) >= n_staged:
            problems.append(f"{info.dataset_id}: a cell without annotation")
            continue
        donors, donor = read_donors(corpus.obs_path(info.dataset_id), n_staged, whole=whole)
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
    problems += _off_side(corpus, splits_of)


def _off_side(corpus: Corpus, splits_of: Mapping[str, set[str]]) -> list[str]:
    """Return the groups whose split is not the one that the rule of the corpus gives."""
    if corpus.catalogue["split_unit"] == "cell" or "split_rule" not in corpus.catalogue:
        return []
    rule = rule_of(corpus.catalogue["split_rule"])
    named = {f"dataset {name}" for name in rule.options.validation_datasets}
    return [
        f"{key}: in {', '.join(sorted(found))}, the rule of the split says {wanted}"
        for key, found in sorted(splits_of.items())
        if key not in named and found != {wanted := SPLITS[rule.side(key)]}
    ]


def _check_origin(corpus: Corpus, links: Links, problems: list[str]) -> None:
    """Compare source rows, totals and sizes with the staged cells, or else with each other."""
    order = np.argsort(corpus.row_dataset, kind="stable")
    borders = np.cumsum([0, *(info.n_cells for info in corpus.datasets)])
    n_staged = 0
    for code, info in enumerate(corpus.datasets):
        here = order[borders[code] : borders[code + 1]]
        obs_row, source_row = (corpus.cells.rows_of(n, here) for n in ("obs_row", "source_row"))
        by_row = np.argsort(obs_row)
        rows = source_row[by_row]
        most = info.n_cells_input or np.iinfo(np.int64).max
        if len(rows) and (
            (np.diff(rows) <= 0).any() or (rows < obs_row[by_row]).any() or rows[-1] >= most
        ):
            problems.append(f"cells.zarr/source_row: impossible rows of dataset {info.dataset_id}")
        folder = corpus.path / "staging" / info.dataset_id / "cells.zarr"
        if not folder.is_dir():
            continue
        n_staged += 1
        staged = CellStore(folder)
        if len(staged) != info.n_cells + info.duplicates_dropped:
            problems.append(f"{folder}: {len(staged)} cells, another number than finalize read")
            continue
        for name in ("source_row", "row_total", "row_nnz", "row_entries"):
            expected = staged.table(name)[obs_row]
            wrong = np.flatnonzero(corpus.cells.rows_of(name, here) != expected)
            if len(wrong):
                problems.append(
                    f"cells.zarr/{name}: not as staged for cell {int(here[wrong[0]])} of dataset "
                    f"{info.dataset_id}"
                )
    if n_staged:
        links.checked(ORIGIN, n_staged)
    else:
        links.skipped(ORIGIN, "staging is not there any more")


def _check_columns(corpus: Corpus, links: Links, problems: list[str]) -> None:
    """Compare the columns of annotations with the tables of the datasets."""
    stored = corpus.columns.stored
    if not stored:
        links.skipped(COLUMNS, "the corpus has none")
        return
    annotations = [
        Annotations(
            obs=corpus.obs_path(info.dataset_id),
            n_cells=info.n_cells + info.duplicates_dropped,
            tissue=info.tissue or "",
        )
        for info in corpus.datasets
    ]
    names = set()
    for plan in plan_columns(annotations):
        made = column_of(plan, annotations, corpus.cells)
        if made is None:
            continue
        info, codes = made
        names.add(info.name)
        if info not in stored and not (_stands_in(plan) and info.name in corpus.columns):
            problems.append(f"columns: {info.name} is not that of the annotations")
            continue
        if info in stored:
            found = corpus.columns[info.name].codes()
            wrong = np.flatnonzero((found != codes) & ((found == found) | (codes == codes)))
        if _stands_in(plan) and (info not in stored or len(wrong)):
            # Earlier versions let no other name stand in.
            before = column_of(replace(plan, sources=plan.sources[:1]), annotations, corpus.cells)
            wrong = np.flatnonzero(
                np.all([_differs(corpus.columns[info.name], m) for m in (made, before) if m], 0)
            )
        if len(wrong):
            problems.append(f"columns: {info.name} is wrong for cell {int(wrong[0])}")
    problems += [
        f"columns: no dataset has {info.name}" for info in stored if info.name not in names
    ]
    links.checked(COLUMNS, len(stored) + 1)


def _stands_in(plan: ColumnPlan) -> bool:
    """Tell whether a dataset may have the column by another name that is a column as well."""
    return len(plan.sources) > 1 and not plan.also


def _differs(column: CellColumn, made: tuple[ColumnInfo, NDArray[Any]]) -> NDArray[np.bool_]:
    """Return (cells,) True where a column of text has another value than one that was made."""
    places = {value: place for place, value in enumerate(column.values or ())}
    moved = np.array([places.get(value, -1) for value in made[0].values], np.int64)
    return moved[made[1]] != column.codes()


def _check_statistics(corpus: Corpus, problems: list[str], progress: Progress | None) -> None:
    stored = corpus.gene_stats
    # A corpus of an earlier version has no figures of measuring cells.
    measured = None if stored.n_measuring is None else corpus.measured_genes
    found = gene_statistics(
        corpus.cells,
        corpus.splits["train"],
        measured,
        target_sum=stored.target_sum,
        progress=progress,
    )
    exact = ("n_expressing", "total_counts", "n_measuring", "counts_measuring")
    close = ("mean_expressed", "mean_expressed_all", "var_expressed_all")
    wrong = [n for n in exact if not np.array_equal(getattr(stored, n), getattr(found, n))]
    # log1p differs in the last bit between processors.
    wrong += [n for n in close if not np.allclose(getattr(stored, n), getattr(found, n), 1e-9, 0)]
    problems += [f"gene_stats.npz: {name} does not fit the training cells" for name in wrong]


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
