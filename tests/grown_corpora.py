"""Corpora that grow by parts, and what compares them with one that is finalized at once."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
from cell_values import as_tuples

from data_prep.corpus.finalize import finalize
from sclong_ds.corpus.catalogue import SPLITS
from sclong_ds.corpus.corpus import Corpus

SHARED = ("near_kept", "n_cells", "duplicates_dropped", "near_dropped", "split_cells", "n_donors")


def with_datasets(made: Path, corpus: Path, names: str) -> Path:
    """Bring datasets into a folder, as a later convert does."""
    corpus.mkdir(exist_ok=True)
    for name in ("settings.json", "genes.tsv"):
        if not (corpus / name).exists():
            shutil.copyfile(made / name, corpus / name)
    for name in names:
        shutil.copytree(made / "staging" / name, corpus / "staging" / name)
        (corpus / "ledger").mkdir(exist_ok=True)
        shutil.copyfile(made / "ledger" / f"{name}.json", corpus / "ledger" / f"{name}.json")
    return corpus


def grown(made: Path, corpus: Path, steps: list[str], **options: str) -> Path:
    for names in steps:
        finalize(with_datasets(made, corpus, names), **options)
    return corpus


def at_once(made: Path, corpus: Path, like: Path, **options: str) -> Path:
    """Finalize all datasets at once by the rule of a split that is there."""
    with_datasets(made, corpus, "abcde")
    shutil.copyfile(like / "split.json", corpus / "split.json")
    finalize(corpus, **options)
    return corpus


def sums(folder: Path) -> dict[str, tuple[str, int]]:
    """SHA-256 and time of change of every finished file."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0][0] != "."
    }


def cells_of(corpus: Corpus, split: str) -> Counter[tuple]:
    rows = corpus.split(split)
    origin = [corpus.datasets[code].dataset_id for code in corpus.row_dataset[rows]]
    names = ["cell_type", "age", "is_primary_data", "donor", "donor_id", "tissue", "note", "score"]
    names += ["cell_type_ontology_term_id", "disease", "disease_ontology_term_id"]
    obs = corpus.obs(rows, columns=names)
    texts = obs.astype(str).to_numpy().tolist()
    counts = as_tuples(corpus.rows(rows))
    return Counter(
        (name, row, *text, cell)
        for name, row, text, cell in zip(
            origin, corpus.row_source[rows].tolist(), map(tuple, texts), counts, strict=True
        )
    )


def assert_the_same(one: Corpus, other: Corpus) -> None:
    """The same cells in the same splits, and all that is told of them."""
    assert len(one) == len(other)
    for split in SPLITS:
        assert cells_of(one, split) == cells_of(other, split)
    mine, theirs = ({d.dataset_id: d for d in c.datasets} for c in (one, other))
    assert {*mine} == {*theirs}
    for name, info in mine.items():
        for key in SHARED:
            assert getattr(info, key) == getattr(theirs[name], key), (name, key)
    for name in ("held_out", "split_shares", "split_unit", "n_values", "duplicates_dropped"):
        assert one.catalogue[name] == other.catalogue[name], name
    for name, values in vars(one.gene_stats).items():
        np.testing.assert_allclose(values, getattr(other.gene_stats, name), rtol=1e-12)
        if np.asarray(values).dtype.kind == "i":
            np.testing.assert_array_equal(values, getattr(other.gene_stats, name))
    assert {*one.columns} == {*other.columns}
    assert one.columns.stored == other.columns.stored


def dying(path: Path) -> None:
    raise Killed(path)


class Killed(BaseException):
    """As SIGKILL: nothing is put in order after it."""
