"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from sclong_ds.config.sections import OptimConfig


def learning_rate(optim: OptimConfig, step: int) -> float:
    """Return the learning rate of an optimizer step.

    Args:
        optim: The `optim` section in steps, of `OptimConfig.in_steps`.
        step: Number of steps applied before this one.
    """
    warmup, decay = _lengths(optim)
    if optim.schedule == "warm_restarts":
        return _warm_restarts(optim, step)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "constant":
        return optim.lr
    done = min(1.0, (step - warmup) / (decay - warmup))
    floor = optim.min_lr_ratio
    return optim.lr * (floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2)


def _lengths(optim: OptimConfig) -> tuple[int, int]:
    """Return the steps of warm-up and of decay of a section in steps."""
    assert isinstance(optim.warmup_steps, int)
    assert optim.decay_steps is not None
    return optim.warmup_steps, optim.decay_steps


def _warm_restarts(optim: OptimConfig, step: int) -> float:
    """Return the rate of cosine cycles with warm-up, each longer and lower than the one before."""
    warmup, (step, length, cycle) = _lengths(optim)[0], _place_in_cycle(optim, step)
    low, peak = optim.lr * optim.min_lr_ratio, optim.lr * optim.cycle_gamma**cycle
    if step < warmup:
        share = step / warmup
    else:
        share = (1 + math.cos(math.pi * (step - warmup) / (length - warmup))) / 2
    return low + (peak - low) * share


def _place_in_cycle(optim: OptimConfig, step: int) -> tuple[int, int, int]:
    """Return the step within its cycle of warm_restarts, the cycle's length and its number."""
    (warmup, length), cycle = _lengths(optim), 0
    while step >= length:
        step -= length
        length = int((length - warmup) * optim.cycle_mult) + warmup
        cycle += 1
    return step, length, cycle


def unfinished_schedule(config: OptimConfig, *, max_steps: int) -> str | None:
    """Return what to warn of where a run ends before its schedule does, or None.

    That is in a warm-up, or at more than half of the peak rate; a constant rate is meant to be.

    Args:
        config: The `optim` section.
        max_steps: Steps of the run.
    """
    steps, optim = max_steps, config.in_steps(max_steps)
    warmup, decay = _lengths(optim)
    last, restarts = steps - 1, optim.schedule == "warm_restarts"
    place = _place_in_cycle(optim, last)[0] if restarts else last
    if place < warmup:
        return (
            f"the run ends within the warm-up of its learning rate: optim.warmup_steps="
            f"{warmup}, run.max_steps={steps}; set a shorter warm-up, or a share of "
            f"the schedule such as optim.warmup_steps=0.05"
        )
    share = learning_rate(optim, last) / optim.lr
    ends = config.decay_steps is None or (decay <= steps and not restarts)
    if ends or optim.schedule == "constant" or share <= 0.5:
        return None
    return (
        f"the learning rate of the last step is {share:.0%} of its peak: optim.decay_steps="
        f"{decay}, run.max_steps={steps}; set optim.decay_steps=null for a schedule "
        f"that ends with the run"
    )
