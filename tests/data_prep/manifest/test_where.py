"""Conditions on the annotations of cells.

Covers also `data_prep/annotations/words.py`.
"""

from __future__ import annotations

import pytest

from data_prep.manifest.where import PRIMARY_CELLS, Condition, conditions_of, parse_where
from data_prep.verify.plain_where import failed_where


def test_conditions_are_read_as_they_are_written() -> None:
    found = parse_where(" tissue = blood | bone marrow ;disease!=normal; donor_id!=;")
    assert found == (
        Condition("tissue", ("blood", "bone marrow"), equal=True),
        Condition("disease", ("normal",), equal=False),
        Condition("donor_id", ("",), equal=False),
    )
    assert [c.text for c in found] == ["tissue=blood|bone marrow", "disease!=normal", "donor_id!="]
    assert parse_where("  ") == ()
    # Ontology terms have colons, and values may hold an equals sign.
    assert parse_where("cell_type=a=b|CL:1")[0].values == ("a=b", "CL:1")


@pytest.mark.parametrize("text", ["tissue", "=blood", "!=blood", "tissue=a; blood", "a<3"])
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a condition; write COLUMN=VALUE"):
        parse_where(text)


@pytest.mark.parametrize(
    ("text", "value", "kept"),
    [
        ("a=x|y", "y", True),
        ("a=x|y", "Y", False),
        ("a!=x|y", "x", False),
        ("a!=x", "", True),
        ("a!=", "", False),
        ("a=True", "True", True),
        ("a=true", "TRUE", True),
        ("a=True", "1", True),
        ("a=True", "0", False),
        ("a!=False", "0", False),
        ("a!=False", "", True),
        ("a=1", "True", True),
        ("a!=1", "True", False),
        ("a!=1.0", "TRUE", False),
        ("a!=False", "0.0", False),
        ("a!=False", "F", False),
        ("a=True", "1.0", True),
        ("a=T", "TRUE", True),
        ("a!=1", "1.0", False),
        ("a!=1.0", "1", False),
        ("a=0.50", "0.5", True),
        ("a=1", "01", False),
        ("a=1", "10", False),
        ("a=1", "T", False),
        ("a=F", "0", False),
        ("a=F", "f", False),
        ("a=True|False", "false", True),
    ],
)
def test_what_holds(text: str, value: str, kept: bool) -> None:
    assert parse_where(text)[0].holds(value) is kept
    # The second finding of verify comes to the same.
    assert (failed_where([f"not where {text}"], {"a": value}) == "") is kept


def test_primary_cells_are_the_default_of_files_that_say_which_they_are() -> None:
    assert conditions_of("", ["x"]) == ()
    assert conditions_of("", ["is_primary_data"]) == (PRIMARY_CELLS,)
    asked = "is_primary_data=True|False"
    assert conditions_of(asked, ["is_primary_data"]) == parse_where(asked)
