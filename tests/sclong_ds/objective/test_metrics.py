"""Validation figures are those of numpy and scipy, whatever the batches and ranks.

Covers also `sclong_ds/run_folder/metric_names.py`.
"""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import NoHostSync
from scipy import stats

from sclong_ds.model.routing import expression_order, route
from sclong_ds.objective.metrics import BIN_EDGES, MaskedMetrics, bin_labels, routed_large

CPU = torch.device("cpu")
GENES = 60
MEAN = np.random.default_rng(9).uniform(0.2, 2.5, GENES).astype(np.float32)


@dataclasses.dataclass
class Values:
    """Made-up predictions and targets (B, P): about a fifth zeros, a fifth padding."""

    predicted: torch.Tensor
    true: torch.Tensor
    valid: torch.Tensor
    positions: torch.Tensor
    in_large: torch.Tensor

    def __getitem__(self, rows):
        return Values(*(getattr(self, f.name)[rows] for f in dataclasses.fields(self)))

    def __iter__(self):
        return iter(getattr(self, f.name) for f in dataclasses.fields(self))

    def chosen(self, where):
        """(predicted, true, baseline) of the valid places of a mask, float64."""
        pick = self.valid & where
        tensors = (self.predicted, self.true, torch.tensor(MEAN)[self.positions])
        return [v[pick].double().numpy() for v in tensors]


def values(n_cells=40, places=64, *, noise=0.5, seed=0):
    rng = np.random.default_rng(seed)
    # As in data: log1p of few counts over a cell's total, so many values are equal.
    counts, totals = rng.poisson(1.2, (n_cells, places)), rng.uniform(5e2, 2e4, (n_cells, 1))
    true = np.log1p(1e4 * counts / totals)
    return Values(
        torch.tensor(true + noise * rng.normal(size=true.shape), dtype=torch.float32),
        torch.tensor(true, dtype=torch.float32),
        torch.tensor(rng.random(true.shape) < 0.8),
        torch.tensor(rng.integers(0, GENES, true.shape)),
        torch.tensor(rng.random(true.shape) < 0.3),
    )


def score(*parts):
    metrics = MaskedMetrics(MEAN, CPU)
    for part in parts:
        metrics.add(*part)
    return metrics.compute()


def check(figures, suffix, chosen):
    p, t, b = chosen
    for prefix, predicted in (("", p), ("baseline_", b)):
        expected = {
            f"val/{prefix}mse{suffix}": ((predicted - t) ** 2).mean(),
            f"val/{prefix}pearson{suffix}": np.corrcoef(predicted, t)[0, 1],
        }
        for name, value in expected.items():
            assert figures[name] == pytest.approx(value), name
        exact = stats.spearmanr(predicted, t).statistic
        # Within an expression bin, fewer rank bins tell the true values apart.
        near = 4e-3 if "bin" in suffix else 1e-3
        assert figures[f"val/{prefix}spearman{suffix}"] == pytest.approx(exact, abs=near)
    assert figures[f"val/n_values{suffix}"] == len(t)


def test_figures_equal_numpy_and_scipy():
    data = values(n_cells=2000)
    # A value on a border belongs to the upper bin.
    data.true[:9, :4] = torch.tensor(BIN_EDGES)
    figures = score(data)
    nonzero = data.true > 0
    check(figures, "", data.chosen(nonzero))
    check(figures, "/large", data.chosen(nonzero & data.in_large))
    check(figures, "/mini", data.chosen(nonzero & ~data.in_large))
    edges = [0.0, *BIN_EDGES, np.inf]
    for k in range(5):
        inside = nonzero & (data.true >= edges[k]) & (data.true < edges[k + 1])
        check(figures, f"/bin_{k}", data.chosen(inside))
    t = data.chosen(nonzero)[1]
    assert figures["val/target_variance"] == pytest.approx(t.var())
    p, t, b = data.chosen(~nonzero)
    assert figures["val/mse/zeros"] == pytest.approx((p**2).mean())
    assert figures["val/baseline_mse/zeros"] == pytest.approx((b**2).mean())
    assert figures["val/n_values/zeros"] == len(t)
    assert len(bin_labels()) == 5


@settings(max_examples=15, deadline=None)
@given(
    noise=st.sampled_from([0.0, 0.1, 0.5, 3.0]),
    slope=st.sampled_from([-1.0, 0.5, 2.0]),
    seed=st.integers(0, 99),
)
def test_spearman_is_near_the_exact_one(noise, slope, seed):
    data = values(n_cells=60, noise=0.0, seed=seed)
    rng = np.random.default_rng(seed)
    spread = torch.tensor(noise * rng.normal(size=data.true.shape), dtype=torch.float32)
    data.predicted = (2.0 + slope * data.true + spread).clamp(min=0)
    p, t, _ = data.chosen(data.true > 0)
    exact = stats.spearmanr(p, t).statistic
    assert score(data)["val/spearman"] == pytest.approx(exact, abs=2e-3)


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 39), max_size=4, unique=True), seed=st.integers(0, 99))
def test_sums_add_up_over_batches_and_ranks(cuts, seed):
    data = values(seed=seed)
    whole = MaskedMetrics(MEAN, CPU)
    whole.add(*data)
    ranks = []
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 40], strict=True):
        ranks.append(MaskedMetrics(MEAN, CPU))
        ranks[-1].add(*data[start:stop])
    first = ranks[0]
    first.sums += sum(rank.sums for rank in ranks[1:])
    assert first.compute() == pytest.approx(whole.compute(), rel=1e-9)
    assert first.compute()["val/spearman"] == whole.compute()["val/spearman"]


def test_padding_changes_nothing_whatever_it_holds():
    data = values()
    other = dataclasses.replace(data)
    other.predicted = torch.where(data.valid, data.predicted, torch.nan)
    other.true = torch.where(data.valid, data.true, 5.0)
    other.positions = torch.where(data.valid, data.positions, 0)
    assert score(other) == score(data)


def test_figures_without_values_are_left_out():
    data = values()
    assert score() == {}
    assert score(dataclasses.replace(data, valid=torch.zeros_like(data.valid))) == {}
    zeros = score(dataclasses.replace(data, true=torch.zeros_like(data.true)))
    assert set(zeros) == {"val/mse/zeros", "val/baseline_mse/zeros", "val/n_values/zeros"}
    low = dataclasses.replace(data, in_large=torch.zeros_like(data.in_large))
    low.true = data.true.clamp(max=0.9)
    figures = score(low)
    assert not {n for n in figures if n.endswith(("/large", "/bin_1", "/bin_4"))}
    assert figures["val/mse/mini"] == figures["val/mse"] == figures["val/mse/bin_0"]


def test_constant_predictions_have_no_correlation():
    data = values()
    data.predicted = torch.full_like(data.true, 1.3)
    figures = score(data)
    assert figures["val/pearson"] == figures["val/spearman"] == figures["val/pearson/bin_2"] == 0


def test_a_prediction_that_is_not_finite_is_seen():
    data = values()
    data.valid[0, 0] = True
    data.true[0, 0], data.predicted[0, 0] = 1.2, torch.nan
    assert np.isnan(score(data)["val/mse"])


def test_figures_need_no_synchronisation():
    metrics, data = MaskedMetrics(MEAN, CPU), values()
    x = torch.rand(40, GENES)
    with NoHostSync():
        large = routed_large(
            x, x < 0.1, data.positions, top_seq_len=9, routing="top", pad_token=True
        )
        metrics.add(data.predicted, data.true, data.valid, data.positions, large)


@st.composite
def cells(draw):
    n_genes = draw(st.integers(2, 30))
    rows = st.lists(
        st.tuples(st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.5]), st.booleans()),
        min_size=n_genes,
        max_size=n_genes,
    )
    cell = draw(rows)
    x, hidden = ([row[i] for row in cell] for i in (0, 1))
    return torch.tensor([x]), torch.tensor([hidden]), draw(st.integers(1, n_genes - 1))


@settings(max_examples=80, deadline=None)
@given(cell=cells(), pad_token=st.booleans())
def test_top_routing_is_the_models(cell, pad_token):
    x, hidden, top = cell
    padded = [torch.nn.functional.pad(v, (0, int(pad_token))) for v in (x, hidden)]
    expected = set(expression_order(*padded)[0, :top].tolist())
    positions = torch.arange(x.shape[1])[None].flip(1)
    large = routed_large(x, hidden, positions, top_seq_len=top, routing="top", pad_token=pad_token)
    assert set(positions[large].tolist()) == expected - {x.shape[1]}


@settings(max_examples=80, deadline=None)
@given(cell=cells())
def test_expressed_routing_is_the_models(cell):
    x, hidden, top = cell
    routes = route(x, hidden, top_seq_len=top, lengths=None)
    positions = torch.arange(x.shape[1])[None]
    large = routed_large(
        x, hidden, positions, top_seq_len=top, routing="expressed", pad_token=False
    )
    assert set(positions[large].tolist()) == set(routes.order[: routes.high.lengths[0]].tolist())


def test_hidden_values_rank_last():
    """Written out: what the large encoder reads of a cell, hidden values in brackets."""
    x = torch.tensor([[0.0, 3.0, 1.0, 2.0, 0.0, 1.0]])  # 0 (3) 1 2 (0) 1
    hidden = torch.tensor([[False, True, False, False, True, False]])
    positions = torch.tensor([[1, 2, 3, 4, 5, 0]])

    def large(top, routing):
        found = routed_large(x, hidden, positions, top_seq_len=top, routing=routing, pad_token=True)
        return set(positions[found].tolist())

    assert large(2, "top") == large(2, "expressed") == {3, 2}
    assert large(4, "top") == {3, 2, 5, 0}
    assert large(5, "top") == {3, 2, 5, 0}  # the pad token is the fifth
    assert large(4, "expressed") == {3, 2, 5, 1}
    assert large(6, "expressed") == {3, 2, 5, 1, 4}
