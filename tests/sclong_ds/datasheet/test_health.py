"""The verdict on a corpus: each reason alone, the worst first, silence on what is not recorded."""

from __future__ import annotations

from typing import Any

import pytest

from sclong_ds.datasheet.health import health_of


def dataset(name: str, train: int = 400, validation: int = 0, **facts: Any) -> dict[str, Any]:
    nothing = dict.fromkeys(("counts_kept", "tissue", "format", "source", "source_hash"))
    usual = {"n_genes_mapped": 20_000, "organism": "human", "duplicates_dropped": 0}
    usual |= {"median_genes": 1200.0, "n_donors": 3}
    splits = {"train": train, "validation": validation, "test": 0}
    about = {"dataset_id": name, "n_cells": train + validation, "split_cells": splits}
    return nothing | usual | about | facts


def catalogue(*datasets: dict[str, Any], unit: str = "dataset") -> dict[str, Any]:
    train, validation = (
        sum(d["split_cells"][name] for d in datasets) for name in ("train", "validation")
    )
    splits = {"train": [0, train], "validation": [train, train + validation]}
    return {"n_genes": 27_874, "splits": splits, "split_unit": unit, "datasets": [*datasets]}


GOOD = (dataset("a"), dataset("b"), dataset("c", 0, 100))


def test_good_corpus_is_green() -> None:
    health = health_of(catalogue(*GOOD))
    assert (health.verdict, health.findings) == ("green", ())
    assert health.text() == "health of the corpus: GREEN (fit to train on)"


@pytest.mark.parametrize(
    ("changed", "verdict", "words"),
    [
        ([dataset("a"), dataset("b", 0, 29)], "red", "29 validation cells"),
        ([dataset("a"), dataset("b", 0, 59)], "amber", "59 validation cells"),
        ([dataset("a")], "red", "0 validation cells"),
        ([dataset("a"), dataset("c", 0, 80, n_genes_mapped=1)], "red", "100% of the validation"),
        ([*GOOD, dataset("d", 150, n_genes_mapped=400)], "amber", "name less than 20%"),
        ([*GOOD, dataset("d", 3000, n_genes_mapped=400)], "red", "77% of the cells"),
        ([*GOOD, dataset("d", 3000, median_genes=90.0)], "red", "fewer than 200 genes (d)"),
        ([*GOOD, dataset("d", 8000)], "amber", "91% of the training cells are of d"),
        ([*GOOD, dataset("d", duplicates_dropped=900)], "amber", "41% of the cells repeated"),
        ([*GOOD, dataset("m", organism="mouse")], "red", "several species (human, mouse)"),
        (
            [dataset(name, 50, 20, n_donors=0) for name in "abcde"],
            "amber",
            "no dataset names its donors",
        ),
    ],
)
def test_each_reason(changed: list[dict[str, Any]], verdict: str, words: str) -> None:
    health = health_of(catalogue(*changed))
    assert health.verdict == verdict
    assert words in health.text()
    assert all(finding.cure for finding in health.findings)


def test_single_cells_and_order() -> None:
    health = health_of(catalogue(dataset("a", 200, 10), unit="cell"))
    assert [finding.level for finding in health.findings] == ["red", "amber"]
    assert health.as_json()["verdict"] == "red"
    assert "donors are in training, too" in health.lines()[2]
    assert health.lines()[0].endswith("RED (2 findings)")


def test_what_an_earlier_version_did_not_record_is_not_judged() -> None:
    old = [{k: v for k, v in d.items() if k not in ("median_genes", "n_donors")} for d in GOOD]
    for d in old:
        d["n_genes_mapped"] = None
    found = catalogue(*old)
    del found["n_genes"], found["split_unit"]
    assert health_of(found).verdict == "green"
