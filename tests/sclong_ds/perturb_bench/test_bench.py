"""`perturb-bench`: a made screen whose truth is known, the scores by hand, refusals.

Covers also `sclong_ds/perturb_bench/arguments.py`, `sclong_ds/perturb_bench/screen.py`,
`sclong_ds/perturb_bench/metrics.py` and `sclong_ds/perturb_bench/predictors.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from exported import named_genes, write_model
from scipy import stats
from scipy.sparse import csr_matrix

from sclong_ds.__main__ import main
from sclong_ds.corpus.transform import log1p_normalise
from sclong_ds.embedding.cells import open_cells
from sclong_ds.exported.model_dir import load_model
from sclong_ds.perturb_bench.bench import _shown, bench_scores
from sclong_ds.perturb_bench.metrics import effect_scores, summary, worded
from sclong_ds.perturb_bench.predictors import SIMPLE, Encodings, additive
from sclong_ds.perturb_bench.screen import Screen, _perturbations, folds_of, read_screen

G, P, CELLS = 120, 30, 40
GENES = named_genes(G)


def screen_of(deltas: np.ndarray, targets: list[tuple[int, ...]], n_changed: int) -> Screen:
    """Return a screen with given effects, the evidence of a change by its size."""
    size = np.abs(deltas).copy()
    for row, own in zip(size, targets, strict=True):
        row[list(own)] = -1.0
    counts = csr_matrix(np.random.default_rng(0).poisson(1.0, (20, deltas.shape[1])))
    return Screen(
        names=tuple("+".join(map(str, own)) for own in targets), targets=tuple(targets),
        deltas=deltas, learned=deltas,
        ranked=np.argsort(-size, axis=1, kind="stable"),
        n_changed=np.full(len(targets), n_changed), controls=counts, control_rows=np.arange(20),
        values=csr_matrix(np.log1p(counts.toarray())),
    )  # fmt: skip


def test_scores_are_those_worked_out_by_hand() -> None:
    deltas = np.array([[9.0, 3, 2, 0, 0], [0, 9, 0, 2, -3], [1, 0, 9, 0, 4], [0, 4, 0, 9, 1]])
    screen = screen_of(deltas, [(0,), (1,), (2,), (3,)], n_changed=2)
    perfect = effect_scores(screen, deltas)
    np.testing.assert_allclose(perfect.mean(), [1.0, 1.0, 1.0, 0.0], atol=1e-12)
    nothing = effect_scores(screen, np.zeros_like(deltas))
    assert nothing["delta_pearson"].tolist() == [0.0] * 4
    assert nothing["des"].tolist() == [0.0] * 4
    np.testing.assert_allclose(nothing["mae"], [5 / 4] * 4)
    found = np.zeros_like(deltas)
    # The target is left out of every score: 50 there counts for nothing.
    found[0] = [50.0, 1.0, 0.0, 2.0, 0.0]
    row = effect_scores(screen, found).iloc[0]
    assert row["des"] == 0.5  # genes 1 and 3 for 1 and 2
    assert row["mae"] == (2 + 2 + 2 + 0) / 4
    want = np.corrcoef([1.0, 0.0, 2.0, 0.0], [3.0, 2.0, 0.0, 0.0])[0, 1]
    assert row["delta_pearson"] == pytest.approx(want)
    # L1 over genes 1 to 4: own 6, others 8 + 0 + 0 + 3 = 11, 1 + 9 + 2 + 4 = 16, 3 + 0 + 7 + 1.
    assert row["pds"] == 1.0
    found[0] = deltas[3]
    assert effect_scores(screen, found).iloc[0]["pds"] == pytest.approx(1 - 1 / 3)
    unchanged = effect_scores(dataclasses.replace(screen, n_changed=np.zeros(4, int)), deltas)
    assert unchanged[["delta_pearson", "des"]].isna().all(axis=None)
    assert unchanged[["pds", "mae"]].notna().all(axis=None)


def test_the_summary_begins_with_the_strongest_simple_predictor_and_pairs_perturbations() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(40)
    score = {"delta_pearson": base, "des": base, "pds": base, "mae": base}
    frames = {
        "no_change": pd.DataFrame(score) * 0,
        "mean_shift": pd.DataFrame(score),
        "frozen_linear": pd.DataFrame(score) + 0.01,
        "tuned_head": pd.DataFrame(score) - 0.01,
        "ridge_gene_vectors": pd.DataFrame(score) + rng.normal(0, 1, (40, 1)) * 0.2,
    }
    table = summary(frames, simple=SIMPLE, seed=0)
    assert list(table.index[:2]) == ["mean_shift", "no_change"]
    assert table.loc["mean_shift", "delta_pearson_low"] < base.mean()
    # Each differs by the same from the baseline: the paired interval has no width.
    assert table.loc["frozen_linear", "gain_low"] == pytest.approx(0.01)
    words = worded(table, simple=SIMPLE)
    assert "frozen_linear better than mean_shift" in words
    assert "tuned_head worse than mean_shift" in words
    assert "ridge_gene_vectors not better than mean_shift" in words
    assert words.startswith("delta_pearson, bounds of 98.3% for 3 predictors: ")
    assert "(+0.010 [+0.010, +0.010])" in words
    # Where three are compared, a gain at the edge of 95% is none.
    wide = frames["ridge_gene_vectors"]["delta_pearson"] - base
    drawn = np.random.default_rng(0).integers(0, 40, (2000, 40))
    means = wide.to_numpy()[drawn].mean(axis=1)
    low, high = np.quantile(means, [0.05 / 6, 1 - 0.05 / 6]) - wide.mean()
    # Student's t of 39 degrees of freedom over the normal quantile.
    wider = stats.t.ppf(1 - 0.05 / 6, 39) / stats.norm.ppf(1 - 0.05 / 6) * np.sqrt(40 / 39)
    low, high = wide.mean() + wider * np.array([low, high])
    row = table.loc["ridge_gene_vectors"]
    assert (row["gain_low"], row["gain_high"]) == pytest.approx((low, high))
    frames["tuned_head"] = pd.DataFrame(score) - 1e-5
    assert "tuned_head worse than mean_shift (+0.000 [+0.000, +0.000])" in worded(
        summary(frames, simple=SIMPLE, seed=0), simple=SIMPLE
    )
    for frame in frames.values():
        frame.loc[9:, "delta_pearson"] = np.nan
    few = worded(summary(frames, simple=SIMPLE, seed=0), simple=SIMPLE)
    assert few == "delta_pearson: no verdict, 9 perturbations with a changed gene; 10 are needed"
    for frame in frames.values():
        frame["delta_pearson"] = np.nan
    shown = _shown(summary(frames, simple=SIMPLE, seed=0))
    assert list(shown["delta_pearson"]) == ["none"] * len(frames)
    assert shown.loc["no_change", "mae"] == "0.000 [0.000, 0.000]"


@pytest.mark.thorough
def test_what_follows_from_the_vectors_of_genes_is_predicted_from_them_alone() -> None:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(G, 6))
    targets = [(i,) for i in range(48)]
    deltas = vectors[:48] @ rng.normal(size=(6, G)) + 0.05 * rng.normal(size=(48, G)) + 1.0
    screen = screen_of(deltas, targets, n_changed=10)
    own, noise = vectors[:48], rng.normal(size=(48, 9))
    encodings = Encodings(own, noise, vectors.astype(np.float32))
    scores = bench_scores(screen, encodings, folds=4, seed=0)
    mean = {name: found.mean() for name, found in scores.items()}
    assert mean["ridge_gene_vectors"]["delta_pearson"] > 0.9
    assert mean["ridge_gene_vectors"]["pds"] > 0.99
    assert mean["ridge_gene_vectors"]["mae"] < 0.2 * mean["no_change"]["mae"]
    assert mean["tuned_head"]["delta_pearson"] > mean["mean_shift"]["delta_pearson"] + 0.2
    # Features that know nothing give the mean change, not worse.
    assert mean["frozen_linear"]["mae"] < 1.05 * mean["mean_shift"]["mae"]
    assert mean["mean_shift"]["mae"] < mean["no_change"]["mae"]
    # The prediction of no change is as near to all: chance is one half, by count of ties or not.
    assert 0.4 < mean["no_change"]["pds"] < 0.6


def test_an_effect_of_two_genes_is_the_sum_of_those_seen_alone() -> None:
    deltas = np.arange(20.0).reshape(4, 5)
    screen = screen_of(deltas, [(0,), (1,), (0, 1), (1, 2)], n_changed=2)
    found = additive(screen, np.array([0, 1]), np.array([2, 3]))
    np.testing.assert_allclose(found, [deltas[0] + deltas[1], deltas[1]])
    mean = additive(screen, np.array([0, 2]), np.array([1]))
    np.testing.assert_allclose(mean[0], deltas[[0, 2]].mean(axis=0))
    assert sorted(folds_of(7, folds=3, seed=0)) == [0, 0, 0, 1, 1, 2, 2]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and a screen of counts: a gene's loss lowers the genes that its vector points to."""
    folder = tmp_path_factory.mktemp("screen")
    model_dir = write_model(folder, GENES, seed=0)
    model = load_model(model_dir)
    with torch.inference_mode():
        vectors = model.gene_encoder()[:G].double().numpy()
    vectors = (vectors - vectors.mean(axis=0)) / vectors.std(axis=0)
    rng = np.random.default_rng(0)
    effect = 0.3 * vectors @ rng.normal(size=(vectors.shape[1], G))
    base = rng.uniform(1.0, 2.5, G)
    names, rates = ["ctrl"] * 100, [base] * 100
    for gene in range(P):
        own = base + effect[gene]
        own[gene] = -3.0
        half = CELLS // 2
        names += [f"{GENES.symbols[gene]}+ctrl"] * half
        names += [f"ctrl+{GENES.symbols[gene]}"] * (CELLS - half)
        rates += [own] * CELLS
    names += ["NOGENE"] * CELLS + [GENES.symbols[50]] * 3
    rates += [base] * (CELLS + 3)
    counts = rng.poisson(np.exp(np.clip(np.array(rates), -4, 5)))
    cells = anndata.AnnData(csr_matrix(counts.astype(np.float32)))
    cells.var_names = list(GENES.ids)
    cells.obs["guide"] = names
    path = folder / "screen.h5ad"
    cells.write_h5ad(path)
    return model_dir, path


def bench(files: tuple[Path, Path], out: Path, *more: str) -> int:
    words = ["perturb-bench", *map(str, files), "--perturbation", "guide", "--control", "ctrl"]
    words += ["--out", str(out), "--min-genes-mapped", "1", "--device", "cpu", *more]
    return main(words)


def test_a_screen_is_read_with_one_perturbation_a_gene_and_its_changed_genes(
    files: tuple[Path, Path],
) -> None:
    model = load_model(files[0])
    cells = open_cells(files[1], genes=model.genes, min_genes=1)
    screen = read_screen(
        cells, model.genes, key="guide", control="ctrl", separator="+", min_cells=10,
        target_sum=1e4, seed=0,
    )  # fmt: skip
    assert len(screen.names) == P
    assert set(screen.targets) == {(gene,) for gene in range(P)}
    assert screen.names[0] == f"{GENES.symbols[screen.targets[0][0]]}+ctrl"
    assert screen.controls.shape == (50, G)
    assert set(screen.control_rows) < set(range(100))
    np.testing.assert_array_equal(
        screen.controls.toarray(), anndata.read_h5ad(files[1])[screen.control_rows].X.toarray()
    )
    # Truth and training differ by the halves of the controls, the same in all perturbations.
    apart = screen.deltas - screen.learned
    np.testing.assert_allclose(apart, np.tile(apart[0], (P, 1)), atol=1e-9)
    truth = np.setdiff1d(np.arange(100), screen.control_rows)
    counts = anndata.read_h5ad(files[1])[:100].X
    means = [
        log1p_normalise(counts[half], target_sum=1e4).mean(axis=0)
        for half in (screen.control_rows, truth)
    ]
    np.testing.assert_allclose(apart[0], means[0] - means[1], atol=1e-5)
    for deltas, ranked, targets in zip(screen.deltas, screen.ranked, screen.targets, strict=True):
        assert ranked[-1] == targets[0]
        assert deltas[targets[0]] < -2
        assert np.abs(deltas[ranked[:20]]).mean() > 2 * np.abs(deltas[ranked[60:100]]).mean()
    assert (screen.n_changed > 30).all()


def test_one_warning_names_each_perturbation_that_is_left_out_or_taken_as_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    a, b, c, d, e = GENES.symbols[:5]
    several = {a: 6, f"{a}+ctrl": 6, f"{c}+{b}": 1, f"{b}+{c}": 1}
    labels = np.repeat(
        [*several, b, c, d, e, "ctrl", "ours"], [*several.values(), 10, 10, 10, 10, 9, 9]
    )
    found = _perturbations(labels, GENES, "ctrl", "+", 10)
    assert found == {(0,): [a, f"{a}+ctrl"], (1,): [b], (2,): [c], (3,): [d], (4,): [e]}
    assert caplog.messages == [
        "1 perturbation left out, genes that the model lacks: ours",
        f"1 perturbation left out, fewer than 10 cells: {c}+{b}",
        f"1 perturbation named in several ways, taken as one: {a}/{a}+ctrl",
    ]


@pytest.mark.thorough
def test_the_command_ranks_predictors_of_a_made_screen(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.tsv"
    assert bench(files, out, "--encoded-cells", "2", "--batch-size", "32", "--folds", "3") == 0
    table = pd.read_csv(out, sep="\t", index_col=0)
    assert table.index[0] in SIMPLE
    assert set(SIMPLE) < set(table.index)
    assert len(table) == 7
    vectors, shift = table.loc["ridge_gene_vectors"], table.loc["mean_shift"]
    assert vectors["delta_pearson_low"] > shift["delta_pearson_high"]
    assert vectors["gain_low"] > 0
    assert vectors["pds"] > 0.9
    each = pd.read_csv(tmp_path / "scores.perturbations.tsv", sep="\t")
    assert len(each) == 7 * P
    shown = capsys.readouterr().out
    assert "30 perturbations (0 of several genes)" in shown
    assert "ridge_gene_vectors better than" in shown


def test_the_noise_of_the_controls_predicts_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(3)
    names = ["ctrl"] * 60 + [symbol for symbol in GENES.symbols[:12] for _ in range(20)]
    counts = rng.poisson(rng.uniform(0.5, 3.0, G), (len(names), G)).astype(np.float32)
    made = anndata.AnnData(csr_matrix(counts))
    made.var_names, made.obs["guide"] = list(GENES.ids), names
    made.write_h5ad(tmp_path / "null.h5ad")
    cells = open_cells(tmp_path / "null.h5ad", genes=GENES, min_genes=1)
    noise = rng.normal(size=(12, 3))
    encodings = Encodings(noise, noise, rng.normal(size=(G, 3)).astype(np.float32))
    screen = read_screen(
        cells, GENES, key="guide", control="ctrl", separator="+", min_cells=10, target_sum=1e4,
        seed=0,
    )  # fmt: skip
    still = [name for name, n in zip(screen.names, screen.n_changed, strict=True) if n == 0]
    assert len(still) > 8
    (said,) = [r.getMessage() for r in caplog.records if r.name == "sclong_ds.perturb_bench.screen"]
    assert said.startswith(f"no gene changed in {len(still)} of 12 perturbations, left out of ")
    every = dataclasses.replace(screen, n_changed=np.ones(12, dtype=int))
    found = bench_scores(every, encodings, folds=4, seed=0)["mean_shift"]["delta_pearson"]
    # Over made screens 0.0 with a deviation of 0.17; with one mean of all controls 0.78 and 0.03.
    assert abs(found.mean()) < 0.4
    masked = bench_scores(screen, encodings, folds=4, seed=0)["mean_shift"]["delta_pearson"]
    assert list(masked.index[masked.isna()]) == still


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--perturbation", "drug"], "obs has no such column; it has guide"),
        (["--control", "nobody"], "0 cells of 'guide' with this value, 20 are needed, half for"),
        (["--min-cells", "51"], "100 cells of 'guide' with this value, 102 are needed, half for"),
        (["--separator", "-"], "0 perturbations with known genes"),
        (["--out", "scores.csv"], "the name must end in .tsv"),
    ],
)
def test_what_cannot_be_benched_is_refused_in_a_line(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    more: list[str], said: str,
) -> None:  # fmt: skip
    assert bench(files, tmp_path / "scores.tsv", *more) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
