"""Datasets that are taken out of a corpus folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from staged_h5ad import (
    GENES,
    SETTINGS,
    counts,
    write,
)

from data_prep.convert.convert import convert
from data_prep.ledger.ledger import dataset_lock, read_ledger
from data_prep.ledger.pending import read_pending
from data_prep.staging.forget import forget


def test_forgotten_datasets_are_gone_until_a_manifest_lists_them_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    datasets = [write(tmp_path / f"{name}.h5ad", counts()) for name in "abc"]
    corpus, options = tmp_path / "c", {"genes": GENES, "settings": SETTINGS}
    convert(datasets, out=corpus, task=1, tasks=2, **options)
    with pytest.raises(ValueError, match="no dataset 'x'"):
        forget(corpus, ["b", "x"])
    with dataset_lock(corpus, "b"), pytest.raises(ValueError, match="a convert is at dataset 'b'"):
        forget(corpus, ["b"])
    assert [entry["dataset_id"] for entry in read_ledger(corpus)] == ["b"]
    forget(corpus, ["a", "b"])
    assert read_ledger(corpus) == []
    assert list((corpus / "staging").iterdir()) == []
    # The task of the one that is left is still its place in the manifest.
    assert [(p.dataset_id, p.task) for p in read_pending(corpus, [])] == [("c", 0)]
    with caplog.at_level("INFO"):
        convert(datasets[:1], out=corpus, **options)
    assert "1 dataset of this corpus not in this manifest: c (" in caplog.text
    assert [entry["dataset_id"] for entry in read_ledger(corpus)] == ["a"]
