import pytest

from data_prep.manifest.address import check_address, public_and_full, without_secrets


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


SIGNED = "X-Amz-Algorithm=AWS4&X-Amz-Credential=AK%2F1&X-Amz-Expires=60&X-Amz-Signature=5ec4e7"


@pytest.mark.parametrize(
    ("url", "public"),
    [
        (f"https://b.s3.org/a.h5ad?{SIGNED}", "https://b.s3.org/a.h5ad"),
        (f"https://b.s3.org/a.h5ad?part=2&{SIGNED}&v=3", "https://b.s3.org/a.h5ad?part=2&v=3"),
        ("https://x.org/a?x%2Damz%2Dsignature=5ec4e7", "https://x.org/a"),
        ("https://g.org/a.h5?GoogleAccessId=me&Expires=9&Signature=5ec4e7", "https://g.org/a.h5"),
        ("https://z.net/a.h5ad?sv=2&st=1&se=3&sr=b&sp=r&sig=5ec4e7", "https://z.net/a.h5ad"),
        ("https://d.cdn.net/a?Policy=5ec4e7&Signature=5&Key-Pair-Id=K", "https://d.cdn.net/a"),
        ("https://zenodo.org/a.h5ad?download=1&token=5ec4e7", "https://zenodo.org/a.h5ad?download=1"),
        ("ftp://me:5ec4e7@x.org/a.loom", "ftp://x.org/a.loom"),
        # What only looks alike stays: it tells one file from another.
        ("https://x.org/get?key=a.h5ad&se=2&expires=no", None),
        ("https://x.org/a@b.h5ad", None),
        ("s3://bucket/design=1/a.h5ad", None),
    ],
)  # fmt: skip
def test_what_opens_a_file_is_not_in_its_public_address(url, public):
    assert without_secrets(url) == (public or url)
    assert public_and_full(url, "") == (public or url, url)
    text = f"GET '{url}' failed (see <{url}>)"
    assert without_secrets(text) == text.replace(url, public or url)


def test_address_of_another_file_gives_way():
    assert public_and_full("http://x/b", "http://x/a?token=1") == ("http://x/b", "http://x/b")
    signed = "http://x/a?token=1"
    assert public_and_full("http://x/a", signed) == ("http://x/a", signed)
