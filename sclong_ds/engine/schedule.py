"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from sclong_ds.config.sections import OptimConfig


def learning_rate(optim: OptimConfig, step: int) -> float:
    """Return the learning rate of an optimizer step.

    Args:
        optim: The `optim` section.
        step: Number of steps applied before this one.
    """
    if optim.schedule == "warm_restarts":
        return _warm_restarts(optim, step)
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    done = min(1.0, (step - optim.warmup_steps) / (optim.decay_steps - optim.warmup_steps))
    floor = optim.min_lr_ratio
    return optim.lr * (floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2)


def _warm_restarts(optim: OptimConfig, step: int) -> float:
    """Return the rate of cosine cycles with warm-up, each longer and lower than the one before."""
    warmup, length, cycle = optim.warmup_steps, optim.decay_steps, 0
    while step >= length:
        step -= length
        length = int((length - warmup) * optim.cycle_mult) + warmup
        cycle += 1
    low, peak = optim.lr * optim.min_lr_ratio, optim.lr * optim.cycle_gamma**cycle
    if step < warmup:
        share = step / warmup
    else:
        share = (1 + math.cos(math.pi * (step - warmup) / (length - warmup))) / 2
    return low + (peak - low) * share
