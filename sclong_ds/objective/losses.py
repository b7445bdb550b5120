"""The losses beside the mean squared error: likelihood of counts, and of genes being expressed.

With `objective.loss: likelihood` a target above 0 costs the negative log likelihood of its count,
which is known to be 1 or more: under a Poisson distribution truncated at zero
(`model.cell_offset: poisson`; Plackett, Biometrics 9, 1953) or a negative binomial one
(`negative_binomial`; Grogger and Carson, J. Applied Econometrics 6, 1991), with the log of the
cell's depth as offset. With `model.zero_head` hidden targets, zeros among them, cost the negative
log likelihood of being expressed or not; the zeros that are targets stand for all zeros, and the
mean over a cell's hidden genes counts as much as the mean over its values.

Is a gene as often expressed as the zero head says? `ExpressedScore` asks the hidden targets, where
a zero stands for mask_prob / zero_mask_prob zeros, beside what depth alone says: the chance of a
Poisson count above 0 at the gene's mean share of counts.

Shapes: B cells, G genes, P target places, Q outputs of the model.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sclong_ds.config.sections import ModelConfig, ObjectiveConfig
from sclong_ds.model.values.depth import one_count
from sclong_ds.model.values.value_head import DISPERSIONS, Output
from sclong_ds.model.values.zero_head import expressed_chance, log_chances
from sclong_ds.objective.batch import MaskedBatch, masked_squared_error
from sclong_ds.objective.targets import Targets

_RATES = (-15.0, 15.0)
"""Logs of rates beyond which there is no gradient."""


def outputs_of(model: ModelConfig, objective: ObjectiveConfig) -> tuple[Output, ...]:
    """Return what the model must say of each target for the loss, in the order of its outputs."""
    found: tuple[Output, ...] = ("value",)
    if objective.loss == "likelihood":
        found = ("log_level",)
        if model.cell_offset == "negative_binomial":
            found += ("log_dispersion",)
    return (*found, "eta") if model.zero_head else found


def n_scored(targets: Targets, model: ModelConfig) -> int:
    """Return by how many targets the loss of a micro-batch is divided: with a zero head, values."""
    counted = targets.n_values if model.zero_head else targets.n_targets
    return int(counted.sum())


def loss_of(
    found: Tensor, masked: MaskedBatch, model: ModelConfig, objective: ObjectiveConfig
) -> Tensor:
    """Return the sum of losses of a micro-batch; the caller divides by `n_scored` of all.

    Args:
        found: (B, P), or (Q, B, P) where there are several: `outputs_of` at the targets.
        masked: The micro-batch.
        model: The `model` section.
        objective: The `objective` section.
    """
    wanted = outputs_of(model, objective)
    if wanted == ("value",):
        return masked_squared_error(found, masked.true, masked.valid)
    each = dict(zip(wanted, found if len(wanted) > 1 else (found,), strict=True))
    values = masked.valid & (masked.true > 0) if model.zero_head else masked.valid
    if "value" in each:
        total = masked_squared_error(each["value"], masked.true, values)
    else:
        one = one_count(masked.x, masked.x > 0).clamp(min=1e-6)
        counts = (masked.true.expm1() / one).round().clamp(min=1)
        cost = count_loss(each["log_level"] - one.log(), counts, each.get("log_dispersion"))
        total = torch.where(values, cost, 0.0).sum()
    if "eta" in each:
        share = objective.mask_prob / objective.zero_mask_prob
        total = total + zero_loss(each["eta"], masked, share)
    return total


def count_loss(log_rate: Tensor, counts: Tensor, log_dispersion: Tensor | None) -> Tensor:
    """Return the negative log likelihood of counts of 1 or more.

    Args:
        log_rate: (B, P) log of the mean of the distribution that is not truncated.
        counts: (B, P), >= 1.
        log_dispersion: (B, P) log of r, with the variance mean + mean^2 / r; None: Poisson.
    """
    log_rate = log_rate.clamp(*_RATES)
    rate, factorial = log_rate.exp(), torch.lgamma(counts + 1)
    if log_dispersion is None:
        expressed, _ = log_chances(log_rate)
        return rate - counts * log_rate + factorial + expressed
    r = log_dispersion.clamp(*DISPERSIONS).exp()
    # r log(r / (r + rate)), and the log of the chance of a zero is the same.
    zero = -r * torch.log1p(rate / r)
    found = torch.lgamma(counts + r) - torch.lgamma(r) - factorial + zero
    found = found + counts * (log_rate - torch.log(r + rate))
    return torch.log(-torch.expm1(zero.clamp(max=-1e-6))) - found


def zero_loss(eta: Tensor, masked: MaskedBatch, share: float) -> Tensor:
    """Return the sum over cells of the mean cost of their hidden targets times their values.

    Args:
        eta: (B, P) of the zero head.
        masked: The micro-batch.
        share: How many zeros a zero target stands for, as one value stands for itself.
    """
    expressed, absent = log_chances(eta)
    is_value = masked.true > 0
    hidden = masked.hidden.gather(1, masked.positions) & masked.valid
    weight = torch.where(is_value, 1.0, share) * hidden
    cost = -(torch.where(is_value, expressed, absent) * weight).sum(1)
    n_values = (masked.valid & is_value).sum(1)
    return (cost / weight.sum(1).clamp(min=1) * n_values).sum()


class ExpressedScore:
    """Figures of the zero head, from sums that add up over batches and ranks.

    Args:
        log_level: (G,) log of the mean of each gene, in units of the values before log1p.
        share: Zeros that a zero target stands for.
        device: Where the sums live.

    Attributes:
        sums: (4,) float64: weight, squared errors of the model, its log loss, squared errors of
            depth alone; all-reduce it, then call `compute`.
    """

    def __init__(self, log_level: NDArray[np.floating], share: float, device: torch.device) -> None:
        self._log_level = torch.as_tensor(log_level, dtype=torch.float32, device=device)
        self._share = share
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, eta: Tensor, masked: MaskedBatch) -> None:
        """Add what the zero head says (B, P) at the targets of a batch."""
        is_value = masked.true > 0
        hidden = masked.hidden.gather(1, masked.positions) & masked.valid
        weight = torch.where(is_value, 1.0, self._share).double() * hidden
        one = one_count(masked.x, (masked.x > 0) & ~masked.hidden).clamp(min=1e-6)
        depth = expressed_chance(self._log_level[masked.positions] - one.log())
        expressed, absent = log_chances(eta)
        truth = is_value.double()
        errors = [
            torch.ones_like(truth),
            (expressed_chance(eta).double() - truth).square(),
            -torch.where(is_value, expressed, absent).double(),
            (depth.double() - truth).square(),
        ]
        self.sums += torch.stack([(error * weight).sum() for error in errors])

    def compute(self) -> dict[str, float]:
        """Return the figures by metric name; none without hidden targets."""
        weight, brier, loss, depth = self.sums.tolist()
        if weight == 0:
            return {}
        return {
            "val/expressed/brier": brier / weight,
            "val/expressed/log_loss": loss / weight,
            "val/expressed/poisson/brier": depth / weight,
        }
