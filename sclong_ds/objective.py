"""Masked-value reconstruction: which values are targets, the loss, and validation figures.

Targets are ceil(mask_prob * n) of a cell's n non-zero values, drawn without replacement; a target
is hidden from the model with probability replace_prob and keeps its value otherwise. The draw is a
pure function of (seed, epoch, cell), so it depends neither on the batch nor on the rank. The loss
is the mean squared error over all targets of the global batch. Source: the scLong paper (15% of the
non-zero values, 90% replaced).

Shapes: B cells, G genes.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sclong_ds.config import ObjectiveConfig
from sclong_ds.data import CellBatch, log1p_normalise

BIN_EDGES = (1.0, 1.5, 2.0, 3.0)
"""Borders of the expression bins of validation, in log1p units."""
VALIDATION_EPOCH = 2**62
"""Epoch number of validation masks: fixed, and never reached by training."""


@dataclass(frozen=True, slots=True)
class MaskedBatch:
    """Model input and targets of one micro-batch.

    Attributes:
        x: (B, G) float32 transformed expression.
        hidden: (B, G) bool, values the model must not see.
        targets: (B, G) bool, values that count in the loss; a superset of `hidden`.
    """

    x: Tensor
    hidden: Tensor
    targets: Tensor


def target_count(n_nonzero: int, objective: ObjectiveConfig) -> int:
    """Return how many of a cell's non-zero values are targets.

    Args:
        n_nonzero: Non-zero values of the cell.
        objective: The `objective` section.
    """
    if objective.target_rounding == "float32":
        return math.ceil(np.float32(n_nonzero) * np.float32(objective.mask_prob))
    # The product is rounded to 9 digits first: 0.15 * 100 is 15.000000000000002 in binary.
    return math.ceil(round(n_nonzero * objective.mask_prob, 9))


def draw_masks(
    n_nonzero: int, objective: ObjectiveConfig, *, seed: int, epoch: int, cell_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the targets of one cell.

    Args:
        n_nonzero: Non-zero values of the cell.
        objective: The `objective` section.
        seed: `run.seed`.
        epoch: Epoch of this visit to the cell.
        cell_id: Row of the cell in the corpus.

    Returns:
        (n_targets,) positions among the cell's non-zero values, and (n_targets,) bool: hidden or
        not.
    """
    # Counter blocks of a keyed generator: independent streams per (epoch, cell); 2**63 keeps them
    # apart from the loader's.
    rng = np.random.Generator(np.random.Philox(key=seed + 2**63, counter=[0, 0, cell_id, epoch]))
    positions = rng.permutation(n_nonzero)[: target_count(n_nonzero, objective)]
    return positions, rng.random(len(positions)) < objective.replace_prob


def mask_batch(
    batch: CellBatch, objective: ObjectiveConfig, *, target_sum: float, seed: int
) -> MaskedBatch:
    """Transform a micro-batch and draw its targets.

    Args:
        batch: Raw counts, cell ids and epochs.
        objective: The `objective` section.
        target_sum: `data.target_sum`.
        seed: `run.seed`.

    Returns:
        Tensors on the CPU.
    """
    x = log1p_normalise(batch.counts, target_sum=target_sum)
    targets, hidden = np.zeros(x.shape, dtype=bool), np.zeros(x.shape, dtype=bool)
    indptr, indices = batch.counts.indptr, batch.counts.indices
    for b, (cell, epoch) in enumerate(zip(batch.cell_ids, batch.epochs, strict=True)):
        genes = indices[indptr[b] : indptr[b + 1]]
        positions, replaced = draw_masks(
            len(genes), objective, seed=seed, epoch=int(epoch), cell_id=int(cell)
        )
        targets[b, genes[positions]] = True
        hidden[b, genes[positions[replaced]]] = True
    return MaskedBatch(torch.from_numpy(x), torch.from_numpy(hidden), torch.from_numpy(targets))


def masked_squared_error(predicted: Tensor, x: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of squared errors over the targets.

    Args:
        predicted: (B, G).
        x: (B, G) true values.
        targets: (B, G) bool.

    Returns:
        float32 scalar (float64 for float64 input); the caller divides by the number of targets of
        the global batch.
    """
    kind = torch.promote_types(predicted.dtype, torch.float32)
    # A product with the mask and not a selection: a selection would make a GPU wait for the count.
    return ((predicted.to(kind) - x.to(kind)).square() * targets).sum()


class MaskedMetrics:
    """Sums from which validation figures follow; adding over ranks gives the figures of all cells.

    Args:
        gene_mean: (G,) prediction of the per-gene-mean predictor: mean expressed value in the
            training cells.
        device: Where the sums live.
    """

    _NAMES = ("sse", "baseline_sse", "n", "p", "t", "b", "pp", "tt", "bb", "pt", "bt")

    def __init__(self, gene_mean: np.ndarray, device: torch.device) -> None:
        self.gene_mean = torch.as_tensor(gene_mean, dtype=torch.float32, device=device)
        self._edges = torch.tensor(BIN_EDGES, device=device)
        self.sums = torch.zeros(
            len(BIN_EDGES) + 1, len(self._NAMES), dtype=torch.float64, device=device
        )

    def add(self, predicted: Tensor, x: Tensor, targets: Tensor) -> None:
        """Add one batch: predicted and true values (B, G), targets (B, G) bool."""
        p, t = predicted[targets].double(), x[targets].double()
        b = self.gene_mean.expand_as(x)[targets].double()
        rows = torch.stack(
            [
                (p - t) ** 2,
                (b - t) ** 2,
                torch.ones_like(t),
                p,
                t,
                b,
                p * p,
                t * t,
                b * b,
                p * t,
                b * t,
            ],
            dim=1,
        )
        self.sums.index_add_(0, torch.bucketize(t.float(), self._edges, right=True), rows)

    def compute(self) -> dict[str, float]:
        """Return the figures by metric name.

        Masked MSE and Pearson of the model and of the baseline, by bin too.
        """
        total = dict(zip(self._NAMES, self.sums.sum(0).tolist(), strict=True))
        n = max(total["n"], 1.0)
        figures = {
            "val/mse": total["sse"] / n,
            "val/baseline_mse": total["baseline_sse"] / n,
            "val/pearson": _pearson(total, "p"),
            "val/baseline_pearson": _pearson(total, "b"),
            "val/target_variance": total["tt"] / n - (total["t"] / n) ** 2,
            "val/n_values": total["n"],
        }
        for i, row in enumerate(self.sums.tolist()):
            if row[2]:
                figures[f"val/mse/bin_{i}"] = row[0] / row[2]
                figures[f"val/baseline_mse/bin_{i}"] = row[1] / row[2]
        return figures


def bin_labels() -> list[str]:
    """Return the expression bins for people, lowest first."""
    edges = [f"{e:g}" for e in BIN_EDGES]
    inner = [f"{a} to {b}" for a, b in itertools.pairwise(edges)]
    return [f"< {edges[0]}", *inner, f"≥ {edges[-1]}"]


def _pearson(s: dict[str, float], name: str) -> float:
    n = max(s["n"], 1.0)
    covariance = s[f"{name}t"] / n - s[name] / n * s["t"] / n
    variances = (s[2 * name] / n - (s[name] / n) ** 2) * (s["tt"] / n - (s["t"] / n) ** 2)
    # A constant prediction has no correlation: 0, not an error.
    return covariance / math.sqrt(variances) if variances > 1e-18 else 0.0
