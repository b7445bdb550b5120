"""What a file states of its source, and what is read out of CELLxGENE's citation."""

import pytest

from data_prep.source.about import about

CITATION = (
    "Publication: https://doi.org/10.1126/science.abl4896 Dataset Version: "
    "https://datasets.cellxgene.cziscience.com/53d208b0-2cfd.h5ad curated and distributed by CZ "
    "CELLxGENE Discover in Collection: https://cellxgene.cziscience.com/collections/e5f5"
)


def test_citation_of_cellxgene() -> None:
    assert about({"title": " Lung\n atlas", "citation": CITATION, "schema_version": "5.0.0"}) == {
        "title": "Lung atlas",
        "doi": "10.1126/science.abl4896",
        "version": "53d208b0-2cfd",
        "licence": "CC BY 4.0",
        "citation": CITATION,
        "schema_version": "5.0.0",
    }


@pytest.mark.parametrize(
    ("texts", "facts"),
    [
        ({}, {}),
        ({"title": "", "citation": "Doe et al."}, {"citation": "Doe et al."}),
        ({"license": "CC0", "doi": "10.1/2"}, {"licence": "CC0", "doi": "10.1/2"}),
        (
            {
                "citation": CITATION[CITATION.index("Dataset") :],
                "licence": "own",
                "doi": "10.9999/z",
            },
            {"doi": "10.9999/z", "version": "53d208b0-2cfd", "licence": "own"},
        ),
    ],
)
def test_what_is_not_stated_is_absent(texts: dict[str, str], facts: dict[str, str]) -> None:
    found = about(texts)
    assert {name: found.get(name) for name in facts} == facts
    assert len(found) == len(facts) + ("citation" in texts and "citation" not in facts)
