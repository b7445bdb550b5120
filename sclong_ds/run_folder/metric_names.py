"""Names of the metrics that several modules share, each defined once.

A figure of the model over hidden values is `val/FIGURE`, that of a baseline `val/BASELINE/FIGURE`.
"""

from __future__ import annotations

LOSS = "train/loss"
"""Mean loss of the step's targets, those shown to the model among them: the squared error, or the
negative log likelihood that `objective.loss` and `model.zero_head` ask for."""
SKIPPED_METRIC = "train/skipped_steps"
"""Steps of the run so far that changed no weight, since their loss or gradients were not finite."""
SPIKE_METRIC = "train/spike"
"""1 where the loss of the step was a spike, else 0."""

DEPTH_BASELINES = ("gene_mean", "offset", "poisson", "linear")
"""Those that know a gene's mean and a cell's depth alone (`sclong_ds.objective.baselines`)."""
BASELINES = (*DEPTH_BASELINES, "nearest", "principal")
"""What validation holds the model to, weakest first as a rule."""
MSE = "val/mse"
STRONGEST_MSE = "val/strongest_mse"
"""Smallest error of a baseline."""
RELATIVE_MSE = "val/relative_mse"
"""Error of the model over that of the strongest baseline."""
VS_STRONGEST_LOW = "val/vs_strongest_low"
"""Error of the model less that of the strongest baseline: lower bound of 95%, from resamples of the
validation cells, or of their datasets where there are 5."""
VS_STRONGEST_HIGH = "val/vs_strongest_high"
"""The upper bound: where 0 is between the two, the model is not told apart from the baseline."""
MEAN_MSE = "val/baseline_mse"
"""Error of the per-gene mean."""
SHOWN_MSE = "val/shown_mse"
"""Error of targets that the model was shown."""
SEVERAL_MSE = "val/mse_several"
"""Error of counts of 2 or more."""
PEARSON = "val/pearson"
MEAN_PEARSON = "val/baseline_pearson"
PER_GENE = "val/pearson_per_gene"
"""Correlation across the cells of a dataset, mean over genes."""
WITHIN_CELL = "val/pearson_within_cell"
"""Correlation across the genes of a cell, mean over cells."""
N_HIDDEN = "val/n_hidden"
"""Hidden values scored. Rows without it are of versions that scored shown targets among them."""
N_CELLS = "val/n_cells"
"""Held-out cells scored: the first `run.validation_cells` of the validation split."""
DATASET_MSE = "val/mse/dataset/"
"""Followed by a dataset's name: error over its cells."""
HEADLINE = (
    STRONGEST_MSE, MSE, RELATIVE_MSE, MEAN_MSE, PEARSON, MEAN_PEARSON, PER_GENE, WITHIN_CELL,
    SEVERAL_MSE,
)  # fmt: skip
"""Figures that sum a validation up, in the order of their lines."""


def of_baseline(baseline: str, metric: str) -> str:
    """Return the name of a baseline's figure: `val/linear/mse` of `linear` and `val/mse`."""
    return f"val/{baseline}/{metric.removeprefix('val/')}"
