"""Drafts a manifest from a folder tree: what is there, what each dataset holds, what is wrong.

    python -m data_prep manifest FOLDER [--out manifest.tsv] [--json]

Reads the first block of every data file below FOLDER (text tables and Matrix Market files are read
further). Writes a tab-separated manifest that `convert` takes as it is: one line per dataset, and a
comment line for every file that cannot be read or may be data in a format that is not read, with
the reason. Linked folders are followed, each folder is read once. A dataset that `convert` would
exclude is listed too; its note gives the reason. The same tree gives the same manifest.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

from data_prep.counts.candidates import choose_counts, restorable
from data_prep.genes.gene_names import GeneResolver, id_type_of
from data_prep.genes.species import find_other_species
from data_prep.manifest.manifest import OBS_ROLES
from data_prep.readers.open import detect_format, open_source
from data_prep.source.source import Annotations, Matrix, Source, UnusableError
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.files.atomic import read_file, write_atomic
from sclong_ds.progress import stage_progress

_DATA = re.compile(r"(?i)\.(h5ad|h5mu|h5|hdf5|zarr\.zip|loom|npz|mtx|csv|tsv|txt)(\.gz)?$")
_DATA_LIKE = re.compile(r"(?i)\.(rds|rdata|qs|h5seurat|tar|tgz|zip|7z|rar|xlsx|txt)(\.\w+)?$")
_MATRIX_FILE = re.compile(r"matrix\.mtx(\.gz)?$")
_MATRIX_PART = re.compile(r"(barcodes|features|genes)\.tsv(\.gz)?$")
_ZARR_MARKS = ("zarr.json", ".zgroup", ".zattrs")
_COLUMNS = (
    *("dataset_id", "path", "format", "organism", "tissue"),
    *(f"{role}_column" for role in OBS_ROLES),
    *("counts", "gene_column", "id_type", "n_cells", "note"),
)
_OBS_NAMES = {
    "donor": "donor_id donor patient_id patient individual subject_id subject participant_id",
    "sample": "sample_id sample library_id library orig_ident batch",
    "assay": "assay technology platform chemistry protocol method",
    "cell_type": "cell_type celltype cell_types celltypes cell_ontology_class annotation "
    "author_cell_type cell_type_fine louvain leiden",
}
"""Names of cell annotations that fit a role, best first; case and punctuation do not count."""
_LEAST_GENE_SHARE = 0.05
_LONGEST_ID = 100


class Problem(TypedDict):
    """A file that is not in the draft."""

    path: str
    reason: str


class DraftedDataset(TypedDict):
    """What was found out about one dataset."""

    dataset_id: str
    path: str
    format: str
    n_cells: int | None
    n_genes: int | None
    counts: str
    """Matrix with raw counts; auto where there is none."""
    gene_column: str
    id_type: str
    """auto where ids and symbols are mixed."""
    gene_names: dict[str, int]
    """Genes by how their name is resolved (`gene_settlement.KINDS`); empty where they are not."""
    organism: str
    """Guess from the gene names; empty where they say nothing."""
    tissue: str
    """The one value of the annotation `tissue`, if it has just one."""
    candidates: dict[str, list[str]]
    """Cell annotations that fit donor, sample, assay and cell_type, best first."""
    note: str
    """Why `convert` would exclude it; empty if nothing is known against it."""


class Draft(TypedDict):
    """The content of a folder tree."""

    datasets: list[DraftedDataset]
    unreadable: list[Problem]
    skipped: list[Problem]
    """Files that are not data, or not in a format that is read."""


def write_draft(draft: Draft, path: Path) -> None:
    """Write a draft as a manifest.

    Args:
        draft: From `draft_manifest`, with paths relative to the folder of the manifest.
        path: The manifest.

    Raises:
        ValueError: It exists with other content: somebody may have worked on it.
    """
    data = format_manifest(draft).encode()
    if path.exists() and read_file(path) != data:
        raise ValueError(f"{path} exists with other content; delete it or choose another --out")
    write_atomic(path, data)


def draft_manifest(folder: Path, *, genes: GeneVocabulary, relative_to: Path = Path()) -> Draft:
    """Look at every dataset below a folder.

    Args:
        folder: Top of the tree.
        genes: The vocabulary, for the kind and species of gene names.
        relative_to: Paths below this folder are given relative to it, others absolute.

    Raises:
        FileNotFoundError: No such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    resolver = GeneResolver(genes)
    draft = Draft(datasets=[], unreadable=[], skipped=[])
    paths = list(_find(folder, draft, relative_to))
    ids = _unique_ids([path.relative_to(folder) for path in paths], folder.resolve().name)
    with stage_progress("files") as progress:
        for number, (path, dataset_id) in enumerate(zip(paths, ids, strict=True), 1):
            _inspect(path, dataset_id, _shown(path, relative_to), resolver, draft)
            progress("manifest", number, len(paths))
    return draft


def format_manifest(draft: Draft) -> str:
    """Return the draft as the text of a manifest.

    Args:
        draft: From `draft_manifest`.
    """
    text = io.StringIO(newline="")
    table = csv.writer(text, delimiter="\t", lineterminator="\n")
    table.writerow(_COLUMNS)
    for dataset in draft["datasets"]:
        best = {f"{role}_column": names[0] for role, names in dataset["candidates"].items()}
        cells = {"n_cells": dataset["n_cells"] or "", **best}
        values = [cells.get(name, dataset.get(name, "")) for name in _COLUMNS]
        table.writerow([" ".join(str(value).split()) for value in values])
    for problem in draft["unreadable"]:
        text.write(f"# not read: {problem['path']}: {problem['reason']}\n")
    for problem in draft["skipped"]:
        if _DATA_LIKE.search(problem["path"]):
            shown = " ".join(problem["path"].split())
            text.write(f"# skipped: {shown} ({problem['reason']})\n")
    return text.getvalue()


def _find(folder: Path, draft: Draft, relative_to: Path) -> Iterator[Path]:
    """Yield the datasets below a folder in a fixed order; what is no data goes to the draft."""
    visited: set[tuple[int, int]] = set()

    def skip(error: OSError) -> None:
        shown = _shown(Path(error.filename), relative_to)
        draft["skipped"].append(Problem(path=shown, reason=f"cannot be read: {error.strerror}"))

    for parent, folders, names in os.walk(folder, onerror=skip, followlinks=True):
        here = Path(parent)
        place = here.stat()
        # A link may lead back up.
        if (place.st_dev, place.st_ino) in visited:
            folders.clear()
            continue
        visited.add((place.st_dev, place.st_ino))
        shown = _shown(here, relative_to)
        if any(name in _ZARR_MARKS for name in names):
            folders.clear()
            yield here
            continue
        if (here / "ledger").is_dir() and "settings.json" in names:
            folders.clear()
            draft["skipped"].append(Problem(path=shown, reason="a corpus folder"))
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        matrices = [name for name in names if _MATRIX_FILE.search(name)]
        if len(matrices) == 1 and _MATRIX_FILE.fullmatch(matrices[0]):
            yield here
            names = [name for name in names if name != matrices[0]]
        for name in sorted(names):
            if _MATRIX_PART.search(name):
                # The gene list of an npz file may be called genes.tsv.
                if not matrices and not any(other.endswith(".npz") for other in names):
                    reason = "part of a 10x folder, but there is no matrix.mtx(.gz) beside it"
                    draft["unreadable"].append(
                        Problem(path=_shown(here / name, relative_to), reason=reason)
                    )
            elif _DATA.search(name) and not name.startswith("."):
                yield here / name
            else:
                reason = "not read: unpack or export it" if _DATA_LIKE.search(name) else "no data"
                shown = _shown(here / name, relative_to)
                draft["skipped"].append(Problem(path=shown, reason=reason))


def _inspect(path: Path, dataset_id: str, shown: str, resolver: GeneResolver, draft: Draft) -> None:
    """Put one file or folder where it belongs in the draft."""
    optional = re.search(r"(?i)\.txt(\.gz)?$", path.name) is not None
    try:
        if shown != " ".join(shown.split()):
            raise ValueError("the name holds blanks that a manifest cannot; rename it")
        dataset = _look(path, dataset_id, shown, resolver)
    except (ValueError, OSError) as error:
        where = draft["skipped"] if optional else draft["unreadable"]
        where.append(Problem(path=shown, reason=" ".join(str(error).split())))
    else:
        if dataset is None:
            reason = "a table without gene names"
            draft["skipped"].append(Problem(path=shown, reason=reason))
        else:
            draft["datasets"].append(dataset)


def _look(path: Path, dataset_id: str, shown: str, resolver: GeneResolver) -> DraftedDataset | None:
    """Return what a dataset holds; None for a table of something else."""
    dataset = DraftedDataset(
        dataset_id=dataset_id,
        path=shown,
        format="auto",
        n_cells=None,
        n_genes=None,
        counts="auto",
        gene_column="auto",
        id_type="auto",
        gene_names={},
        organism="",
        tissue="",
        candidates={},
        note="",
    )
    try:
        source = open_source(path, gene_share=resolver.share)
    except UnusableError as error:
        dataset["format"], dataset["note"] = detect_format(path), str(error)
        return dataset
    dataset["format"], dataset["n_cells"] = source.format, len(source.barcodes)
    dataset["candidates"], dataset["tissue"] = _obs_candidates(source.obs), _tissue(source.obs)
    _look_at_genes(dataset, source.matrices[0], resolver)
    if source.format in ("csv", "tsv") and not dataset["organism"]:
        return None
    _look_at_values(dataset, source, resolver)
    return dataset


def _look_at_genes(dataset: DraftedDataset, matrix: Matrix, resolver: GeneResolver) -> None:
    if 0 in matrix.shape:
        raise ValueError(f"{matrix.name} has {matrix.shape[0]} cells and {matrix.shape[1]} genes")
    dataset["n_genes"] = matrix.shape[1]
    try:
        gene_map = resolver.resolve(matrix)
    except UnusableError as error:
        dataset["note"] = str(error)
        others = (
            find_other_species(names, resolver.knows, home=resolver.species)
            for names in matrix.gene_columns.values()
        )
        dataset["organism"] = next((other.name for other in others if other), "")
        return
    dataset["gene_column"], dataset["gene_names"] = gene_map.column, gene_map.kinds
    kinds = gene_map.kinds
    n_ids, n_names = kinds["ensembl"], kinds["symbol"] + kinds["alias"] + kinds["settled"]
    if (n_ids > 0) != (n_names > 0):
        dataset["id_type"] = id_type_of(gene_map.names)
    if (n_ids + n_names) > _LEAST_GENE_SHARE * len(gene_map.names):
        dataset["organism"] = resolver.species


def _look_at_values(dataset: DraftedDataset, source: Source, resolver: GeneResolver) -> None:
    try:
        matrix = choose_counts(source.matrices).matrix
    except UnusableError as error:
        dataset["note"] = dataset["note"] or f"{error}{restorable(source.matrices)}"
        return
    dataset["counts"], dataset["n_genes"] = matrix.name, matrix.shape[1]
    # raw.X has a gene table of its own, which may call the columns otherwise.
    if dataset["organism"] == resolver.species:
        _look_at_genes(dataset, matrix, resolver)


def _obs_candidates(obs: Annotations) -> dict[str, list[str]]:
    plain = {re.sub(r"[^a-z0-9]+", "_", str(name).lower()): str(name) for name in obs.columns}
    found = {
        role: [plain[name] for name in names.split() if name in plain]
        for role, names in _OBS_NAMES.items()
    }
    return {role: names for role, names in found.items() if names}


def _tissue(obs: Annotations) -> str:
    found, _ = obs.frame([name for name in obs.columns if name == "tissue"])
    values = found["tissue"].astype(str).unique() if "tissue" in found else []
    return str(values[0]) if len(values) == 1 else ""


def _shown(path: Path, relative_to: Path) -> str:
    full, base = path.resolve(), relative_to.resolve()
    return str(full.relative_to(base)) if full.is_relative_to(base) else str(full)


def _unique_ids(paths: Sequence[Path], top: str) -> list[str]:
    """Return a dataset id for each path: short where that is unique, else with the ending."""
    short = [_id_of(_DATA.sub("", str(path)).removesuffix(".zarr"), top) for path in paths]
    n_short = Counter(name.lower() for name in short)
    longer = [
        name if n_short[name.lower()] == 1 else _id_of(str(path), top)
        for name, path in zip(short, paths, strict=True)
    ]
    n_longer = Counter(name.lower() for name in longer)
    return [
        name if n_longer[name.lower()] == 1 else f"{name}-{_digest(path)}"
        for name, path in zip(longer, paths, strict=True)
    ]


def _id_of(text: str, top: str) -> str:
    text = top if text == "." else text
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", text.replace("/", "-")).lstrip("_.-") or "dataset"
    return name if len(name) <= _LONGEST_ID else f"{name[: _LONGEST_ID - 9]}-{_digest(text)}"


def _digest(path: object) -> str:
    return hashlib.sha256(str(path).encode()).hexdigest()[:8]
