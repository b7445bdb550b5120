"""What `benchmarks/gpu_check.py` found against its targets: plain figures, no torch.

Results are its document's `stages`: rows by stage, each a `case` and its figures. The targets are
for one H100; an H200 must reach them too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

Row = dict[str, Any]
CHIPS = ("H100", "H200")
SLACK = 1.25
"""A target missed by more fails the check."""
TARGET_US = {("large", "forward"): 60, ("large", "backward"): 110}
TARGET_US |= {("decoder", "forward"): 100, ("decoder", "backward"): 190}
"""Of the operator at batch 1 and the published 266 features."""
LEAST_RATIO = {
    ("literal code", "forward"): 20,
    ("literal code", "backward"): 20,
    ("literal code, torch.compile", "forward"): 4,
    ("literal code, torch.compile", "backward"): 4,
    ("softmax, flash", "forward"): 5,
    ("softmax, flash", "backward"): 7,
}
"""Time of another way over that of the kernels, at the large layer and batch 1."""
LEAST_CELLS_PER_S, LEAST_MFU, MOST_GB_PER_CELL, LEAST_OVER_RELEASED = 16.0, 0.45, 10.0, 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A figure and what it should be."""

    figure: str
    got: float | None
    """None: it was to be measured and was not."""
    target: float
    at_least: bool

    @property
    def miss(self) -> float:
        """How many times worse than the target; at most 1 where it is reached."""
        if self.got is None:
            return math.inf
        return self.target / self.got if self.at_least else self.got / self.target

    def row(self) -> Row:
        """Return what the document holds of it."""
        return asdict(self) | {"reached": self.miss <= 1}

    def __str__(self) -> str:
        """Return one readable line."""
        bound = "at least" if self.at_least else "at most"
        if self.got is None:
            return f"{self.figure:62} {'-':>9}  {bound} {self.target:g}: NOT MEASURED"
        mark = "reached" if self.miss <= 1 else "MISSED"
        return f"{self.figure:62} {self.got:9.4g}  {bound} {self.target:g}: {mark}"


def rows_of(results: dict[str, Any], stage: str) -> list[Row]:
    """Return a stage's rows, none if it did not run."""
    return results[stage]["rows"] if stage in results else []


def on_target_chip(results: dict[str, Any]) -> bool:
    """Return whether the targets are meant for the GPU of these results."""
    names = [row.get("gpu", "") for row in rows_of(results, "device")]
    return any(chip in name for chip in CHIPS for name in names)


def add_floors(results: dict[str, Any]) -> None:
    """Give every timed row with FLOPs and bytes its floor: what the GPU's own ceilings allow."""
    device = rows_of(results, "device")
    bandwidth = next((row["tb_per_s"] for row in device if "tb_per_s" in row), None)
    peak = next((row["tflops"] for row in device if "tflops" in row), None)
    if bandwidth is None or peak is None:
        return
    for row in rows_of(results, "timing"):
        if "gflop" in row and "us" in row:
            row["floor_us"] = max(row["gflop"] / peak * 1e3, row["mb"] / bandwidth)
            row["of_floor"] = row["floor_us"] / row["us"]


def targets(results: dict[str, Any]) -> list[Target]:
    """Return the targets of the stages that ran, on a target's chip also those without a figure."""
    found = [*_attention(rows_of(results, "timing"))] if "timing" in results else []
    found += _model(results) if "model" in results else []
    return [target for target in found if target.got is not None or on_target_chip(results)]


def _attention(rows: list[Row]) -> Iterator[Target]:
    times = {
        (r.get("layer"), r.get("b"), r.get("m"), r.get("way"), r.get("part")): r["us"]
        for r in rows
        if "us" in r
    }
    for (layer, part), target in TARGET_US.items():
        got = times.get((layer, 1, 266, "kernels", part))
        figure = f"{layer} layer, {part}, 266 features, us"
        yield Target(figure=figure, got=got, target=target, at_least=False)
    for (way, part), least in LEAST_RATIO.items():
        # Exact attention has no features; the others have as many as the kernels beside them.
        ours = times.get(("large", 1, 266, "kernels", part))
        other = times.get(("large", 1, 266, way, part))
        figure = f"large layer, {part}: time of {way} over the kernels'"
        ratio = other / ours if ours and other else None
        yield Target(figure=figure, got=ratio, target=least, at_least=True)


def _model(results: dict[str, Any]) -> Iterator[Target]:
    # Another routing or another loss is other work: the targets are for the published one.
    published = [row for row in rows_of(results, "model") if row.get("published")]
    best = max(published, key=lambda row: row["cells_per_s"], default=None)
    named = f"training step, {best['case']}" if best else "training step"
    speed = {"cells_per_s": LEAST_CELLS_PER_S, "mfu": LEAST_MFU}
    for key, least in speed.items():
        got = best[key] if best else None
        yield Target(figure=f"{named}: {key}", got=got, target=least, at_least=True)
    kept = max((row["gb_per_cell"] for row in published if "gb_per_cell" in row), default=None)
    figure = "activations of a cell without recomputing, GB"
    yield Target(figure=figure, got=kept, target=MOST_GB_PER_CELL, at_least=False)
    released = [r["cells_per_s"] for r in rows_of(results, "reference") if "cells_per_s" in r]
    if released:
        yield Target(
            figure="training step: cells per second over the released code's",
            got=best["cells_per_s"] / max(released) if best else None,
            target=LEAST_OVER_RELEASED,
            at_least=True,
        )


def verdict(results: dict[str, Any]) -> list[str]:
    """Return what is wrong: stages that failed or had no time, wrong results, missed targets.

    A target may be missed by 25 %. The reference and the sweep are not judged.
    """
    wrong = [
        f"stage {name}: {stage['status']}: {stage['message'].strip().splitlines()[-1:]}"
        for name, stage in results.items()
        if stage["status"] != "done" and name not in ("reference", "sweep")
    ]
    rows = [row for stage in results.values() for row in stage["rows"]]
    wrong += [f"wrong result: {row['case']}" for row in rows if row.get("correct") is False]
    if on_target_chip(results):
        wrong += [str(target) for target in targets(results) if target.miss > SLACK]
    return wrong
