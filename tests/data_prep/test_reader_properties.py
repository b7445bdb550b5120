"""Any dataset in any container: its counts come out exactly, or it is refused with a reason.

The truth is known before a file is written (`made_examples.py`), and adds up in Python integers.
Each dataset takes the public path, `convert_dataset` to the staged store, annotations and ledger
entry; at the end all of them go through `finalize`, `Corpus` and `check_sources`.

Covers readers.py, readers_anndata.py, readers_arrays.py, readers_gather.py, readers_hdf5.py,
readers_npz.py, readers_text.py and features.py of data_prep, beyond their own tests. Quick by
default; READER_EXAMPLES=1000 READER_SEED=1 draws that many other datasets for each container.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, seed, settings
from made_examples import GENES, Example, examples
from made_sources import CONTAINERS, SPARSE, scipy_sum, write

from data_prep.convert.convert import prepare_corpus
from data_prep.convert.one_dataset import convert_dataset
from data_prep.corpus.finalize import finalize
from data_prep.counts.proof import exact_counts
from data_prep.genes.gene_names import GeneResolver
from data_prep.ledger.ledger import LedgerEntry
from data_prep.manifest.manifest import Dataset
from data_prep.readers.open import open_source
from data_prep.staging.settings import Settings
from data_prep.verify.sources import check_sources
from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.files.obs_table import read_obs

N_EXAMPLES = int(os.environ.get("READER_EXAMPLES", "14"))
SEED = int(os.environ.get("READER_SEED", "0"))
"""Each container draws other datasets, the same ones in every run."""
SETTINGS = Settings(
    genes_hash=GENES.hash,
    min_genes=1,
    min_genes_mapped=1,
    min_share_mapped=0.0,
    min_counts_kept=0.0,
)
RESOLVER = GeneResolver(GENES)
_SPEECH = re.compile(
    r"object has no|NoneType|unhashable|not subscriptable|broadcast|out of bounds|Error\b|"
    r"positional argument|missing or wrong part"
)
"""What Python says of itself is no reason."""


def quick(container: str) -> settings:
    return settings(
        database=None,
        deadline=None,
        # A zarr folder takes three times as long as a file.
        max_examples=-(-N_EXAMPLES // (3 if container.startswith("zarr") else 1)),
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


def lossless(example: Example, found: np.ndarray, rows: np.ndarray) -> frozenset[int] | None:
    """Return which uncertain features were lost if they explain all that is not there, else None.

    Args:
        example: The dataset.
        found: (kept, genes) counts that came out.
        rows: (kept,) cells of the dataset.
    """
    unsure = [n for n, sure in enumerate(example.certain) if not sure]
    for number in range(len(unsure) + 1):
        for lost in itertools.combinations(unsure, number):
            truth = example.truth(frozenset(lost))
            kept = np.flatnonzero([sum(row) > 0 for row in truth.tolist()])
            if kept.tolist() == sorted(rows.tolist()) and (truth[rows] == found).all():
                return frozenset(lost)
    return None


def as_text(value: Any) -> str:
    """Return an annotation as it must come out."""
    if (
        value is None
        or value is pd.NA
        or (isinstance(value, float | np.floating) and value != value)
    ):
        return ""
    return str(value)


def verdict(example: Example, entry: LedgerEntry, corpus: Path) -> str:
    """Return `exact`, `lost: ...`, `refused: ...`, or `WRONG: ...` with what is wrong."""
    if entry["status"] != "ok":
        reason = entry["reason"]
        if not reason or _SPEECH.search(reason):
            return f"WRONG: no reason: {reason!r}"
        if example.must and not example.too_large and example.truth().sum():
            return f"WRONG: refused without need: {reason}"
        return f"refused: {reason}"
    folder = corpus / "staging" / entry["dataset_id"]
    store = CellStore(folder / "cells.zarr")
    rows = store.table("source_row")
    found = store.rows(range(len(store))).toarray().astype(object)
    lost = lossless(example, found, rows)
    if lost is None:
        truth = example.truth()
        return f"WRONG: rows {rows.tolist()}, off by {(found - truth[rows]).sum()}"
    kept = sum(store.row_total.tolist())
    if kept != found.sum():
        return "WRONG: totals"
    if abs(round((entry["counts_kept"] or 0) * entry["counts_input"]) - kept) > 1e-9 * kept:
        return f"WRONG: the ledger records {entry['counts_kept']} of {entry['counts_input']}"
    obs = read_obs(folder / "obs.parquet")
    wanted = {"barcode": example.made.names}
    if len(example.made.obs.columns):
        frame = example.made.obs
        wanted |= {name: [as_text(v) for v in frame[name].array] for name in frame.columns}
    if example.made.barcodes == []:
        wanted["barcode"] = [str(n) for n in range(example.made.n_cells)]
    # HDF5 lists the attributes of loom by name.
    if sorted(obs.columns) != sorted(wanted):
        return f"WRONG: annotations {list(obs.columns)}, wanted {list(wanted)}"
    for name, texts in wanted.items():
        if obs[name].tolist() != [texts[row] for row in rows]:
            return f"WRONG: annotation {name}"
    return f"lost: {len(lost)}" if lost else "exact"


@pytest.mark.thorough
@pytest.mark.parametrize("container", CONTAINERS)
def test_exact_or_refused(container: str, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    prepare_corpus(corpus, genes=GENES, settings=SETTINGS)
    number = itertools.count()
    verdicts: Counter[str] = Counter()
    staged: dict[str, Example] = {}

    @seed(SEED + zlib.crc32(container.encode()))
    @quick(container)
    @given(example=examples(container))
    def check(example: Example) -> None:
        name = f"d{next(number)}"
        folder = tmp_path / "in" / name
        folder.mkdir(parents=True)
        path = write(container, folder, example.made)
        dataset = Dataset(dataset_id=name, path=path, **example.options)  # type: ignore[arg-type]
        entry = convert_dataset(dataset, corpus=corpus, settings=SETTINGS, resolver=RESOLVER)
        said = verdict(example, entry, corpus)
        verdicts[said.split(":")[0]] += 1
        assert not said.startswith("WRONG"), said
        if entry["status"] == "ok":
            staged[name] = example
        else:
            shutil.rmtree(folder)

    check()
    # A test whose datasets were all refused would prove nothing.
    assert verdicts["exact"] > sum(verdicts.values()) / 3, verdicts
    through_the_corpus(corpus, staged)


def through_the_corpus(corpus: Path, staged: dict[str, Example]) -> None:
    """Finalize what was staged, and compare all cells with the truth and with their sources."""
    finalize(corpus, split_by="cell", validation_fraction=0)
    opened = Corpus(corpus)
    counts, source_row = opened.rows(range(len(opened))).toarray().astype(object), opened.row_source
    for code, info in enumerate(opened.datasets):
        here = np.flatnonzero(opened.row_dataset == code)
        example = staged[info.dataset_id]
        truth = example.truth()
        if all(example.certain):
            assert (counts[here] == truth[source_row[here]]).all(), info.dataset_id
    found = check_sources(opened, 10**6)
    assert found.problems == []
    assert found.cells == len(opened)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "container", [name for name in SPARSE if name[:3] in ("h5a", "zar", "npz")]
)
def test_blocks_are_what_scipy_adds_up(container: str, tmp_path: Path) -> None:
    number = itertools.count()

    @seed(SEED + zlib.crc32(container.encode()))
    @quick(container)
    @given(example=examples(container))
    def check(example: Example) -> None:
        made = example.made
        if made.types or made.genomes or example.too_large or np.dtype(made.dtype).kind == "f":
            return
        folder = tmp_path / str(next(number))
        folder.mkdir()
        path = write(container, folder, example.made)
        matrix = open_source(path, gene_share=RESOLVER.share).matrices[0]
        blocks = [exact_counts(block, where="X").toarray() for block in matrix.blocks()]
        np.testing.assert_array_equal(
            np.concatenate(blocks), scipy_sum(path, container.split("_")[1]).toarray()
        )
        shutil.rmtree(folder)

    check()
