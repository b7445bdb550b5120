"""The `counts` entry: what it names, and what it cannot be."""

import pytest

from data_prep.counts.option import parse_counts


@pytest.mark.parametrize(
    ("text", "how", "matrices"),
    [
        ("auto", "auto", ()),
        ("X", "named", ("X",)),
        ("layers/a+b", "named", ("layers/a+b",)),
        ("layers/spliced+layers/unspliced", "named", ("layers/spliced", "layers/unspliced")),
        ("X+raw.X+layers/a b", "named", ("X", "raw.X", "layers/a b")),
        ("layers/X+Xtra", "named", ("layers/X+Xtra",)),
        ("round:X", "round", ("X",)),
        ("round:layers/S+layers/U", "round", ("layers/S", "layers/U")),
        ("invert_log1p", "invert", ()),
        ("invert_log1p:raw.X", "invert", ("raw.X",)),
    ],
)
def test_an_entry_names_matrices_and_how_to_take_them(
    text: str, how: str, matrices: tuple[str, ...]
) -> None:
    option = parse_counts(text)
    assert (option.how, option.matrices, option.text) == (how, matrices, text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "Y", "round", "round:", "round:auto", "layers/", "X+", "X+Y", "invert_log1p:Z"),
        *("invert_log1p:X+raw.X", "sum:X", "raw.X:X", "AUTO"),
    ],
)
def test_what_is_no_entry_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(ValueError, match=r"allowed: auto, X, .*MATRIX\+MATRIX, round:MATRIX, inv"):
        parse_counts(text)


def test_a_matrix_is_added_once() -> None:
    with pytest.raises(ValueError, match="adds the same matrix twice"):
        parse_counts("X+layers/a+X")
