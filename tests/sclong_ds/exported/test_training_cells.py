"""Digests of training cells: which cells they hold, what a model folder tells, and where not."""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from exported import named_genes, write_model
from scipy.sparse import csr_matrix

from sclong_ds.config.load import load_config
from sclong_ds.config.sections import RunConfig
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.exported import model_dir, training_cells
from sclong_ds.exported.manifest import check_files
from sclong_ds.exported.training_cells import TrainingCells, read_training_cells

TEN = csr_matrix(np.random.default_rng(0).poisson(1.0, (10, 40)).astype(np.float32))


def of(counts: csr_matrix, *, complete: bool = True) -> TrainingCells:
    digests = np.unique(training_cells.short_digests(counts))
    return TrainingCells(digests=digests, datasets=("made",), complete=complete)


def config_of(corpus: Path, **run: str) -> RunConfig:
    config = load_config("sclong_tiny")
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, corpus=str(corpus)),
        run=dataclasses.replace(config.run, **run),
    )


def cells_of(config: RunConfig, *, corpus_hash: str) -> training_cells.TrainingCells | None:
    return training_cells.training_cells_of(
        config.data, init_from=config.run.init_from, corpus_hash=corpus_hash
    )


def test_holds_equal_counts_alone_whatever_their_type_and_order() -> None:
    known = of(TEN[:6])
    assert known.hold(TEN).tolist() == [True] * 6 + [False] * 4
    assert known.hold(TEN.astype(np.int64)).sum() == 6
    unsorted = TEN[:6].copy()
    for start, stop in zip(unsorted.indptr[:-1], unsorted.indptr[1:], strict=True):
        unsorted.indices[start:stop] = unsorted.indices[start:stop][::-1].copy()
        unsorted.data[start:stop] = unsorted.data[start:stop][::-1].copy()
    unsorted.has_sorted_indices = False
    assert known.hold(unsorted).all()
    other = TEN[:6].copy()
    other.data[other.indptr[:-1]] += 1
    assert not known.hold(other).any()
    assert not of(TEN[:0]).hold(TEN).any()


def test_a_run_trains_on_the_training_split(small_corpus: Path) -> None:
    corpus = Corpus(small_corpus)
    known = cells_of(config_of(small_corpus), corpus_hash=corpus.hash)
    assert known is not None
    assert (known.datasets, known.complete) == (("immune_a",), True)
    train, validation = (corpus.rows(corpus.split(name)) for name in ("train", "validation"))
    assert len(known.digests) == train.shape[0]
    assert known.hold(train).all()
    assert not known.hold(validation).any()


def test_datasets_of_weight_0_are_not_trained_on(small_corpus: Path, tmp_path: Path) -> None:
    corpus = Corpus(small_corpus)
    config = config_of(small_corpus)
    weights = np.array([0 if d.dataset_id == "immune_a" else 1 for d in corpus.datasets])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_cells, "weights_of", lambda *_: weights)
        known = cells_of(config, corpus_hash=corpus.hash)
    assert known is not None
    assert (len(known.digests), known.datasets) == (0, ())


def test_cells_of_the_model_that_training_started_from_count(
    small_corpus: Path, tmp_path: Path
) -> None:
    hash_ = Corpus(small_corpus).hash
    silent = cells_of(config_of(small_corpus, init_from=str(tmp_path)), corpus_hash=hash_)
    assert silent is not None
    assert not silent.complete
    assert "does not tell its own" in training_cells.share_in_training(silent, 1, 2)
    of(TEN).write(tmp_path)
    both = cells_of(config_of(small_corpus, init_from=str(tmp_path)), corpus_hash=hash_)
    assert both is not None
    assert (both.datasets, both.complete) == (("immune_a", "made"), True)
    assert len(both.digests) == len(silent.digests) + 10
    assert (np.diff(both.digests.astype(object)) > 0).all()


def test_without_the_corpus_of_the_run_nothing_is_told(
    small_corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert cells_of(config_of(tmp_path), corpus_hash="x") is None
        assert cells_of(config_of(small_corpus), corpus_hash="x") is None
    assert "another corpus by now" in caplog.text
    assert caplog.text.count("export where the corpus is") == 2


def test_a_model_folder_carries_them_sealed_and_an_earlier_one_leaves_it_unknown(
    tmp_path: Path,
) -> None:
    folder = write_model(tmp_path, named_genes(40), seed=0, training_cells=of(TEN))
    read = read_training_cells(folder)
    assert read is not None
    assert read.hold(TEN).all()
    assert read.datasets == ("made",)
    assert training_cells.share_in_training(read, 3, 9) == "3 of 9 cells were in training"
    assert "10 distinct training cells of 1 dataset: made" in (folder / "README.md").read_text()
    assert check_files(folder)
    path = folder / training_cells.TRAINING_CELLS
    path.write_bytes(path.read_bytes()[:-5] + b"other")
    with pytest.raises(ValueError, match="training_cells"):
        model_dir.load_model(folder)
    (tmp_path / "earlier").mkdir()
    earlier = write_model(tmp_path / "earlier", named_genes(40), seed=0)
    assert read_training_cells(earlier) is None
    assert "not known" in training_cells.share_in_training(None, 0, 9)
    assert "does not tell which cells" in (earlier / "README.md").read_text()


def test_a_validation_set_is_compared_with_that_of_the_model(
    small_corpus: Path, tmp_path: Path
) -> None:
    corpus = Corpus(small_corpus)
    data, n_cells = config_of(small_corpus).data, 50
    digests = training_cells.validation_digests(corpus, n_cells)
    held_out = corpus.rows(corpus.split("validation")[:n_cells])
    assert np.array_equal(digests, training_cells.short_digests(held_out))
    facts = training_cells.validation_cells_of(data, n_cells=n_cells, corpus_hash=corpus.hash)
    assert facts == training_cells.validation_facts(digests[::-1])
    trained = cells_of(config_of(small_corpus), corpus_hash=corpus.hash)
    assert trained is not None
    trained.write(tmp_path)
    provenance = tmp_path / "provenance.json"
    provenance.write_text(json.dumps({"validation_cells": facts}))
    warnings = training_cells.validation_warnings
    assert warnings(tmp_path, digests) == []
    # Seven of the held-out cells of a grown corpus were trained on.
    moved = digests.copy()
    moved[3:10] = trained.digests[:7]
    other, seen = warnings(tmp_path, moved)
    assert "the validation set is not that of the model's training (50 cells, 50 there)" in other
    assert "7 of the 50 validation cells were in the training of the model" in seen
    assert "(20 cells, 50 there)" in warnings(tmp_path, digests[:20])[0]
    dataclasses.replace(trained, complete=False).write(tmp_path)
    assert warnings(tmp_path, digests) == ["the model does not tell all of its training cells"]
    for path in (provenance, tmp_path / training_cells.TRAINING_CELLS):
        path.unlink()
    assert [line[:24] for line in warnings(tmp_path, digests)] == ["the model does not tell "] * 2
