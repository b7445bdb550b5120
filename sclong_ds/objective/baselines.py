"""Predictors of hidden values that know nothing but a gene's mean and a cell's depth.

A masked value of an expressed gene follows for a large part from the depth of its cell: half of the
values of droplet data are single counts, whose value is a function of the cell's total alone. What
a model has learnt is what it predicts better than these:

- `gene_mean`: the gene's mean value over the training cells that express it.
- `offset`: that plus one number per cell, the mean of (value - gene mean) over its visible values.
- `poisson`: the expected value of a Poisson count of 1 or more, whose mean is the gene's share of
  the counts of the training cells that measure it, times the cell's depth. The smallest visible
  value stands for one count.
- `linear`: least squares over hidden values of training cells, in (1, m, o, s, m o, m s, m m) with
  the gene mean m, the offset o and the smallest visible value s.

Shapes: B cells, G genes, P target places, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from sclong_ds.corpus.corpus import GeneStats
from sclong_ds.model.values.depth import expected_value

N_FEATURES = 7


@dataclass(frozen=True, slots=True)
class _Depth:
    """What the visible values of cells say about their depth."""

    offset: Tensor
    """(B, 1) mean of value minus gene mean; 0 for a cell without visible values."""
    smallest: Tensor
    """(B, 1) smallest visible value; 0 for a cell without any."""


class DepthBaselines:
    """The baselines, fitted by `fit`.

    Args:
        stats: Of the training cells.
        device: Where predictions are made.

    Attributes:
        normal: (F, F + 1) float64 sums of the least squares: all-reduce it, then call `fit`.
    """

    def __init__(self, stats: GeneStats, device: torch.device) -> None:
        self._mean = torch.as_tensor(stats.mean_expressed, dtype=torch.float64, device=device)
        share = torch.as_tensor(stats.share(), dtype=torch.float64, device=device)
        self._share = share.clamp(min=1e-9)
        self._target_sum = stats.target_sum
        self.normal = torch.zeros(N_FEATURES, N_FEATURES + 1, dtype=torch.float64, device=device)
        self._weights: Tensor | None = None

    def add(self, x: Tensor, hidden: Tensor, positions: Tensor, wanted: Tensor) -> None:
        """Add training cells to the fit.

        Args:
            x: (B, G) values, hidden ones included.
            hidden: (B, G) bool.
            positions: (B, P) int64 genes of the targets.
            wanted: (B, P) bool, the targets to fit: hidden and above 0.
        """
        features = self._features(self._depth(x, hidden), positions)[wanted]
        true = x.double().gather(1, positions)[wanted]
        self.normal += features.T @ torch.cat([features, true[:, None]], dim=1)

    def fit(self) -> None:
        """Solve the least squares; without training values the weights are those of `offset`."""
        left, right = self.normal[:, :-1], self.normal[:, -1]
        if not bool(left[0, 0] > 0):
            self._weights = torch.zeros_like(right)
            self._weights[1:3] = 1.0
            return
        # The minimum-norm solution where cells are all alike and features repeat each other.
        self._weights = (
            torch.linalg.pinv(left.cpu(), rtol=1e-12, hermitian=True).to(right.device) @ right
        )

    def predict(self, x: Tensor, hidden: Tensor, positions: Tensor) -> Tensor:
        """Return what every baseline predicts at the targets.

        Args:
            x: (B, G) values, hidden ones included; those are not looked at.
            hidden: (B, G) bool.
            positions: (B, P) int64 genes of the targets.

        Returns:
            (baselines, B, P) float64, in the order of `DEPTH_BASELINES`.
        """
        if self._weights is None:
            raise RuntimeError("predict before fit")
        depth = self._depth(x, hidden)
        mean = self._mean[positions]
        linear = self._features(depth, positions) @ self._weights
        return torch.stack([mean, mean + depth.offset, self._poisson(depth, positions), linear])

    def residuals(self, x: Tensor, hidden: Tensor | None = None) -> csr_matrix:
        """Return visible values minus what the linear baseline predicts there.

        Args:
            x: (B, G) values, hidden ones included.
            hidden: (B, G) bool; None: all are visible.

        Returns:
            (B, G) float32 on the CPU, stored at the visible values.
        """
        if self._weights is None:
            raise RuntimeError("residuals before fit")
        unknown = torch.zeros_like(x, dtype=torch.bool) if hidden is None else hidden
        rows, genes = torch.nonzero((x > 0) & ~unknown, as_tuple=True)
        depth = self._depth(x, unknown)
        own = _Depth(depth.offset[rows], depth.smallest[rows])
        linear = self._features(own, genes[:, None]) @ self._weights
        values = (x[rows, genes].double() - linear[:, 0]).float()
        counts = torch.bincount(rows, minlength=len(x)).cpu().numpy()
        ends = np.concatenate([[0], np.cumsum(counts)])
        return csr_matrix((values.cpu().numpy(), genes.cpu().numpy(), ends), shape=x.shape)

    def _depth(self, x: Tensor, hidden: Tensor) -> _Depth:
        visible = (x > 0) & ~hidden
        n = visible.sum(dim=1, keepdim=True)
        above = torch.where(visible, x.double() - self._mean, 0.0).sum(dim=1, keepdim=True)
        smallest = torch.where(visible, x.double(), torch.inf).amin(dim=1, keepdim=True)
        return _Depth(above / n.clamp(min=1), torch.where(n > 0, smallest, 0.0))

    def _features(self, depth: _Depth, positions: Tensor) -> Tensor:
        """Return (B, P, F)."""
        m = self._mean[positions]
        o, s = depth.offset.expand_as(m), depth.smallest.expand_as(m)
        return torch.stack([torch.ones_like(m), m, o, s, m * o, m * s, m * m], dim=-1)

    def _poisson(self, depth: _Depth, positions: Tensor) -> Tensor:
        """Return (B, P); the gene mean in cells without a visible value."""
        share = self._share[positions]
        one_count = torch.expm1(depth.smallest)
        log_level = torch.log(self._target_sum * share)
        found = expected_value(log_level, one_count)
        return torch.where(depth.smallest > 0, found, self._mean[positions])
