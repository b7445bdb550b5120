"""Read drawn cells of a corpus again from their sources, by a second, slow way.

    python -m data_prep verify CORPUS --sources 1000

The cells are spread over the datasets and drawn with a fixed seed. Each is read once more from the
file that the ledger names (`plain_arrays.py`, `plain_text.py`: plain loops that share no code with
the readers that convert uses), its genes are mapped one by one, and it is compared exactly with the
corpus: the counts of every gene, the total, the barcode and the annotations kept. Some cells of the
source that are not in the corpus are read too: each must fail a threshold or repeat another cell.

Sources that are gone, that convert fetched and removed again, or that are no longer the files that
were converted, are listed; they are no problem of the corpus unless all sources are required. Names
are resolved by `GeneResolver`, and whether a file changed is told by the hash of convert; nothing
else is shared.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.convert.entry import read_hash
from data_prep.counts.option import parse_counts
from data_prep.genes.gene_names import GeneResolver
from data_prep.ledger.ledger import LedgerEntry, read_ledger
from data_prep.manifest.manifest import OBS_ROLES, Dataset
from data_prep.passes.dedup import Progress
from data_prep.source.source import Matrix
from data_prep.staging.outcome import UNPROVEN
from data_prep.staging.quality import MITOCHONDRIAL_IDS
from data_prep.verify.drawn_cells import cells_by_dataset, draw_cells, draw_dropped
from data_prep.verify.plain_arrays import PlainSource, plain_anndata, plain_loom, plain_tenx
from data_prep.verify.plain_proof import is_proven, restored
from data_prep.verify.plain_text import plain_matrix_market, plain_npz, plain_table
from data_prep.verify.plain_where import failed_where, where_columns, where_reasons
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.files.atomic import read_json
from sclong_ds.page.words import counted

DEFAULT_SEED = 0
BATCH = 256
"""Cells of a dataset that are read together; a cell takes about 130 bytes a value."""
_EXPRESSION = "Gene Expression"
_LEAST = ("min_genes", "min_counts")
_THRESHOLDS = ("min_counts", "max_counts", "max_mito_fraction")
_INVERT = "invert_log1p"
_WHOLE = 1e-6
_MOST_ALIKE = 10_000
"""Cells of the same total and number of genes that are looked at for a repeated one."""
_MOST_NAMES = 10
"""Datasets that a line names."""
_REMOVED = (
    "fetched from an address and removed after conversion (to compare them, convert files on disk)"
)
_READ_ERRORS = (
    ValueError,
    OSError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    OverflowError,
    StopIteration,
    EOFError,
)
"""What h5py, zarr, csv and plain loops raise on a file that is not what it was."""


@dataclass(slots=True)
class SourceReport:
    """What reading the sources again has shown."""

    cells: int = 0
    """Cells of the corpus that were compared."""
    dropped: int = 0
    """Cells of sources that are not in the corpus, and were found to be left out rightly."""
    datasets: int = 0
    """Datasets of which cells were compared."""
    gone: list[str] = field(default_factory=list)
    """Datasets whose source is not there."""
    removed: list[str] = field(default_factory=list)
    """Datasets whose source was fetched from an address for convert, and removed then."""
    changed: list[str] = field(default_factory=list)
    """Datasets whose source, or whose ledger entry, is another one now."""
    problems: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Return the numbers and the datasets that could not be compared."""
        return {
            "cells": self.cells,
            "dropped": self.dropped,
            "datasets": self.datasets,
            "gone": self.gone,
            "removed": self.removed,
            "changed": self.changed,
        }

    def missing(self) -> list[str]:
        """Return a problem for each dataset that could not be compared."""
        reasons = {
            "its source is gone": self.gone,
            f"its source was {_REMOVED}": self.removed,
            "its source is not the one that was converted": self.changed,
        }
        return [f"{name}: {reason}" for reason, names in reasons.items() for name in names]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawn:
    """What is looked at of one dataset."""

    entry: LedgerEntry
    cells: npt.NDArray[np.int64]
    """Positions in the corpus."""
    dropped: npt.NDArray[np.int64]
    """Rows of the source that are not in the corpus."""


def check_sources(
    corpus: Corpus,
    number: int,
    *,
    seed: int = DEFAULT_SEED,
    progress: Progress | None = None,
) -> SourceReport:
    """Compare drawn cells with their sources.

    Args:
        corpus: A finished corpus on this machine, with its ledger.
        number: Cells to draw; all where there are fewer.
        seed: Of the draw.
        progress: Called with ("sources", done, all), in cells.

    Raises:
        FileNotFoundError: No settings.json, which holds the thresholds of cells.
        ValueError: It is damaged.
    """
    report = SourceReport()
    entries = {entry["dataset_id"]: entry for entry in read_ledger(corpus.path)}
    settings = _settings(corpus.path)
    resolver = GeneResolver(corpus.genes)
    rng = np.random.default_rng(seed)
    places, cells_of = draw_cells(corpus, number, rng), cells_by_dataset(corpus)
    done, n_all = 0, sum(map(len, places.values()))
    for code, positions in places.items():
        info = corpus.datasets[code]
        entry = entries.get(info.dataset_id)
        state = _state(info.source_hash, entry)
        if entry is None or state != "same":
            lists = {"gone": report.gone, "removed": report.removed}
            lists.get(state, report.changed).append(info.dataset_id)
        else:
            there = corpus.cells.rows_of("source_row", cells_of[code])
            dropped = draw_dropped(there, entry, len(positions), rng)
            problems = []
            for start in range(0, len(positions), BATCH):
                part = slice(start, start + BATCH)
                drawn = _Drawn(entry=entry, cells=positions[part], dropped=dropped[part])
                try:
                    problems += _compare(corpus, drawn, resolver, settings)
                except _READ_ERRORS as error:
                    problems.append(f"cannot be read again ({type(error).__name__}: {error})")
                if progress:
                    progress("sources", done + min(start + BATCH, len(positions)), n_all)
            problems = list(dict.fromkeys(problems))
            report.problems += [f"{info.dataset_id}: {problem}" for problem in problems]
            report.cells += len(positions)
            report.dropped += len(dropped)
            report.datasets += 1
        done += len(positions)
        if progress:
            progress("sources", done, n_all)
    return report


def _settings(folder: Path) -> Mapping[str, Any]:
    """Return the thresholds that convert was given."""
    path, cure = folder / "settings.json", "restore it, or convert into a new folder"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; the thresholds of cells are in it; {cure}")
    found = read_json(path, cure=cure)
    missing = [name for name in _THRESHOLDS if not isinstance(found, dict) or name not in found]
    if missing:
        raise ValueError(f"{path}: damaged (no {missing[0]}); {cure}")
    return dict(found)


def sources_line(summary: Mapping[str, Any]) -> str:
    """Return what `SourceReport.summary` records, in one line.

    Args:
        summary: The summary.
    """
    text = (
        f"as in their sources: {counted(summary['cells'], 'cell')} of "
        f"{counted(summary['datasets'], 'dataset')}; left out rightly: "
        f"{counted(summary['dropped'], 'cell')}"
    )
    for name, what in (("gone", "gone"), ("removed", _REMOVED), ("changed", "changed")):
        if summary[name]:
            shown = ", ".join(summary[name][:_MOST_NAMES])
            more = ", ..." if len(summary[name]) > _MOST_NAMES else ""
            text += f"; {counted(len(summary[name]), 'source')} {what}: {shown}{more}"
    return text


def _state(source_hash: str | None, entry: LedgerEntry | None) -> str:
    """Return same, gone, removed or changed: what became of the files of a dataset."""
    if entry is None or entry["source_hash"] != source_hash or entry["status"] != "ok":
        return "changed"
    if "://" in entry["path"]:
        return "removed"
    try:
        found = read_hash(_dataset(entry))
    except FileNotFoundError:
        return "gone"
    except (ValueError, OSError):
        return "changed"
    return "same" if found == source_hash else "changed"


def _dataset(entry: LedgerEntry) -> Dataset:
    """Return what convert was asked for."""
    options: dict[str, Any] = dict(entry["options"])
    gene_list = options.pop("gene_list", "")
    options |= {name: int(options[name]) for name in _LEAST if name in options}
    return Dataset(
        dataset_id=entry["dataset_id"],
        path=Path(entry["path"]),
        gene_list=Path(gene_list) if gene_list else None,
        **options,
    )


def _compare(
    corpus: Corpus, drawn: _Drawn, resolver: GeneResolver, settings: Mapping[str, Any]
) -> list[str]:
    """Return what differs between the cells of one dataset and its source."""
    entry = drawn.entry
    rows = corpus.row_source[drawn.cells].tolist()
    dataset = _dataset(entry)
    matrices = parse_counts(entry["matrix"] or "X").matrices
    source = _read(dataset, entry, rows + drawn.dropped.tolist(), matrices, resolver)
    problems = []
    if source.n_cells != entry["n_cells_input"]:
        problems.append(f"{source.n_cells} cells, the ledger records {entry['n_cells_input']}")
    kept, wrong = _genes_read(source.features, entry)
    problems += wrong
    if len(kept) != entry["n_genes_input"]:
        problems.append(f"{len(kept)} genes, the ledger records {entry['n_genes_input']}")
        return problems
    target = _targets(source, kept, dataset, resolver)
    counted = {
        row: _counts([source.stored[name][row] for name in matrices], dataset.counts)
        for row in [*rows, *drawn.dropped.tolist()]
    }
    found = {row: _mapped(counts, target) for row, counts in counted.items()}
    problems += _differences(corpus, drawn.cells, rows, found)
    problems += _annotations(corpus, drawn.cells, rows, source, dataset, entry)
    mitochondrial = _mitochondrial(source, kept, target, resolver)
    reasons = where_reasons(entry["dropped_cells"], dataset.where)
    for row in rows:
        if reason := failed_where(reasons, source.annotations[row]):
            problems.append(f"row {row} of the source is there, though it is {reason}")
    for row in drawn.dropped.tolist():
        if failed_where(reasons, source.annotations[row]):
            continue
        # Convert drops cells that it cannot restore, and counts them.
        unproven = entry["dropped_cells"].get(UNPROVEN) and dataset.counts.startswith(_INVERT)
        if unproven and not is_proven(source.stored[matrices[0]][row], entry["restored"] or ""):
            continue
        inside = {feature: n for feature, n in counted[row].items() if feature in kept}
        share = _share(inside, mitochondrial)
        if not _left_out_rightly(corpus, found[row], share, entry, settings):
            problems.append(f"cell {row} of the source is missing, for no reason to be seen")
    return problems


def _read(
    dataset: Dataset,
    entry: LedgerEntry,
    rows: list[int],
    matrices: Sequence[str],
    resolver: GeneResolver,
) -> PlainSource:
    """Read the cells of a source in the slow way of its format."""
    path, kind = dataset.path, entry["format"]
    reasons = where_reasons(entry["dropped_cells"], dataset.where)
    columns = list(dict.fromkeys([*_columns(dataset, entry).values(), *where_columns(reasons)]))
    if kind in ("h5ad", "zarr"):
        return plain_anndata(path, rows=rows, matrices=matrices, columns=columns)
    if kind == "10x_h5":
        return plain_tenx(path, rows=rows, genome=dataset.genome)
    if kind == "loom":
        return plain_loom(path, rows=rows, matrices=matrices, columns=columns)
    if kind == "10x_mtx":
        return plain_matrix_market(path, rows=rows)
    if kind == "scipy_npz":
        return plain_npz(path, rows=rows, gene_list=dataset.gene_list)
    separator = {"csv": ",", "tsv": "\t"}[kind or ""]
    return plain_table(
        path,
        rows=rows,
        separator=separator,
        n_cells=entry["n_cells_input"],
        are_genes=lambda names: resolver.share(np.array(names, dtype=object)),
    )


def _columns(dataset: Dataset, entry: LedgerEntry) -> dict[str, str]:
    """Return the column of the source behind each annotation of the corpus."""
    roles = dataset.roles()
    return {
        name: roles.get(name, name) if name in OBS_ROLES else name for name in entry["obs_columns"]
    }


def _genes_read(
    features: Mapping[str, list[str]], entry: LedgerEntry
) -> tuple[set[int], list[str]]:
    """Return the features that were read as genes, and those that the file says are none."""
    n_features = len(next(iter(features.values()), []))
    runs = entry["features_read"] or [0, n_features]
    kept = {
        n for start, stop in zip(runs[::2], runs[1::2], strict=True) for n in range(start, stop)
    }
    problems = []
    for name, values in features.items():
        if _EXPRESSION not in values:
            continue
        wrong = sorted(n for n in kept if values[n] not in (_EXPRESSION, ""))
        problems += [
            f"feature {n} was read as a gene, its {name} is {values[n]}" for n in wrong[:3]
        ]
    genomes = {values[n] for n in kept for values in [features.get("genome", [])] if values} - {""}
    if len(genomes) > 1:
        problems.append(f"genes of several genomes were read: {', '.join(sorted(genomes))}")
    return kept, problems


def _targets(
    source: PlainSource, kept: set[int], dataset: Dataset, resolver: GeneResolver
) -> dict[int, int]:
    """Return the gene of the vocabulary of each feature that has one."""
    order = sorted(kept)
    # What the genome asked for puts in front of names is no part of them.
    front = re.compile("" if dataset.genome == "auto" else rf"{re.escape(dataset.genome)}[_.-]+")
    columns = {
        name: np.array([_without(front, values[n]) for n in order], dtype=object)
        for name, values in source.features.items()
        if name not in ("feature_types", "feature_type", "genome")
    }

    def nothing() -> Any:
        raise NotImplementedError

    table = Matrix(name="X", shape=(0, len(order)), gene_columns=columns, blocks=nothing)
    found = resolver.resolve(table, dataset.gene_column, dataset.id_type).target.tolist()
    return {n: gene for n, gene in zip(order, found, strict=True) if gene >= 0}


def _without(front: re.Pattern[str], name: str) -> str:
    match = front.match(name)
    return name[match.end() :] if match else name


def _counts(stored: Sequence[list[tuple[int, Any]]], option: str) -> dict[int, int]:
    """Return the counts of one cell by feature, added up over places and matrices.

    Raises:
        ValueError: A value that is no count.
    """
    if option.startswith(_INVERT):
        return restored(stored[0])
    if option.startswith("round:"):
        sums: Counter[int] = Counter()
        for feature, value in chain.from_iterable(stored):
            sums[feature] += float(value)  # type: ignore[assignment]
        return {feature: round(value) for feature, value in sums.items() if round(value)}
    counts: Counter[int] = Counter()
    for matrix in stored:
        for feature, value in matrix:
            whole = round(float(value)) if isinstance(value, float | np.floating) else int(value)
            if abs(whole - value) > _WHOLE:
                raise ValueError(f"{value} is not a count")
            counts[feature] += whole
    return {feature: number for feature, number in counts.items() if number}


def _mapped(counts: Mapping[int, int], target: Mapping[int, int]) -> dict[int, int]:
    genes: Counter[int] = Counter()
    for feature, number in counts.items():
        if feature in target:
            genes[target[feature]] += number
    return dict(genes)


def _differences(
    corpus: Corpus,
    cells: npt.NDArray[np.int64],
    rows: Sequence[int],
    found: Mapping[int, Mapping[int, int]],
) -> list[str]:
    """Return in which cells the corpus holds other counts than the source."""
    problems = []
    stored = corpus.rows(cells)
    for place, (cell, row) in enumerate(zip(cells.tolist(), rows, strict=True)):
        part = slice(stored.indptr[place], stored.indptr[place + 1])
        held = dict(zip(stored.indices[part].tolist(), stored.data[part].tolist(), strict=True))
        true = found[row]
        if held != true:
            genes = sorted(g for g in {*held, *true} if held.get(g, 0) != true.get(g, 0))
            gene = genes[0]
            problems.append(
                f"cell {cell} (row {row} of the source) differs in {len(genes)} genes: "
                f"{corpus.genes.ids[gene]} is {held.get(gene, 0)}, the source has "
                f"{true.get(gene, 0)}"
            )
        elif int(corpus.row_total[cell]) != sum(true.values()):
            problems.append(
                f"cell {cell}: its total is {corpus.row_total[cell]}, the source has "
                f"{sum(true.values())}"
            )
    return problems


def _annotations(
    corpus: Corpus,
    cells: npt.NDArray[np.int64],
    rows: Sequence[int],
    source: PlainSource,
    dataset: Dataset,
    entry: LedgerEntry,
) -> list[str]:
    """Return in which cells the corpus holds another barcode or annotation."""
    columns = _columns(dataset, entry)
    obs = corpus.obs(cells)
    problems = []
    for place, (cell, row) in enumerate(zip(cells.tolist(), rows, strict=True)):
        true = {"barcode": source.barcodes[row]}
        true |= {name: source.annotations[row][column] for name, column in columns.items()}
        for name, text in true.items():
            held = str(obs[name].iloc[place])
            # What UTF-8 cannot hold was repaired.
            if held != text.encode("utf-8", "replace").decode() and "\ufffd" not in held:
                problems.append(f"cell {cell}: {name} is {held!r}, the source has {text!r}")
    return problems


def _mitochondrial(
    source: PlainSource, kept: set[int], target: Mapping[int, int], resolver: GeneResolver
) -> set[int]:
    listed = {n for n, gene in target.items() if resolver.genes.ids[gene] in MITOCHONDRIAL_IDS}
    named = {
        n
        for values in source.features.values()
        for n in kept
        if values[n].startswith("MT-") or values[n].split(".")[0] in MITOCHONDRIAL_IDS
    }
    return listed | named


def _share(counts: Mapping[int, int], some: set[int]) -> float:
    total = sum(counts.values())
    return sum(number for feature, number in counts.items() if feature in some) / max(1, total)


def _left_out_rightly(
    corpus: Corpus,
    genes: Mapping[int, int],
    mitochondrial_share: float,
    entry: LedgerEntry,
    settings: Mapping[str, Any],
) -> bool:
    """Tell whether a cell fails a threshold or repeats one of the corpus."""
    total, n_genes = sum(genes.values()), len(genes)
    min_counts = int(entry["options"].get("min_counts") or settings["min_counts"])
    if not genes or n_genes < entry["min_genes"] or total < min_counts:
        return True
    if settings["max_counts"] is not None and total > settings["max_counts"]:
        return True
    limit = settings["max_mito_fraction"]
    if limit is not None and mitochondrial_share > limit:
        return True
    alike = np.flatnonzero((corpus.row_total == total) & (corpus.row_nnz == n_genes))
    stored = corpus.rows(alike[:_MOST_ALIKE])
    columns, values = (np.array(part) for part in zip(*sorted(genes.items()), strict=True))
    for place in range(stored.shape[0]):
        part = slice(stored.indptr[place], stored.indptr[place + 1])
        if (stored.indices[part] == columns).all() and (stored.data[part] == values).all():
            return True
    return len(alike) > _MOST_ALIKE
