"""CITATIONS.md: every dataset once, what is not known is said, no text breaks the table."""

from __future__ import annotations

from collections.abc import Mapping

from sclong_ds.corpus.catalogue import DatasetInfo
from sclong_ds.datasheet.citations import citations_text, doi_address, licences_text


def info(name: str, origin: Mapping[str, str] | None, n_cells: int = 10) -> DatasetInfo:
    nothing = dict.fromkeys(
        ("n_genes_mapped", "counts_kept", "organism", "tissue", "format", "source", "source_hash")
    )
    return DatasetInfo(
        dataset_id=name, n_cells=n_cells, duplicates_dropped=0, split_cells={"train": n_cells},
        origin=origin, **nothing,
    )  # fmt: skip


def test_every_dataset_is_named_with_what_is_known_of_it() -> None:
    cited = {"title": "A | B\n<i>", "licence": "CC BY 4.0", "citation": "Doe 2024"}
    datasets = [
        info("a", cited | {"version": "v1", "doi": "10.1234/x"}, 1200),
        info("b", cited),
        info("c", {"doi": "10.1234/y"}),
        info("d", {}),
        info("e", None),
        info("empty", cited, 0),
    ]
    text = citations_text(datasets)
    assert "1,240 cells of 5 datasets. Licences: not recorded (3 datasets), CC BY" in text
    assert "| a | A \\| B \\<i\\> | CC BY 4.0 | v1 | 10.1234/x | 1,200 |" in text
    assert "| c | not recorded | not recorded | not recorded | 10.1234/y | 10 |" in text
    # One citation of two datasets is one line; a DOI stands in for a citation.
    assert text.count("- Doe 2024 (a, b)") == 1
    assert "- https://doi.org/10.1234/y (c)" in text
    assert "- d (10 cells)\n- e (10 cells)" in text
    assert "empty" not in text


def test_corpus_without_any_record_has_no_table() -> None:
    text = citations_text([info("a", None)])
    assert "Licences: not recorded (1 dataset)." in text
    assert "|" not in text


def test_licences_by_number() -> None:
    found = [{"licence": "CC0"}, {"licence": "CC BY 4.0"}, {"licence": "CC BY 4.0"}]
    text = licences_text(info(str(i), origin) for i, origin in enumerate(found))
    assert text == "CC BY 4.0 (2 datasets), CC0 (1 dataset)"


def test_dois_in_any_form() -> None:
    for text in ("10.1038/s41-1", "https://doi.org/10.1038/s41-1", "doi:10.1038/s41-1"):
        assert doi_address(text) == "https://doi.org/10.1038/s41-1"
    assert doi_address("in press") is None
