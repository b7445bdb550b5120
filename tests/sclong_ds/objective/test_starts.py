"""Where training starts: the cell's vector, from the training cells of a corpus."""

import dataclasses
import shutil

import numpy as np
import torch
from scipy.sparse import csr_matrix

from sclong_ds.config.load import load_config
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.transform import log1p_normalise
from sclong_ds.model.values.cell_vector import above_centre, above_depth, principal_directions
from sclong_ds.objective.starts import RESIDUALS_SCALE, cell_start, first_output
from sclong_ds.training.build import make_model


def with_start(kind):
    return dataclasses.replace(load_config("sclong_tiny").model, cell_vector=kind, base_dim=5)


def test_it_is_made_of_the_training_cells_alone(small_corpus):
    corpus = Corpus(small_corpus)
    found = cell_start(with_start("svd"), corpus)
    counts = corpus.rows(corpus.split("train"))
    values = csr_matrix(log1p_normalise(counts, target_sum=1e4))
    mean = corpus.gene_stats.mean_expressed
    assert found is not None
    assert np.array_equal(found.centre, mean)
    assert found.directions is not None
    assert found.directions.shape == (300, 5)
    wanted = principal_directions(above_centre(values, mean), 5)
    assert np.allclose(found.directions, wanted, atol=1e-5)
    everyone = csr_matrix(log1p_normalise(corpus.rows(np.arange(len(corpus))), target_sum=1e4))
    other = principal_directions(above_centre(everyone, mean), 5)
    assert not np.allclose(found.directions, other, atol=1e-3)


def test_that_of_residuals_is_made_of_what_depth_does_not_explain(small_corpus):
    corpus, model = Corpus(small_corpus), with_start("residuals")
    found = cell_start(model, corpus)
    values = csr_matrix(log1p_normalise(corpus.rows(corpus.split("train")), target_sum=1e4))
    level = first_output(model, corpus.gene_stats)
    assert found is not None
    assert found.directions is not None
    assert np.array_equal(found.centre, level)
    assert found.scale == RESIDUALS_SCALE
    wanted = principal_directions(above_depth(values, np.asarray(level)), 5)
    assert np.allclose(found.directions, wanted, atol=1e-5)
    centred = principal_directions(above_centre(values, corpus.gene_stats.mean_expressed), 5)
    assert not np.allclose(found.directions, centred, atol=1e-3)


def test_without_directions_no_cell_is_read(small_corpus, monkeypatch):
    corpus = Corpus(small_corpus)
    monkeypatch.setattr(Corpus, "rows", None)
    assert cell_start(with_start("none"), corpus) is None
    found = cell_start(with_start("random"), corpus)
    assert found is not None
    assert found.directions is None


def test_a_model_that_will_be_filled_reads_no_cell(small_corpus, monkeypatch):
    corpus = Corpus(small_corpus)
    model = dataclasses.replace(
        load_config("sclong_tiny").model, cell_vector="svd", gene_encoder="embedding",
        top_seq_len=64,
    )  # fmt: skip
    torch.manual_seed(3)
    whole = make_model(model, corpus, cell_start(model, corpus))
    monkeypatch.setattr(Corpus, "rows", None)
    torch.manual_seed(3)
    rest = make_model(model, corpus, None)
    started = {"cell_vector.centre", "cell_vector.vectors", "head.cell_weight"}
    for (name, one), other in zip(whole.named_parameters(), rest.parameters(), strict=True):
        assert torch.equal(one, other) == (name not in started), name


def test_damaged_cells_are_left_out_and_named(small_corpus, tmp_path, caplog):
    shutil.copytree(small_corpus, tmp_path / "corpus")
    for shard in sorted((tmp_path / "corpus" / "cells.zarr" / "count" / "c").iterdir()):
        shard.write_bytes(b"")
    found = cell_start(with_start("svd"), Corpus(tmp_path / "corpus"))
    assert found is not None
    assert found.directions is not None
    assert found.directions.shape == (300, 0)
    assert "without some cells" in caplog.text
