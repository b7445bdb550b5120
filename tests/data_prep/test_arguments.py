import argparse

import pytest

from data_prep.arguments import byte_count


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("500", 500),
        ("2e9", 2 * 10**9),
        ("50MB", 5 * 10**7),
        ("0.5TB", 5 * 10**11),
        ("1.5 GiB", 3 * 2**29),
        ("16gib", 2**34),
        ("1b", 1),
    ],
)
def test_numbers_of_bytes(text, number):
    assert byte_count(text) == number


@pytest.mark.parametrize("text", ["", "0", "0.5", "0GB", "-1", "1..2GB", "1e999", "5 apples", "GB"])
def test_what_is_no_number_of_bytes(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be bytes such as"):
        byte_count(text)
