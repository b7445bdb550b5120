"""The figures of hidden values, against loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sclong_ds.objective.scores import MOST_DATASETS, TargetTable, grouped_pearson, scores
from sclong_ds.run_folder.rows import strongest


def made_table(seed: int = 0, n: int = 4000) -> TargetTable:
    rng = np.random.default_rng(seed)
    true = rng.gamma(2.0, 1.0, n)
    return TargetTable(
        true=true, hidden=rng.random(n) < 0.9, several=true > 1.5,
        cell=rng.integers(0, 40, n), gene=rng.integers(0, 30, n), dataset=rng.integers(0, 3, n),
        predicted={
            "model": true + rng.normal(0, 0.5, n),
            "gene_mean": np.full(n, true.mean()),
            "offset": true + rng.normal(0, 0.8, n),
        },
    )  # fmt: skip


def test_every_figure_is_that_of_a_loop() -> None:
    table = made_table()
    found = scores(table, {0: "a", 1: "b", 2: "c"})
    h, t = table.hidden, table.true
    for name, p in table.predicted.items():
        prefix = "val" if name == "model" else f"val/{name}"
        assert found[f"{prefix}/mse"] == pytest.approx(np.mean((p - t)[h] ** 2))
        several = h & table.several
        assert found[f"{prefix}/mse_several"] == pytest.approx(np.mean((p - t)[several] ** 2))
        for number, dataset in enumerate("abc" if name != "gene_mean" else ""):
            here = h & (table.dataset == number)
            wanted = np.mean((p - t)[here] ** 2)
            assert found[f"{prefix}/mse/dataset/{dataset}"] == pytest.approx(wanted)
        if name == "gene_mean":
            assert found[f"{prefix}/pearson"] == found[f"{prefix}/pearson_per_gene"] == 0
            continue
        assert found[f"{prefix}/pearson"] == pytest.approx(np.corrcoef(p[h], t[h])[0, 1])
        per_gene = [
            np.corrcoef(p[k], t[k])[0, 1]
            for d in range(3)
            for g in range(30)
            if (k := h & (table.dataset == d) & (table.gene == g)).sum() >= 8
        ]
        assert found[f"{prefix}/pearson_per_gene"] == pytest.approx(np.mean(per_gene))
        within = [
            np.corrcoef(p[k], t[k])[0, 1]
            for c in range(40)
            if (k := h & (table.cell == c)).sum() >= 20
        ]
        assert found[f"{prefix}/pearson_within_cell"] == pytest.approx(np.mean(within))
    model = table.predicted["model"]
    assert found["val/shown_mse"] == pytest.approx(np.mean((model - t)[~h] ** 2))
    assert strongest(found) == "offset"
    assert found["val/strongest_mse"] == found["val/offset/mse"]
    assert found["val/relative_mse"] == pytest.approx(found["val/mse"] / found["val/offset/mse"])
    assert found["val/n_hidden"] == h.sum()


def paired_table(gap: float, *, datasets: int, seed: int = 0) -> TargetTable:
    """Return 64 cells in which the model's errors differ from the baseline's by `gap`, +- 1."""
    rng = np.random.default_rng(seed)
    n, cell = 6400, np.repeat(np.arange(64), 100)
    own = rng.normal(size=64)[cell]
    other = 2.0 + np.zeros(n)
    return TargetTable(
        true=np.zeros(n), hidden=np.ones(n, bool), several=np.zeros(n, bool), cell=cell,
        gene=np.tile(np.arange(100), 64), dataset=cell % datasets,
        predicted={"model": np.sqrt(other**2 + gap + own), "gene_mean": other},
    )  # fmt: skip


def bounds_of(table: TargetTable) -> tuple[float, float]:
    found = scores(table, {})
    return found["val/vs_strongest_low"], found["val/vs_strongest_high"]


def test_the_bounds_of_the_difference_are_those_of_paired_cells_or_datasets() -> None:
    for gap, datasets in ((0.0, 2), (-0.5, 2), (0.0, 8)):
        table = paired_table(gap, datasets=datasets)
        units = table.cell if datasets < 5 else table.dataset
        error = table.predicted["model"] ** 2 - table.predicted["gene_mean"] ** 2
        means = np.array([error[units == unit].mean() for unit in np.unique(units)])
        half = {64: 1.998, 8: 2.365}[len(means)] * means.std(ddof=1) / np.sqrt(len(means))
        low, high = bounds_of(table)
        assert (low, high) == pytest.approx((means.mean() - half, means.mean() + half), abs=0.05)
    assert bounds_of(paired_table(-0.5, datasets=2))[1] < 0


def test_the_bounds_do_not_depend_on_the_rank_that_had_a_cell() -> None:
    table = paired_table(0.0, datasets=2)
    order = np.argsort(table.cell % 2, kind="stable")
    columns = {name: getattr(table, name)[order] for name in (
        "true", "hidden", "several", "cell", "gene", "dataset",
    )}  # fmt: skip
    predicted = {name: values[order] for name, values in table.predicted.items()}
    assert bounds_of(TargetTable(**columns, predicted=predicted)) == bounds_of(table)


def test_one_cell_has_no_bounds() -> None:
    table = paired_table(0.0, datasets=1)
    one = {name: getattr(table, name)[:100] for name in (
        "true", "hidden", "several", "cell", "gene", "dataset",
    )}  # fmt: skip
    predicted = {name: values[:100] for name, values in table.predicted.items()}
    assert "val/vs_strongest_low" not in scores(TargetTable(**one, predicted=predicted), {})


def test_what_is_shown_changes_no_figure_but_its_own() -> None:
    table = made_table()
    shown = ~table.hidden
    better = table.predicted["model"].copy()
    better[shown] = table.true[shown]
    other = TargetTable(
        **{
            name: getattr(table, name)
            for name in ("true", "hidden", "several", "cell", "gene", "dataset")
        },
        predicted=table.predicted | {"model": better},
    )
    before, after = scores(table, {0: "a"}), scores(other, {0: "a"})
    assert {name for name in before if before[name] != after[name]} == {"val/shown_mse"}
    assert after["val/shown_mse"] == 0


def test_the_datasets_with_most_values_have_figures_of_their_own() -> None:
    """A row of metrics has at most 1,000 figures."""
    table = made_table(n=20_100)
    table.dataset[:] = np.repeat(np.arange(200), np.arange(1, 201))
    table.hidden[:] = True
    found = scores(table, {d: f"d{d}" for d in range(200)})
    named = {name for name in found if name.startswith("val/mse/dataset/")}
    assert named == {f"val/mse/dataset/d{d}" for d in range(200 - MOST_DATASETS, 200)}
    here = table.hidden & (table.dataset == 150)
    wanted = np.mean((table.predicted["model"] - table.true)[here] ** 2)
    assert found["val/mse/dataset/d150"] == pytest.approx(wanted)


def test_without_hidden_values_there_is_no_figure() -> None:
    table = made_table(n=5)
    table.hidden[:] = False
    assert scores(table, {}) == {}


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 9), st.integers(1, 6))
def test_grouped_correlation_is_the_mean_of_each_groups(
    seed: int, n: int, n_groups: int, least: int
) -> None:
    rng = np.random.default_rng(seed)
    predicted, true = rng.integers(0, 4, n).astype(float), rng.integers(0, 4, n).astype(float)
    group = rng.integers(0, n_groups, n)
    wanted = []
    for g in np.unique(group):
        p, t = predicted[group == g], true[group == g]
        if len(t) >= least and t.std() > 0:
            wanted.append(np.corrcoef(p, t)[0, 1] if p.std() > 0 else 0.0)
    found = grouped_pearson(predicted, true, group, least=least)
    assert found == (pytest.approx(np.mean(wanted), abs=1e-9) if wanted else None)
