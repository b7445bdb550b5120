"""Validation figures of masked-value reconstruction, from sums that add up over batches and ranks.

Every figure of the model stands beside that of the per-gene-mean predictor (`baseline_`). MSE,
Pearson and Spearman are given over all non-zero targets, by bin of the true value (`.../bin_K`) and
by the encoder that read the gene (`.../large`, `.../mini`); MSE of targets that are zero genes
apart from all others (`.../zeros`).

Spearman comes from a two-dimensional histogram, predicted by true, whose midranks are correlated.
Exact ranks would need all pairs in one place; counts add up exactly, so one all-reduce of fixed
size gives the same figure for any number of ranks. The price is that values of one bin count as
equal: the bins are 0.003 wide at 0, 0.008 at 1 and 0.026 at 3. Measured against exact ranks, this
moves Spearman by about 0.001 where the predictions' standard deviation is 0.3 or more, and lowers
it by up to 0.004 at 0.1 and 0.008 at 0.03; within an expression bin of 1,000 values it moves it by
0.005 either way. No rank bin has values of two expression bins.

Shapes: B cells, G genes, P target places, Q bins of a histogram side.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from sclong_ds.model.routing import candidate_order, expression_order

BIN_EDGES = (1.0, 1.5, 2.0, 3.0)
"""Borders of the expression bins of validation, in log1p units."""
_RANK_BINS = 512
_RANK_SCALE = 1.5
"""A value v falls into the rank bin floor(Q * v / (v + scale)): finest where most values are."""
_VALUES = ("sse", "baseline_sse", "n", "p", "t", "b", "pp", "tt", "bb", "pt", "bt")
_RANK_STARTS = (
    0, *(math.ceil(_RANK_BINS * edge / (edge + _RANK_SCALE)) for edge in BIN_EDGES), _RANK_BINS
)  # fmt: skip
"""First rank bin of each expression bin."""
_ENCODERS = ("large", "mini")
_BINS = len(BIN_EDGES) + 1
_ZEROS = _BINS
"""Place of the zero targets behind the expression bins."""


class MaskedMetrics:
    """Sums from which validation figures follow; adding over ranks gives the figures of all cells.

    Args:
        gene_mean: (G,) prediction of the per-gene-mean predictor: mean expressed value in the
            training cells.
        device: Where the sums live.

    Attributes:
        sums: (sums,) float64, 8.4 MB; the only state: all-reduce it, then call `compute`.
    """

    def __init__(self, gene_mean: NDArray[np.floating], device: torch.device) -> None:
        self._gene_mean = torch.as_tensor(gene_mean, dtype=torch.float32, device=device)
        self._edges = torch.tensor(BIN_EDGES, device=device)
        self._starts = torch.tensor(_RANK_STARTS, device=device)
        moments = (len(_ENCODERS), _BINS + 1, len(_VALUES))
        ranks = (len(_ENCODERS), 2, _RANK_BINS, _RANK_BINS)
        sizes = [math.prod(moments), math.prod(ranks)]
        self.sums = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        first, second = self.sums.split(sizes)
        self._moments, self._ranks = first.view(moments), second.view(ranks)

    def add(
        self, predicted: Tensor, true: Tensor, valid: Tensor, positions: Tensor, in_large: Tensor
    ) -> None:
        """Add one batch; nothing waits for the device.

        Args:
            predicted: (B, P) predicted values.
            true: (B, P) true values, >= 0; 0 marks a zero target.
            valid: (B, P) bool, False at padding.
            positions: (B, P) int64 gene of each target.
            in_large: (B, P) bool, True where the large encoder read the gene, see `routed_large`.
        """
        # Padding stays, with the weight 0: to select the rest would make a GPU wait for its count.
        p, t = (torch.where(valid, v.float(), 0.0).flatten() for v in (predicted, true))
        b = self._gene_mean[positions].flatten()
        weight = valid.flatten().double()
        encoder = (~in_large).flatten().long()
        level = torch.bucketize(t, self._edges, right=True)
        bins = torch.where(t == 0, _ZEROS, level)
        rows = _moment_rows(p.double(), t.double(), b.double()) * weight[:, None]
        self._moments.view(-1, len(_VALUES)).index_add_(0, encoder * (_BINS + 1) + bins, rows)
        weight = weight * (t != 0)
        column = _rank_bin(t).clamp(self._starts[level], self._starts[level + 1] - 1)
        for k, values in enumerate((p, b)):
            row = (encoder * 2 + k) * _RANK_BINS + _rank_bin(values)
            self._ranks.view(-1).index_add_(0, row * _RANK_BINS + column, weight)

    def compute(self) -> dict[str, float]:
        """Return the figures that have values, by metric name."""
        moments, ranks = self._moments.cpu().numpy(), self._ranks.cpu().numpy()
        nonzero = moments[:, :_BINS].sum(axis=1)
        figures = _figures(nonzero.sum(axis=0), "") | _rank_figures(ranks.sum(axis=0), "")
        if figures:
            total = dict(zip(_VALUES, nonzero.sum(axis=0).tolist(), strict=True))
            mean = total["t"] / total["n"]
            figures["val/target_variance"] = total["tt"] / total["n"] - mean**2
        for k, (start, stop) in enumerate(itertools.pairwise(_RANK_STARTS)):
            figures |= _figures(moments[:, k].sum(axis=0), f"/bin_{k}")
            figures |= _rank_figures(ranks[..., start:stop].sum(axis=0), f"/bin_{k}")
        for e, name in enumerate(_ENCODERS):
            figures |= _figures(nonzero[e], f"/{name}") | _rank_figures(ranks[e], f"/{name}")
        # Zero targets are all equal: no correlation to speak of.
        zeros = _figures(moments[:, _ZEROS].sum(axis=0), "/zeros")
        return figures | {name: v for name, v in zeros.items() if "pearson" not in name}


def routed_large(
    x: Tensor,
    hidden: Tensor,
    positions: Tensor,
    *,
    top_seq_len: int,
    routing: Literal["top", "expressed"],
    pad_token: bool,
) -> Tensor:
    """Tell which targets the large encoder reads; see `sclong_ds.model.routing`.

    Args:
        x: (B, G) transformed expression.
        hidden: (B, G) bool, values the model does not see.
        positions: (B, P) int64 genes.
        top_seq_len: `model.top_seq_len`.
        routing: `model.routing`. top: visible values by falling value, then hidden ones. expressed:
            visible expressed genes by falling value, then hidden ones; zero genes never.
        pad_token: `model.pad_token`; with routing top the token counts as one more visible zero.

    Returns:
        (B, P) bool; nothing waits for the device.
    """
    if routing == "expressed":
        order, candidates = candidate_order(x, hidden), (x > 0) | hidden
        large = (torch.argsort(order, dim=1) < top_seq_len) & candidates
    else:
        padding = (0, int(pad_token))
        order = expression_order(pad(x, padding), pad(hidden, padding))
        large = torch.argsort(order, dim=1) < top_seq_len
    return large.gather(1, positions)


def bin_labels() -> list[str]:
    """Return readable names of the expression bins, lowest first."""
    edges = [f"{e:g}" for e in BIN_EDGES]
    inner = [f"{a} to {b}" for a, b in itertools.pairwise(edges)]
    return [f"< {edges[0]}", *inner, f"≥ {edges[-1]}"]


def _moment_rows(p: Tensor, t: Tensor, b: Tensor) -> Tensor:
    """Return (values, len(_VALUES)) terms of the sums, in the order of _VALUES."""
    errors = [(p - t) ** 2, (b - t) ** 2, torch.ones_like(t)]
    return torch.stack([*errors, p, t, b, p * p, t * t, b * b, p * t, b * t], dim=1)


def _rank_bin(values: Tensor) -> Tensor:
    """Return the histogram bin of each value; values below 0 share the first."""
    positive = values.clamp(min=0)
    bins = (positive / (positive + _RANK_SCALE) * _RANK_BINS).long()
    # The outermost clamp also keeps NaN, whose integer is any, inside the histogram.
    return bins.clamp(0, _RANK_BINS - 1)


def _figures(sums: NDArray[np.float64], suffix: str) -> dict[str, float]:
    """Return MSE, Pearson and number of values; nothing for sums without values."""
    s = dict(zip(_VALUES, sums.tolist(), strict=True))
    if s["n"] == 0:
        return {}
    return {
        f"val/mse{suffix}": s["sse"] / s["n"],
        f"val/baseline_mse{suffix}": s["baseline_sse"] / s["n"],
        f"val/pearson{suffix}": _pearson(s, "p"),
        f"val/baseline_pearson{suffix}": _pearson(s, "b"),
        f"val/n_values{suffix}": s["n"],
    }


def _rank_figures(counts: NDArray[np.float64], suffix: str) -> dict[str, float]:
    """Return the Spearman correlations of (2, Q, any) histograms; nothing for empty ones."""
    if not counts.any():
        return {}
    names = (f"val/spearman{suffix}", f"val/baseline_spearman{suffix}")
    return {name: _spearman(c) for name, c in zip(names, counts, strict=True)}


def _spearman(counts: NDArray[np.float64]) -> float:
    """Return the correlation of the midranks of a (Q, any) histogram; 0 if one side is constant."""
    sides = [counts.sum(axis=1), counts.sum(axis=0)]
    # A midrank minus the mean rank: the values below, half of the bin's own, half of all.
    p, t = (np.cumsum(n) - n / 2 - n.sum() / 2 for n in sides)
    variances = (sides[0] @ p**2) * (sides[1] @ t**2)
    return float(p @ counts @ t / math.sqrt(variances)) if variances > 0 else 0.0


def _pearson(s: dict[str, float], name: str) -> float:
    """Return the correlation with the true values; 0 if one side is constant."""
    n = s["n"]
    covariance = s[f"{name}t"] / n - s[name] / n * s["t"] / n
    variances = [s[2 * v] / n - (s[v] / n) ** 2 for v in (name, "t")]
    # Rounding leaves about 1e-16 of the mean square of a constant side.
    if any(var <= 1e-12 * s[2 * v] / n for var, v in zip(variances, (name, "t"), strict=True)):
        return 0.0
    return covariance / math.sqrt(variances[0] * variances[1])
