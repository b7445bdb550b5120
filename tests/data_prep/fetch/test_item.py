import pytest

from data_prep.fetch.item import Item, items_of, manifest_text, path_in
from data_prep.manifest.manifest import read_manifest


def test_list_of_addresses():
    lines = ["# mine", "", "https://x.org/a b.h5ad?k=1", "liver\thttps://x.org/c.csv.gz"]
    found = items_of(lines, where="list.txt")
    assert [(item.dataset_id, item.file_name) for item in found] == [
        ("a_b", "a_b.h5ad"),
        ("liver", "liver.csv.gz"),
    ]


def test_same_name_in_two_folders_stays_apart_whatever_the_order():
    lines = ["https://x.org/1/a.h5ad", "https://x.org/2/A.h5ad", "https://x.org/1/a.h5ad"]
    found = items_of(lines, where="x")
    assert len({item.dataset_id.lower() for item in found}) == 2
    again = items_of(lines[::-1], where="x")
    assert {item.url: item.dataset_id for item in again} == {
        item.url: item.dataset_id for item in found
    }


def test_every_wrong_line_is_named():
    with pytest.raises(ValueError, match=r"(?s)list: line 1: .*line 3: .*id 'x' twice"):
        items_of(["a.h5ad", "x\thttps://x.org/1.h5ad", "../y\thttp://x/b.h5ad", "x\thttp://x/c.h5"],
                 where="list")  # fmt: skip


def test_manifest_is_read_by_convert(tmp_path):
    item = Item(
        dataset_id="d1",
        url="https://x.org/v1.h5ad",
        size=12,
        sha256="ab" * 32,
        version="v1",
        title='A "title"\twith blanks\n# and a line',
        doi="10.1/2",
        licence="CC BY 4.0",
        citation="Somebody",
        n_cells=7,
        terms={
            "organism": [["Homo sapiens", "NCBITaxon:9606"]],
            "tissue": [["lung", ""], ["x", ""]],
        },
        schema="cellxgene",
    )
    path = tmp_path / "m.tsv"
    path.write_text(manifest_text([(item, "d1.h5ad")], missing=[(item, "gone\nnow")]))
    (dataset,) = read_manifest(path)
    assert dataset.path == path_in(tmp_path, item)
    assert (dataset.organism, dataset.tissue) == ("Homo sapiens", "lung, x")
    assert (dataset.bytes, dataset.sha256, dataset.version) == (12, "ab" * 32, "v1")
    assert (dataset.title, dataset.licence) == ('A "title" with blanks # and a line', "CC BY 4.0")
    assert (dataset.doi, dataset.citation, dataset.url) == ("10.1/2", "Somebody", item.url)
    assert dataset.donor_column == "donor_id"
    assert "# not fetched: d1: gone now" in path.read_text()
