"""The recipe of an embedding: what it is chosen by, what the folder keeps, where none is chosen.

Covers also `sclong_ds/exported/recipe_file.py`.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from exported import named_genes, write_model
from launching import ROOT
from scipy.sparse import csr_matrix

from sclong_ds.__main__ import main
from sclong_ds.config.load import load_config
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.transform import log1p_normalise
from sclong_ds.embedding.embed import embed_counts
from sclong_ds.exported import choose_recipe as chooser
from sclong_ds.exported.choose_recipe import COUNTS, LABELS, Judge
from sclong_ds.exported.described.model_card import model_card
from sclong_ds.exported.manifest import check_files, model_digest, write_manifest
from sclong_ds.exported.model_dir import load_model
from sclong_ds.exported.recipe_file import (
    RECIPE,
    STATISTICS,
    ChosenRecipe,
    read_judged,
    write_recipe,
)
from sclong_ds.exported.training_cells import are_among
from sclong_ds.model.pooling import MEAN, TOGETHER, principal_recipe
from sclong_ds.model.sclong import ScLong

N_GENES, N_CELLS = 60, 80


class MadeCorpus:
    """Two kinds of cells that differ in their high genes, of two datasets."""

    measured_genes = None

    def __init__(self, *, labels: bool) -> None:
        rng = np.random.default_rng(0)
        self.kinds = rng.integers(2, size=N_CELLS)
        rates = np.full((2, N_GENES), 0.5)
        rates[0, :25], rates[1, 25:50] = 8.0, 8.0
        depth = rng.uniform(0.5, 2.0, (N_CELLS, 1))
        self.counts = csr_matrix(rng.poisson(rates[self.kinds] * depth))
        self.row_dataset = rng.integers(2, size=N_CELLS)
        self.labels = labels

    def rows(self, rows: np.ndarray) -> csr_matrix:
        return self.counts[rows]

    def obs(self, rows: np.ndarray) -> pd.DataFrame:
        kinds = np.array(["B", "T"])[self.kinds[rows]]
        return pd.DataFrame({"cell_type": kinds} if self.labels else {"barcode": rows.astype(str)})


def choose(model: ScLong, *, labels: bool) -> ChosenRecipe:
    corpus: Any = MadeCorpus(labels=labels)
    return chooser.choose_recipe(
        model, corpus, train=np.arange(40), validation=np.arange(40, N_CELLS)
    )


def card_of(chosen: ChosenRecipe) -> str:
    return model_card(
        {"model": {name: {"depth": 1, "heads": 2, "dim_head": 4}
                   for name in ("large_encoder", "mini_encoder", "decoder")}
         | {"base_dim": 8, "large_dim": 16, "top_seq_len": 16, "gene_encoder": "embedding"},
         "n_genes": N_GENES, "transform": {"target_sum": 1e4}},
        {"step": 0}, n_parameters=1, chosen=chosen,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), named_genes(N_GENES), seed=0)


@pytest.fixture(scope="module")
def chosen(model_dir: Path) -> ChosenRecipe:
    """The recipe of the model by held-out counts."""
    return choose(load_model(model_dir), labels=False)


@pytest.mark.parametrize(("labels", "criterion"), [(False, COUNTS), (True, LABELS)])
def test_the_best_candidate_is_taken_by_labels_or_held_out_counts(
    model_dir: Path, labels: bool, criterion: str
) -> None:
    chosen = choose(load_model(model_dir), labels=labels)
    scores = {text: found[criterion] for text, found in chosen.facts["candidates"].items()}
    assert chosen.facts["criterion"] == criterion
    assert len(scores) == len(chooser.candidates(cell_vector=True)) + 2
    assert scores[chosen.recipe.text()] == max(scores.values()) > scores[MEAN.text()]
    assert max(scores.values()) > (0.9 if labels else 0.1)
    assert {part.layer for part in chosen.control.parts} == {"gene_vectors"}
    if not labels:
        assert choose(load_model(model_dir), labels=labels).facts == chosen.facts


def test_so_many_principal_directions_are_taken_where_they_are_asked_for(model_dir: Path) -> None:
    corpus: Any = MadeCorpus(labels=False)
    rows = {"train": np.arange(40), "validation": np.arange(40, N_CELLS), "n_directions": 20}
    chosen = chooser.choose_recipe(load_model(model_dir), corpus, **rows)
    assert len(chosen.recipe.parts) == 3
    assert chosen.recipe.width(8) == 20
    scores = {text: found[COUNTS] for text, found in chosen.facts["candidates"].items()}
    assert len(scores) == 2
    assert all("the first 20;" in text for text in scores)
    assert f"Of a cell: {chosen.recipe.text()}." in card_of(chosen)
    assert scores[chosen.recipe.text()] == max(scores.values())
    with pytest.raises(ValueError, match="20 principal directions: 17 training"):
        chooser.choose_recipe(
            load_model(model_dir), corpus, **rows | {"directions_of": np.arange(17)}
        )


def test_halves_of_counts_add_up_and_hold_no_zeros() -> None:
    counts = csr_matrix(np.random.default_rng(1).poisson(2.0, (9, 30)))
    first, second = chooser.split_counts(counts)
    np.testing.assert_array_equal((first + second).toarray(), counts.toarray())
    assert first.data.min() > 0
    assert second.data.min() > 0
    assert 0.4 < first.sum() / counts.sum() < 0.6


def test_labels_are_named_by_cells_of_other_datasets_where_those_have_them() -> None:
    points = np.array([[0.0], [0.1], [0.2], [5.0], [5.1], [9.0]], np.float32)
    judge = Judge(
        n=2,
        targets=np.zeros((6, 1)),
        labels=np.array(["a", "only", "b", "a", "b", ""]),
        groups=np.array([0, 0, 0, 1, 1, 1]),
    )
    # One neighbour: of the other dataset for "a"; "only" is in no other, so its own one counts.
    assert judge.scores(points)[LABELS] == 0.5


def test_a_label_is_named_by_no_cell_that_may_not_name_it() -> None:
    # Three neighbours, but one cell alone is of another dataset and has a label.
    judge = Judge(
        n=1,
        targets=np.zeros((15, 1)),
        labels=np.array(["a", *["b"] * 6, "a", *[""] * 7]),
        groups=np.array([0] * 7 + [1] * 8),
    )
    points = np.arange(15, dtype=np.float32)[:, None]
    assert judge.scores(points)[LABELS] == 1.0


def test_cells_without_a_gene_that_varies_are_refused() -> None:
    with pytest.raises(ValueError, match="no gene varies among the held-out counts"):
        chooser.held_out_values(csr_matrix(np.eye(30, dtype=int)), target_sum=1e4, n_judged=30)


def test_a_folder_keeps_its_recipe_and_embeds_by_it(
    model_dir: Path, chosen: ChosenRecipe, tmp_path: Path
) -> None:
    counts = MadeCorpus(labels=False).counts[:5]
    model = load_model(model_dir)
    before = embed_counts(model, counts)
    (tmp_path / "kept").mkdir()
    for path in model_dir.iterdir():
        if path.name != "manifest.json":
            (tmp_path / "kept" / path.name).write_bytes(path.read_bytes())
    write_recipe(tmp_path / "kept", chosen)
    write_manifest(tmp_path / "kept")
    again = load_model(tmp_path / "kept")
    assert (again.recipe.parts, again.recipe.scaling) == (
        chosen.recipe.parts,
        chosen.recipe.scaling,
    )
    assert again.control is not None
    judged = read_judged(tmp_path / "kept")
    assert judged is not None
    assert judged.criterion == COUNTS
    whole = MadeCorpus(labels=False).counts
    np.testing.assert_array_equal(are_among(judged.digests, whole), np.arange(N_CELLS) >= 40)
    assert read_judged(model_dir) is None
    found = embed_counts(again, counts)
    assert found.shape == (5, 8 * len(chosen.recipe.parts))
    model.recipe = chosen.recipe
    np.testing.assert_array_equal(found, embed_counts(model, counts))
    assert found.shape != before.shape or not np.allclose(found, before)
    assert model_digest(tmp_path / "kept") != model_digest(model_dir)
    assert check_files(tmp_path / "kept")
    card = card_of(chosen)
    assert f"Of a cell: {chosen.recipe.text()}." in card
    assert "on 40 validation cells by held-out counts" in card


def test_principal_directions_travel_with_the_recipe(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chooser, "candidates", lambda **_: [MEAN])
    monkeypatch.setattr(
        chooser, "principal_candidates", lambda *_: [principal_recipe(27, 8, TOGETHER)]
    )
    model = load_model(model_dir)
    chosen = choose(model, labels=True)
    assert chosen.recipe.n_directions == 27
    assert chosen.recipe.directions is not None
    assert chosen.recipe.directions.shape == (4, N_GENES, 8)
    assert not chosen.recipe.directions[3, :, 3:].any()
    assert {part.layer for part in chosen.control.parts} == {"gene_vectors"}
    folder = write_model(tmp_path, named_genes(N_GENES), seed=0)
    (folder / "manifest.json").unlink()
    write_recipe(folder, chosen)
    write_manifest(folder)
    again = load_model(folder)
    counts = MadeCorpus(labels=False).counts[:5]
    model.recipe = chosen.recipe
    found = embed_counts(again, counts)
    assert found.shape == (5, 27)
    np.testing.assert_array_equal(found, embed_counts(model, counts))
    # By hand: values along the directions less a centre, by one number.
    x = log1p_normalise(counts, target_sum=model.transform.target_sum)
    along = np.concatenate([x @ block for block in chosen.recipe.directions.numpy()], axis=1)
    assert chosen.recipe.centres is not None
    along = (along - chosen.recipe.centres.numpy().ravel())[:, :27]
    scale = found.std() / along.std()
    np.testing.assert_allclose(found, along * scale, rtol=1e-3, atol=1e-4)
    content = json.loads((folder / RECIPE).read_text())
    assert content["version"] == 2, "earlier programs must not take it for damage"
    (folder / RECIPE).write_text(json.dumps(content | {"n_directions": 33}))
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    with pytest.raises(ValueError, match="n_directions 33 of 4 parts"):
        load_model(folder)
    (folder / RECIPE).write_text(json.dumps(content))
    for damaged in (None, np.zeros((4, N_GENES + 1, 8)), np.full((4, N_GENES, 8), np.inf)):
        arrays = {n: a for n, a in np.load(folder / STATISTICS).items() if n != "directions"}
        np.savez(
            folder / STATISTICS, **arrays | ({} if damaged is None else {"directions": damaged})
        )
        (folder / "manifest.json").unlink()
        write_manifest(folder)
        with pytest.raises(ValueError, match=r"directions must be finite and .4, 60, 8."):
            load_model(folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (RECIPE, {"parts": [["decoder", "all"]]}, "damaged .unknown part of an embedding: all"),
        (RECIPE, {"parts": []}, "no parts"),
        (RECIPE, {"parts": 3}, "damaged"),
        (RECIPE, {"version": 3}, "later version"),
        (RECIPE, {"format": "other"}, "damaged"),
        (STATISTICS, {"maps": np.full((3, 8, 8), np.nan)}, "maps must be finite"),
        (STATISTICS, {"judged": np.zeros((2, 2), np.uint64)}, "no digests of judged cells"),
        (STATISTICS, {"centres": np.zeros((1, 9))}, "centres must be finite"),
    ],
)
def test_a_damaged_recipe_is_named(
    chosen: ChosenRecipe, tmp_path: Path, name: str, change: dict[str, Any], message: str
) -> None:
    folder = write_model(tmp_path, named_genes(N_GENES), seed=0)
    (folder / "manifest.json").unlink()
    write_recipe(folder, chosen)
    if name == RECIPE:
        content = json.loads((folder / RECIPE).read_text()) | change
        (folder / RECIPE).write_text(json.dumps(content))
    else:
        np.savez(folder / STATISTICS, **(dict(np.load(folder / STATISTICS)) | change))
    write_manifest(folder)
    with pytest.raises(ValueError, match=message):
        read_judged(folder) if "judged" in change else load_model(folder)


def test_without_its_corpus_or_enough_cells_the_mean_stays(
    model_dir: Path,
    small_corpus: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at = load_config("sclong_tiny", [f"data.corpus={small_corpus}"]).data
    model = load_model(model_dir)
    with caplog.at_level(logging.WARNING):
        assert chooser.choose_from_run(model, at, corpus_hash="other") is None
    assert "another corpus by now" in caplog.text
    caplog.clear()
    known = Corpus(small_corpus).hash
    with caplog.at_level(logging.WARNING):
        assert chooser.choose_from_run(model, at, corpus_hash=known, n_cells=3) is None
    assert "3 cells of train to read, 20 are needed" in caplog.text
    assert chooser.choose_from_run(model, at, corpus_hash=known, n_cells=0) is None
    monkeypatch.setattr(chooser, "CPU_FLOPS", 1e3)
    with caplog.at_level(logging.WARNING):
        assert chooser.choose_from_run(model, at, corpus_hash=known) is None
    assert "a model of this size on a CPU: 0 cells can be read, 20 are needed" in caplog.text


def test_directions_that_are_asked_for_are_given_or_an_error(
    model_dir: Path, small_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = load_config("sclong_tiny", [f"data.corpus={small_corpus}"]).data
    corpus, model = Corpus(small_corpus), load_model(model_dir)

    def cells(**changed: Any) -> Any:
        how = {"corpus_hash": corpus.hash, "n_cells": 64, "n_directions": 20} | changed
        return chooser.cells_of_run(changed.pop("data", at), **how)

    _, rows = cells()
    assert set(rows) == {"train", "validation", "directions_of"}
    monkeypatch.setattr(chooser, "CPU_FLOPS", 1e3)
    seen = []
    monkeypatch.setattr(chooser, "choose_recipe", lambda *_, **how: seen.append(how))
    known = {"corpus_hash": corpus.hash, "n_directions": 20}
    chooser.choose_from_run(model, at, **known)
    assert seen[0]["n_directions"] == 20, "however large the model"
    assert len(seen[0]["train"]) > chooser.MIN_CELLS
    for changed, message in (
        ({"corpus_hash": "other"}, "another corpus by now"),
        ({"n_cells": 3}, "3 cells of train to read, 20 are needed"),
        ({"n_directions": 5000}, "have .* that can be taken"),
    ):
        with pytest.raises(ValueError, match=f"--principal-directions .*{message}"):
            cells(**changed)
        with pytest.raises(ValueError, match=f"--principal-directions .*{message}"):
            chooser.choose_from_run(model, at, **known | changed)


@pytest.mark.parametrize(
    ("cells", "message"),
    [("0", "--principal-directions 9 with --recipe-cells 0"), ("64", "--principal-directions 9: ")],
)
def test_an_export_without_the_directions_that_it_must_have_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cells: str, message: str
) -> None:
    written = ROOT / "tests" / "golden" / "written_by"
    run = next(path for path in sorted(written.iterdir()) if path.is_dir()) / "run"
    out = tmp_path / "model"
    how = ["--principal-directions", "9", "--recipe-cells", cells]
    assert main(["export", str(run), "--out", str(out), *how]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert message in lines[-1]
    assert not list(tmp_path.iterdir())
