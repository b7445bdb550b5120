"""Lines of text: bounded in length, gzip or not, decoded without loss."""

import gzip
from pathlib import Path

import pytest

from data_prep.readers.lines import name_columns, open_bytes, open_text, text_bytes


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz"])
def test_a_line_of_any_length_is_refused_before_it_is_in_memory(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, b"short\n" * 9 + b"x" * 3_000_000 + b"\nshort\n")
    with open_bytes(path, longest=2_000_000) as file:
        assert file.readline() == b"short\n"
        with pytest.raises(ValueError, match="holds a line of more than 2000000 bytes"):
            file.read()
    with open_bytes(path, longest=3_000_001) as file:
        assert file.read().count(b"\n") == 11


def test_many_lines_are_no_long_line(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tsv.gz", b"0123456789\n" * 300_000)
    with open_bytes(path, longest=1_000_000) as file:
        assert len(file.read()) == 3_300_000


def test_a_byte_order_mark_and_foreign_bytes(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tsv", b"\xef\xbb\xbfa\xff\n")
    with open_text(path) as file:
        assert file.read() == "a\udcff\n"


def test_no_more_names_are_read_than_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path / "names.tsv.gz", b"a\tb\n" * 100)
    assert [len(column) for column in name_columns(path, most=7)] == [7, 7]


def test_most_text_that_a_file_can_hold(tmp_path: Path) -> None:
    assert text_bytes(written(tmp_path / "a.tsv", b"abc")) == 3
    packed = written(tmp_path / "a.tsv.gz", b"a" * 10**7)
    assert text_bytes(packed) >= 10**7
