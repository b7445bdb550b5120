"""Corpora that the tests of the loader share."""

import pytest
from loaded_cells import make_corpus


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """One with many small chunks and one with few large ones; both with a validation split."""
    folder = tmp_path_factory.mktemp("corpora")
    return [
        make_corpus(folder / "small", n_train=61, n_validation=10, chunk_entries=150),
        make_corpus(folder / "large", n_train=90, n_validation=7, chunk_entries=900),
    ]


@pytest.fixture
def corpus(corpora):
    return corpora[0]
