"""Many datasets of every format, some damaged, through the commands of a job array."""

from __future__ import annotations

from pathlib import Path

from benchmarks.simulate_datasets import simulate
from data_prep.ledger.ledger import read_ledger
from sclong_ds.corpus.corpus import Corpus


def test_simulated_array(tmp_path: Path) -> None:
    """`simulate` itself checks the outcome of every dataset, finalize and verify."""
    result = simulate(tmp_path / "sim", 24, tasks=2, again=False)
    # Datasets 10 and 21 are a cut file and a log-normalised one; 1 and 21 would repeat their
    # neighbours' cells.
    assert result["statuses"] == {"ok": 22, "failed": 1, "excluded": 1}
    ledger = {entry["dataset_id"]: entry for entry in read_ledger(tmp_path / "sim" / "corpus")}
    assert len(ledger) == 24
    assert "cut short" in ledger["d0010"]["reason"]
    assert {"h5ad", "10x_h5", "10x_mtx", "loom", "csv"} <= {e["format"] for e in ledger.values()}
    corpus = Corpus(tmp_path / "sim" / "corpus")
    repeated = {info.dataset_id: info.duplicates_dropped for info in corpus.datasets}
    assert repeated.pop("d0001") == ledger["d0000"]["n_cells"]
    assert result["duplicates_dropped"] == ledger["d0000"]["n_cells"]
    assert not any(repeated.values())
    n_staged = sum(entry["n_cells"] for entry in ledger.values())
    assert result["n_cells"] == len(corpus) == n_staged - ledger["d0000"]["n_cells"]
