"""What all fits of a fine-tuning share: cells, model, ranks, engine settings, and the loss.

Shapes: N cells, G genes, F features, K outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sclong_ds.engine.ranks import Ranks
from sclong_ds.exported.head import Head, HeadShape
from sclong_ds.exported.model_dir import load_model
from sclong_ds.finetune.examples import Examples
from sclong_ds.finetune.sections import Sections
from sclong_ds.finetune.trainee import Trainee, add_low_rank
from sclong_ds.job.signals import StopRequest
from sclong_ds.job.watchdog import Watchdog
from sclong_ds.model.counts_input import model_input

_REFERENCE_CELLS = 2000
_ABSENT = -1e4
"""Added to the score of a class that no training cell has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line chooses."""

    mode: str
    balanced: bool
    patience: int
    max_epochs: int
    stacks: tuple[str, ...]
    rank: int
    lora_scale: float
    unknown_rate: float
    penalty: float
    """Factor on the squared weights of the head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all fits share."""

    config: Sections
    ds_config: dict[str, Any]
    options: Options
    ranks: Ranks
    examples: Examples
    model_dir: Path
    target_sum: float
    masks: bool
    """Whether the model reads genes that are not measured as unknown."""
    shape: HeadShape
    features: NDArray[np.float32]
    """(N, F) features of all cells by the model before fine-tuning."""
    out: Path
    identity: str
    """Digest of all that makes a fit what it is."""
    genes_hash: str
    stop: StopRequest
    watchdog: Watchdog
    log: Callable[[int, Mapping[str, float]], None]
    on_step: Callable[[str, int, int], None]
    batch: int
    """Cells of a forward pass without gradients."""

    @property
    def patience(self) -> int:
        """Looks without a better loss that end a fit."""
        return self.options.patience

    @property
    def on_features(self) -> bool:
        """Whether the model stays as it is, so that features are computed once."""
        return self.options.mode in ("frozen", "head")

    def make_trainee(self, seed: int, train: NDArray[np.int64]) -> Trainee:
        """Return a trainee that has learnt nothing.

        Args:
            seed: Of its head and of what LoRA adds.
            train: Cells whose features centre and scale those of the head.
        """
        torch.manual_seed(seed)
        head = Head(self.shape)
        head.fit_scale(torch.from_numpy(self.features[train]))
        model = None
        if not self.on_features:
            model = load_model(self.model_dir)
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()  # they are mapped from the file
            if self.options.mode == "lora":
                add_low_rank(
                    model, self.options.stacks, rank=self.options.rank,
                    scale=self.options.lora_scale,
                )  # fmt: skip
            for performer in model.performers().values():
                performer.recompute = self.config.engine.activation_checkpointing
        return Trainee(head, model).to(self.ranks.device).train()

    def inputs(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """Return what a trainee reads of cells, on the rank's device."""
        device = self.ranks.device
        if self.on_features:
            return torch.from_numpy(self.features[rows]).to(device), None
        measured = self.examples.measured if self.masks else None
        unmeasured = None if measured is None else measured.of(rows).unmeasured()
        return model_input(
            self.examples.counts[rows], target_sum=self.target_sum, unmeasured=unmeasured,
            device=device,
        )  # fmt: skip

    def loss(self, outputs: Tensor, rows: NDArray[np.int64], train: NDArray[np.int64]) -> Tensor:
        """Return the mean loss of cells: weighted cross-entropy, or squared error of numbers.

        Args:
            outputs: (n, K).
            rows: (n,) the cells.
            train: All training cells; they decide weights, and which classes are known.
        """
        outputs, target = outputs.float(), self.examples.target
        if not self.examples.classes:
            offset, spread = self.scale(train)
            wanted = torch.from_numpy((target[rows] - offset) / spread).to(outputs)
            return nn.functional.mse_loss(outputs[:, 0], wanted)
        codes = torch.from_numpy(target[rows].astype(np.int64)).to(outputs.device)
        weights = torch.from_numpy(self.weights(train)).to(outputs)
        scores = outputs + torch.where(weights > 0, 0.0, _ABSENT)
        losses = nn.functional.cross_entropy(scores, codes, reduction="none")
        return (losses * weights[codes]).mean()

    def held_loss(
        self, outputs: NDArray[np.float32], rows: NDArray[np.int64], train: NDArray[np.int64]
    ) -> float:
        """Return the loss of held-out cells whose label is known to the training cells."""
        known = self.known(rows, train)
        given = torch.from_numpy(outputs[known])
        return float(self.loss(given, rows[known], train))

    def known(self, rows: NDArray[np.int64], train: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return (n,) which cells have a label that a training cell has; all have a number."""
        target = self.examples.target
        if not self.examples.classes:
            return np.ones(len(rows), dtype=bool)
        return np.isin(target[rows], np.unique(target[train]))

    def weights(self, train: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the weight (K,) of each class: mean 1 over training cells, 0 for none."""
        codes = self.examples.target[train].astype(np.int64)
        sizes = np.bincount(codes, minlength=self.examples.width)
        there = sizes > 0
        if not self.options.balanced:
            return there.astype(np.float64)
        return np.where(there, len(train) / (there.sum() * np.maximum(sizes, 1)), 0.0)

    def scale(self, train: NDArray[np.int64]) -> tuple[float, float]:
        """Return mean and standard deviation of the training cells' numbers; (0, 1) for labels."""
        if self.examples.classes:
            return 0.0, 1.0
        values = self.examples.target[train]
        return float(values.mean()), float(values.std()) or 1.0

    def reference_cells(self, train: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the training cells that distances are measured from, 2,000 at most."""
        if len(train) <= _REFERENCE_CELLS:
            return train
        some = np.random.default_rng(0).choice(train, _REFERENCE_CELLS, replace=False)
        return np.sort(some)
