import json

import pytest
from fault_server import entry

from data_prep.fetch.cellxgene import read_listing


@pytest.fixture
def listing(server, rules):
    def read(content, *, pages=0):
        server.listing, server.pages = content, pages
        return read_listing(server.url("/datasets"), rules)

    return read


def test_fields(listing):
    (item,), problems = listing([entry("a")])
    assert not problems
    assert (item.dataset_id, item.version, item.url) == ("a", "a-v1", "https://x/a-v1.h5ad")
    assert (item.size, item.n_cells, item.n_primary) == (1234, 100, 60)
    assert (item.title, item.doi, item.licence) == ("A title", "10.1/2", "CC BY 4.0")
    assert item.terms["tissue"] == [["lung", "UBERON:0002048"]]
    assert item.terms["suspension_type"] == [["cell", ""]]
    assert item.collection == "c1"


OPTIONAL = [name for name in entry("a") if name not in ("dataset_id", "assets")]


@pytest.mark.parametrize("value", ["absent", None, 7.5, {"x": 1}, []])
def test_any_optional_field_may_be_missing_or_odd(listing, value):
    items, problems = listing([entry(name, **{name: value}) for name in OPTIONAL])
    assert len(items) == len(OPTIONAL)
    assert not problems


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dataset_id": "absent"}, "without a dataset_id"),
        ({"dataset_id": "../x"}, "without a dataset_id"),
        ({"assets": "absent"}, "without an H5AD file"),
        ({"assets": [{"filetype": "RDS"}, 3]}, "without an H5AD file"),
        ({"assets": [{"filetype": "H5AD"}]}, "without the address of its file"),
        ({"assets": [{"filetype": "H5AD", "url": 5}]}, "without the address of its file"),
        ({"tombstone": True}, "withdrawn"),
    ],
)
def test_entries_of_no_use_are_counted(listing, changes, reason):
    items, problems = listing([entry("a"), entry("b", **changes), entry("a")])
    assert [item.dataset_id for item in items] == ["a"]
    assert problems == {reason: 1, "the same dataset twice": 1}


def test_spatial_by_field_and_by_assay(listing):
    visium = [{"label": "Visium Spatial Gene Expression", "ontology_term_id": "EFO:0010961"}]
    items, _ = listing([entry("a", spatial={"x": 1}), entry("b", assay=visium), entry("c")])
    assert ["spatial" in item.terms for item in items] == [True, True, False]


def test_pages_come_together_sorted(listing, server):
    items, _ = listing([entry(f"d{i}") for i in range(9, -1, -1)], pages=3)
    assert [item.dataset_id for item in items] == [f"d{i}" for i in range(10)]
    assert server.requests["/datasets"] == 4


def test_busy_server_is_asked_again(listing, server):
    server.fault = lambda path, number: ("503", "429", "drop", "")[number]
    assert len(listing([entry("a")])[0]) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<html>sign in</html>", "no JSON list but '<html>"),
        (b"", "no JSON list"),
        (b"[" * 100_000, "no JSON list"),
        ({"a": 1}, "a JSON list was expected, got dict"),
        ([], "the list|it is empty"),
        ([3, None], "2 entry that is no mapping"),
    ],
)
def test_what_is_no_list(listing, content, words):
    with pytest.raises(ValueError, match=words) as raised:
        listing(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert "/datasets" in str(raised.value)


def test_missing_list_is_not_asked_for_again(server, rules):
    with pytest.raises(ValueError, match="no such file on the server"):
        read_listing(server.url("/other"), rules)
    assert server.requests["/other"] == 1
