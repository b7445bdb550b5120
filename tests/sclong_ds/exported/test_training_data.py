"""The data of a model: which datasets, of which licence, and where none is known."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from sclong_ds.config.load import load_config
from sclong_ds.corpus.catalogue import read_catalogue, write_catalogue
from sclong_ds.exported.described.model_card import _data
from sclong_ds.exported.training_cells import training_data_of

CITED = {"title": "Immune cells", "licence": "CC BY 4.0", "doi": "10.1234/x"}


def test_a_run_names_the_sources_of_the_datasets_it_trains_on(
    small_corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for path in small_corpus.iterdir():
        (folder / path.name).symlink_to(path)
    catalogue = read_catalogue(small_corpus)
    for dataset in catalogue["datasets"]:
        dataset["origin"] = CITED
    (folder / "corpus.json").unlink()
    write_catalogue(folder, catalogue)
    data_section = dataclasses.replace(load_config("sclong_tiny").data, corpus=str(folder))
    earlier = [{"dataset_id": "before", "n_train_cells": 3, "licence": "CC0"}]
    (tmp_path / "provenance.json").write_text(json.dumps({"training_data": earlier}))
    data = training_data_of(data_section, init_from=str(tmp_path), corpus_hash=catalogue["hash"])
    assert data is not None
    assert data[0] == earlier[0]
    assert [d["dataset_id"] for d in data] == ["before", "immune_a"]
    assert data[1].items() >= CITED.items()
    text = _data({"training_data": data})
    assert "Datasets by licence: CC0 (1), CC BY 4.0 (1)." in text
    n_cells = data[1]["n_train_cells"]
    row = f"| immune_a | {n_cells:,} | Immune cells | CC BY 4.0 | not recorded | https://doi.org/"
    assert row in text
    assert training_data_of(data_section, init_from=None, corpus_hash="another") is None


def test_many_datasets_are_counted_and_the_largest_named() -> None:
    data = [{"dataset_id": f"d{i}", "n_train_cells": i} for i in range(50)]
    text = _data({"training_data": data})
    assert "not recorded (50)" in text
    assert "| d49 |" in text
    assert "| d29 |" not in text
    assert "And 30 more" in text
    assert "does not tell" in _data({})
