"""`evaluate`: scores that can be checked by hand, left-out cells, stored embeddings, refusals.

Covers also `sclong_ds/evaluation/evaluate_arguments.py`, `sclong_ds/evaluation/in_memory.py`,
`sclong_ds/evaluation/representations.py`, `sclong_ds/evaluation/scored_cells.py`.
"""

import argparse
import json
import logging
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from exported import write_model
from scipy.sparse import csr_matrix

from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.embedding import embed, embed_arguments
from sclong_ds.embedding.opening import cells_of
from sclong_ds.evaluation import evaluate, evaluate_arguments, representations
from sclong_ds.evaluation.scored_cells import choose_cells
from sclong_ds.exported.model_dir import load_model
from sclong_ds.exported.recipe_file import ChosenRecipe
from sclong_ds.exported.training_cells import TrainingCells, short_digests
from sclong_ds.model.pooling import MEAN, Part, Recipe

N_GENES, N_PER_TYPE = 60, 20
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def genes() -> GeneVocabulary:
    bundled = GeneVocabulary.bundled()
    return GeneVocabulary(
        bundled.ids[:N_GENES], bundled.symbols[:N_GENES], bundled.classes[:N_GENES]
    )


@pytest.fixture(scope="module")
def model_dir(genes: GeneVocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), genes, seed=0)


@pytest.fixture(scope="module")
def cells(genes: GeneVocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clear types in two batches, a rare type, cells without a type and without counts."""
    rng = np.random.default_rng(0)
    types = np.repeat(["B", "NK", "T", "rare", "", "T"], [*[N_PER_TYPE] * 3, 3, 2, 1])
    rates = np.full((len(types), N_GENES), 0.5)
    for i, name in enumerate(("B", "NK", "T")):
        rates[types == name, i * 20 : i * 20 + 20] = 6.0
    counts = rng.poisson(rates)
    counts[-1] = 0
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical([name or None for name in types]),
            "batch": np.where(np.arange(len(types)) % 2, "one", "two"),
            "all_one": "same",
        },
        index=[f"cell{i}" for i in range(len(types))],
    )
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    var = pd.DataFrame(index=list(genes.ids))
    anndata.AnnData(csr_matrix(counts.astype(np.float32)), obs=obs, var=var).write_h5ad(path)
    return path


def parse(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    evaluate_arguments.add_arguments(parser)
    given = [str(argument) for argument in arguments]
    return parser.parse_args([*given, "--min-genes-mapped", "10", "--device", "cpu"])


def run(*arguments: object) -> int:
    return evaluate.run(parse(*arguments))


def test_writes_scores_table_and_picture(
    model_dir: Path, cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "scores"
    assert run(model_dir, cells, "--label", "cell_type", "--batch", "batch", "--out", out) == 0
    report = json.loads((out / "scores.json").read_text())
    assert report["labels"] == {"B": 20, "NK": 20, "T": 20}
    assert report["rare_labels"] == {"rare": 3}
    assert report["left_out"] == {
        "no label": 2,
        "no batch": 0,
        "no counts of the model's genes": 1,
        "copies of another cell": 0,
        "label with fewer than 5 cells": 3,
    }
    assert report["n_cells"] == 60
    assert report["majority_accuracy"] == pytest.approx(1 / 3)
    ladder = {"sclong", "depth", "on_off", "untrained", "gene_vectors", "pca", "hvg_pca"}
    assert set(report["scores"]) == ladder
    names = {name for name in report["scores"]["sclong"] if not name.startswith("scib_")}
    assert names == {
        "knn_accuracy",
        "knn_macro_f1",
        "kmeans_ari",
        "kmeans_nmi",
        "label_asw",
        "batch_asw",
        "batch_mixing",
    }
    assert report["scores"]["pca"]["knn_accuracy"] > 0.95
    assert report["scores"]["pca"]["kmeans_ari"] > 0.9
    assert len(report["verdict"]) == 1
    assert "not better than" in report["verdict"][0]
    accuracies = [scores["knn_accuracy"] for scores in report["scores"].values()]
    assert accuracies == sorted(accuracies, reverse=True)
    table = pd.read_csv(out / "scores.tsv", sep="\t", index_col="representation")
    assert list(table.index) == list(report["scores"])
    for representation, bounds in report["intervals"].items():
        assert set(bounds) == {"knn_accuracy", "knn_macro_f1", "label_asw", "batch_mixing"}
        for name, (low, high) in bounds.items():
            assert table.loc[representation, f"{name}_low"] == pytest.approx(low)
            assert low <= report["scores"][representation][name] <= high
    for representation, scores in report["scores"].items():
        for name, value in scores.items():
            assert table.loc[representation, name] == pytest.approx(value)
    assert (out / "tsne.png").read_bytes().startswith(PNG)
    assert sorted(file.name for file in out.iterdir()) == ["scores.json", "scores.tsv", "tsne.png"]
    printed = capsys.readouterr().out
    assert printed.startswith(report["verdict"][0])
    assert "in training is not known" in printed
    assert report["training_cells"] == {"known": False}
    assert "60 cells, 3 labels of cell_type" in printed


def test_tells_how_many_cells_were_in_training(
    cells: Path,
    genes: GeneVocabulary,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evaluate, "draw", lambda *_, **__: b"")
    counts = csr_matrix(anndata.read_h5ad(cells).X)
    digests = np.unique(short_digests(counts[:15]))
    known = TrainingCells(digests=digests, datasets=("made",), complete=True)
    facts = {
        "criterion": "label accuracy", "n_training_cells": 20, "n_validation_cells": 20,
        "score": {"label accuracy": 0.5}, "gene vectors alone": {"label accuracy": 0.5},
        "candidates": {MEAN.text(): {"label accuracy": 0.5}},
    }  # fmt: skip
    judged = np.unique(short_digests(counts[10:30]))
    chosen = ChosenRecipe(MEAN, Recipe((Part("gene_vectors", "expressed"),)), facts, judged)
    folder = write_model(tmp_path, genes, seed=0, training_cells=known, chosen=chosen)
    run(folder, cells, "--label", "cell_type", "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "15 of 60 cells were in training" in printed
    assert "chosen by the label accuracy of 20 of these 60 cells" in printed
    report = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert report["training_cells"] == {
        "known": True, "n_cells_in_training": 15, "complete": True, "datasets": ["made"],
    }  # fmt: skip
    assert report["recipe_cells"] == {
        "known": True, "n_cells_judged": 20, "criterion": "label accuracy",
    }  # fmt: skip
    assert "gene_vectors_recipe" in report["scores"]
    embedded = anndata.read_h5ad(embed_file(folder, cells, tmp_path / "embedded.h5ad"))
    assert "15 of 66 cells were in training" in capsys.readouterr().out
    record = embedded.uns["sclong"]
    assert record["training_cells"]["datasets"].tolist() == ["made"]
    assert record["training_cells"]["known"]
    assert record["coverage"]["n_cells_in_training"] == 15


@pytest.mark.thorough
def test_stored_embedding_of_the_same_model_is_taken_over(
    model_dir: Path,
    cells: Path,
    genes: GeneVocabulary,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    embedded = embed_file(model_dir, cells, tmp_path / "embedded.h5ad")
    monkeypatch.setattr(evaluate, "draw", lambda *_, **__: b"")
    run(model_dir, cells, "--label", "cell_type", "--out", tmp_path / "fresh")
    calls = []
    real = representations.embed_counts

    def counted(*args: object, **kwargs: object) -> np.ndarray:
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(representations, "embed_counts", counted)
    run(model_dir, embedded, "--label", "cell_type", "--out", tmp_path / "stored")
    assert len(calls) == 1  # untrained weights
    fresh, stored = (
        json.loads((tmp_path / name / "scores.json").read_text())["scores"]
        for name in ("fresh", "stored")
    )
    for representation in fresh:
        assert stored[representation] == pytest.approx(fresh[representation], abs=1e-3)
    (tmp_path / "other").mkdir()
    other = write_model(tmp_path / "other", genes, seed=1)
    with caplog.at_level(logging.INFO):
        run(other, embedded, "--label", "cell_type", "--out", tmp_path / "again")
    assert len(calls) == 3
    assert "another model" in caplog.text


@pytest.mark.thorough
@pytest.mark.parametrize(
    "change",
    [{"model_digest": "0" * 64}, {"genes_hash": "other"}, {"weights_sha256": "other"}, None],
)
def test_a_record_of_another_model_or_of_none_is_not_taken_over(
    model_dir: Path, cells: Path, tmp_path: Path, change: dict[str, str] | None
) -> None:
    """Weights alone do not name a model: its transform, graph and random features count too."""
    embedded = embed_file(model_dir, cells, tmp_path / "embedded.h5ad")
    model = load_model(model_dir)
    assert evaluate.stored_embedding(embedded, model=model, model_dir=model_dir) is not None
    data = anndata.read_h5ad(embedded)
    data.uns["sclong"] = "some text" if change is None else {**data.uns["sclong"], **change}
    data.write_h5ad(tmp_path / "changed.h5ad")
    changed = tmp_path / "changed.h5ad"
    assert evaluate.stored_embedding(changed, model=model, model_dir=model_dir) is None
    if change is not None:
        del data.uns["sclong"][next(iter(change))]
        data.write_h5ad(changed)
        found = evaluate.stored_embedding(changed, model=model, model_dir=model_dir)
        assert (found is None) == ("model_digest" not in change)


def embed_file(model_dir: Path, cells: Path, out: Path, *options: str) -> Path:
    parser = argparse.ArgumentParser()
    embed_arguments.add_arguments(parser)
    given = [str(model_dir), str(cells), "--out", str(out), "--min-genes-mapped", "10", *options]
    embed.run(parser.parse_args([*given, "--device", "cpu"]))
    return out


def test_thresholds_leave_cells_out_of_a_stored_embedding_too(
    model_dir: Path, cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "draw", lambda *_, **__: b"")
    embedded = embed_file(model_dir, cells, tmp_path / "embedded.h5ad")
    n_genes = anndata.read_h5ad(embedded).obs["n_genes_mapped"].to_numpy()
    least = int(np.quantile(n_genes, 0.3))
    reports = []
    for name, source in (("fresh", cells), ("stored", embedded)):
        out = tmp_path / name
        run(model_dir, source, "--label", "cell_type", "--out", out, "--min-genes", least)
        reports.append(json.loads((out / "scores.json").read_text()))
    fresh, stored = reports
    for name in ("without counts", "below min_genes"):
        assert fresh["left_out"][name] == stored["left_out"][name] > 0
    below = fresh["left_out"]["without counts"] + fresh["left_out"]["below min_genes"]
    assert below == (n_genes < least).sum()
    assert fresh["read"]["options"] == {"--min-genes": str(least)}
    for name, score in fresh["scores"]["sclong"].items():
        assert stored["scores"]["sclong"][name] == pytest.approx(score, abs=1e-3)


def test_stored_embedding_without_counts_is_refused(
    model_dir: Path, cells: Path, tmp_path: Path
) -> None:
    embedded = embed_file(model_dir, cells, tmp_path / "embedded.h5ad", "--no-counts")
    with pytest.raises(ValueError, match="without --no-counts"):
        run(model_dir, embedded, "--label", "cell_type", "--out", tmp_path / "out")


def test_counts_become_the_model_input() -> None:
    counts = csr_matrix(np.random.default_rng(0).poisson(1.0, (30, 40)))
    values = representations.normalise(counts, target_sum=1.0e4)
    totals = np.asarray(counts.sum(axis=1))
    np.testing.assert_allclose(
        values.toarray(), np.log1p(1.0e4 * counts.toarray() / totals), rtol=1e-5
    )


def test_groups_are_held_out_and_batches_predict_others(
    model_dir: Path, cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "draw", lambda *_, **__: b"")
    data = anndata.read_h5ad(cells)
    donors = np.array(["d1", "d2", "d3"])[np.arange(data.n_obs) % 3]
    donors[(data.obs["cell_type"] == "T").to_numpy()] = "d1"
    data.obs["donor"] = donors
    data.write_h5ad(tmp_path / "donors.h5ad")
    options = ("--label", "cell_type", "--group", "donor", "--batch", "batch")
    transfer = ("--train-batch", "one", "--test-batch", "two", "--out", tmp_path / "out")
    run(model_dir, tmp_path / "donors.h5ad", *options, *transfer)
    report = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert report["left_out"]["label in one group only"] == N_PER_TYPE
    assert report["labels"] == {"B": 20, "NK": 20}
    assert sum(report["groups"].values()) == 40
    assert [line.split()[1] for line in report["verdict"]] == ["knn_accuracy", "transfer_accuracy"]
    assert report["scores"]["pca"]["transfer_accuracy"] > 0.9
    assert (report["train_batch"], report["test_batch"]) == (["one"], ["two"])


@pytest.mark.parametrize("group", [None, "batch"])
def test_copies_of_a_cell_are_scored_once(
    model_dir: Path, cells: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, group: str
) -> None:
    once = anndata.read_h5ad(cells)
    again = once.copy()
    again.obs["batch"] = again.obs["batch"].map({"one": "two", "two": "one"})
    anndata.concat([once, again], index_unique="-").write_h5ad(tmp_path / "twice.h5ad")
    found = []
    for path in (cells, tmp_path / "twice.h5ad"):
        read = cells_of(parse(model_dir, path, "--label", "x", "--out", "x"), load_model(model_dir))
        found.append(choose_cells(read, label="cell_type", batch=None, group=group))
    np.testing.assert_array_equal(found[0].rows, found[1].rows)
    np.testing.assert_array_equal(found[0].labels, found[1].labels)
    assert found[0].left_out["copies of another cell"] == 0
    assert found[1].left_out["copies of another cell"] == 63
    assert "63 (copies of another cell)" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--train-batch", "one"), "go together"),
        (("--train-batch", "one", "--test-batch", "two"), "name it with --batch"),
        (("--batch", "batch", "--train-batch", "one", "--test-batch", "one"), "leave it out of"),
        (("--batch", "batch", "--train-batch", "one", "--test-batch", "x"), "there are one, two"),
        (("--group", "donor"), "--group donor: the input has no such column"),
        (("--group", "all_one"), "0 labels have 5 cells or more in two groups of all_one"),
    ],
)
def test_refuses_options_that_fit_neither_each_other_nor_the_cells(
    model_dir: Path, cells: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(model_dir, cells, "--label", "cell_type", "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_refuses_wrong_columns_before_it_embeds(
    model_dir: Path, cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> np.ndarray:
        raise AssertionError("embedded before the columns were checked")

    monkeypatch.setattr(representations, "embed_counts", never)
    with pytest.raises(ValueError, match=r"--label type: .* has cell_type, batch, all_one"):
        run(model_dir, cells, "--label", "type", "--out", tmp_path / "out")
    with pytest.raises(ValueError, match=r"--batch donor: .* has cell_type, batch, all_one"):
        run(model_dir, cells, "--label", "cell_type", "--batch", "donor", "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="1 labels have 5 cells or more"):
        run(model_dir, cells, "--label", "all_one", "--out", tmp_path / "out")
    options = ("--label", "cell_type", "--batch", "all_one", "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="all scored cells are of one batch"):
        run(model_dir, cells, *options)
    assert not (tmp_path / "out").exists()


def test_refuses_a_file_as_output_folder(model_dir: Path, cells: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(model_dir, cells, "--label", "cell_type", "--out", cells)
    with pytest.raises(ValueError, match="--seed -1"):
        run(model_dir, cells, "--label", "cell_type", "--out", cells.parent / "x", "--seed", "-1")
