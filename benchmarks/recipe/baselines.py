"""What a recipe must beat: the depth baselines of the product, and the nearest training cells.

Shapes: n cells, G genes, P target places.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.recipe.panel import Cells, Panel
from sclong_ds.config.sections import ObjectiveConfig
from sclong_ds.objective.baselines import DepthBaselines
from sclong_ds.objective.targets import Targets
from sclong_ds.run_folder.metric_names import DEPTH_BASELINES

FITTED_CELLS = 1500
NEIGHBOURS = 30
DIMENSIONS = 50


def hidden_mask(shape: torch.Size, targets: Targets) -> Tensor:
    """Return (n, G) bool, the values that the model must not see."""
    hidden = torch.zeros(shape, dtype=torch.uint8)
    hidden.scatter_add_(
        1, torch.from_numpy(targets.positions), torch.from_numpy(targets.hidden).to(torch.uint8)
    )
    return hidden.bool()


def baseline_predictions(
    panel: Panel, targets: Targets, objective: ObjectiveConfig
) -> dict[str, NDArray[np.float64]]:
    """Return what each baseline predicts (n, P) at the targets of the held-out cells."""
    depth = DepthBaselines(panel.stats, torch.device("cpu"))
    sample = np.random.default_rng(0).permutation(len(panel.train.rows))[:FITTED_CELLS]
    for some in np.array_split(sample, max(1, len(sample) // 100)):
        drawn = panel.train.targets(some, objective, seed=0, epoch=0)
        x = panel.train.values(some)
        wanted = torch.from_numpy(drawn.hidden & drawn.valid)
        depth.add(x, hidden_mask(x.shape, drawn), torch.from_numpy(drawn.positions), wanted)
    depth.fit()
    x = panel.held_out.values(np.arange(len(panel.held_out.rows)))
    hidden, positions = hidden_mask(x.shape, targets), torch.from_numpy(targets.positions)
    found = dict(zip(DEPTH_BASELINES, depth.predict(x, hidden, positions).numpy(), strict=True))
    residual = nearest_residual(panel.train, x.masked_fill(hidden, 0.0), depth)
    linear = found["linear"]
    found["30 nearest cells"] = linear + np.take_along_axis(residual, targets.positions, 1)
    return found


def nearest_residual(train: Cells, visible: Tensor, depth: DepthBaselines) -> NDArray[np.float64]:
    """Return (n, G): the mean over the nearest training cells of value minus `linear`.

    Nearest by Euclidean distance on the first principal axes of the training values; the mean is
    over those that express the gene, drawn to 0 by three more that know nothing.

    Args:
        train: Training cells.
        visible: (n, G) values of the cells to predict, 0 where hidden.
        depth: Fitted baselines.
    """
    values = train.values(np.arange(len(train.rows)))
    everywhere = torch.arange(values.shape[1]).expand(100, -1)
    residual = torch.zeros_like(values)
    for start in range(0, len(values), 100):
        x = values[start : start + 100]
        linear = depth.predict(x, torch.zeros_like(x, dtype=torch.bool), everywhere[: len(x)])[-1]
        residual[start : start + 100] = torch.where(x > 0, x - linear.float(), 0.0)
    torch.manual_seed(0)
    axes = torch.svd_lowrank(values, q=DIMENSIONS, niter=4)[2]
    nearest = torch.cdist(visible @ axes, values @ axes).topk(NEIGHBOURS, largest=False).indices
    total = torch.stack([residual[own].sum(0) for own in nearest])
    number = torch.stack([(values[own] > 0).sum(0) for own in nearest])
    return (total / (number + 3)).double().numpy()
