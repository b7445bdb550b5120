"""Names of the metrics, each defined once."""

from __future__ import annotations

SKIPPED_METRIC = "train/skipped_steps"
"""Column of metrics.jsonl that holds the skipped steps so far, as `StepGuard.skipped` counts."""


SPIKE_METRIC = "train/spike"
"""Column of metrics.jsonl: 1 where the loss of the step was a spike, else 0."""
