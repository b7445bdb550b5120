import pytest

from data_prep.manifest.address import check_address


@pytest.mark.parametrize(
    "url",
    ["https://x.org/a.h5ad", "s3://b/k/a.h5ad", "gs://b/a.h5", "ftp://x/a.loom", "file:///a.h5ad"],
)
def test_addresses_of_files(url):
    check_address(url)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("a.h5ad", "not the address"),
        ("https://x.org/", "not the address"),
        ("gopher://x/a.h5ad", "allowed: http"),
        ("https://x.org/s_matrix.mtx.gz", "one of several files"),
        ("https://x.org/features.tsv.gz", "one of several files"),
    ],
)
def test_other_addresses(url, words):
    with pytest.raises(ValueError, match=words):
        check_address(url)
