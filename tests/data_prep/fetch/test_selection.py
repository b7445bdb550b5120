import pytest

from data_prep.fetch.item import Item
from data_prep.fetch.selection import Filters, select

HUMAN, MOUSE = ["Homo sapiens", "NCBITaxon:9606"], ["Mus musculus", "NCBITaxon:10090"]


def item(name, **fields):
    fields.setdefault("terms", {"organism": [HUMAN]})
    return Item(dataset_id=name, url=f"https://x/{name}.h5ad", **fields)


def chosen(items, **filters):
    taken, left_out = select(items, Filters(**filters))
    assert len(taken) + sum(left_out.values()) == len(items)
    return "".join(item.dataset_id for item in taken), dict(left_out)


@pytest.mark.parametrize("word", ["human", "Homo sapiens", "homo SAPIENS", "NCBITaxon:9606"])
def test_organism(word):
    items = [item("a"), item("b", terms={"organism": [MOUSE]}), item("c", terms={})]
    mixed = item("d", terms={"organism": [HUMAN, MOUSE]})
    found = chosen([*items, mixed], organism=(word,))
    assert found == ("a", {"other organism": 2, "the list has no organism": 1})


@pytest.mark.parametrize("name", ["tissue", "assay", "disease", "suspension_type"])
def test_one_fitting_term_is_enough(name):
    items = [
        item("a", terms={name: [["Lung", "U:1"], ["blood", "U:2"]]}),
        item("b", terms={name: [["brain", "U:3"]]}),
        item("c", terms={}),
    ]
    wanted = {f"other {name}": 1, f"the list has no {name}": 1}
    assert chosen(items, **{name: ("lung",)}) == ("a", wanted)
    assert chosen(items, **{name: ("u:2", "x")}) == ("a", wanted)


def test_primary_only():
    items = [item("a", n_primary=3), item("b", n_primary=0), item("c")]
    wanted = {"no primary cell": 1, "the list has no primary_cell_count": 1}
    assert chosen(items, primary_only=True) == ("a", wanted)
    assert chosen(items) == ("abc", {})


def test_spatial_is_left_out_unless_asked_for():
    items = [item("a"), item("b", terms={"spatial": [["yes", ""]]})]
    assert chosen(items) == ("a", {"spatial": 1})
    assert chosen(items, spatial=True) == ("ab", {})


def test_collections_and_ids():
    items = [item("a", collection="k1", doi="10.1/A"), item("b", version="v2"), item("c")]
    assert chosen(items, collections=("k1",))[0] == "a"
    assert chosen(items, collections=("https://doi.org/10.1/a",))[0] == "a"
    assert chosen(items, ids=("v2", "c"))[0] == "bc"
    with pytest.raises(ValueError, match="dataset 'zz' of --ids not in the list"):
        chosen(items, ids=("a", "zz"))


def test_filters_of_a_lock_file_name_what_is_set():
    filters = Filters(tissue=("b", "a"), primary_only=True)
    assert filters.as_json() == {"tissue": ["a", "b"], "primary_only": True}
