"""Where the time of an optimizer step goes, without making a GPU wait."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from sclong_ds.config.sections import EngineConfig, ObjectiveConfig
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.engine.ranks import Ranks
from sclong_ds.model.sclong import ScLong
from sclong_ds.objective.targets import target_count
from sclong_ds.planning.costs import training_flops_per_cell
from sclong_ds.planning.devices import device_of_name
from sclong_ds.run_folder.pending_pictures import RANK_COLUMNS


class StepTimer:
    """Adds up the seconds of named parts of one step.

    On a GPU they are measured on its stream, between events: the host runs ahead of the device. A
    part `host` is then what Python needed to start them all; as long as it is well below their sum,
    the GPU does not wait for Python.

    Args:
        device: The rank's device.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure a block of code under a name, which profilers show; equal names add up."""
        started = time.perf_counter()
        if self._on_gpu:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            with torch.profiler.record_function(name):
                yield
            last.record()
            self._events.append((name, first, last))
        else:
            with torch.profiler.record_function(name):
                yield
        self._seconds["host" if self._on_gpu else name] += time.perf_counter() - started

    def seconds(self) -> dict[str, float]:
        """Return the seconds by name; on a GPU this waits for the last block to end."""
        for name, first, last in self._events:
            last.synchronize()
            self._seconds[name] += first.elapsed_time(last) / 1e3
        self._events.clear()
        return dict(self._seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What turns the seconds of a step into rates."""

    step_cells: int
    """Cells of an optimizer step, over all ranks."""
    n_genes: int
    world_size: int
    flops_per_cell: float
    """Of forward and backward, for a cell of the corpus's mean size."""
    peak_flops: float | None
    """Peak of a rank's device, FLOP/s; None: unknown."""

    @classmethod
    def of_run(
        cls,
        corpus: Corpus,
        model: ScLong,
        *,
        engine: EngineConfig,
        objective: ObjectiveConfig,
        ranks: Ranks,
    ) -> Rates:
        """Return those of a run.

        Args:
            corpus: What it trains on.
            model: What is trained.
            engine: Section engine.
            objective: Section objective.
            ranks: The ranks.
        """
        n_expressed = round(corpus.cells.n_values / len(corpus))
        flops = training_flops_per_cell(
            model.config,
            corpus.n_genes,
            model.gene_encoder.n_edges,
            micro_batch=engine.train_micro_batch_size_per_gpu,
            n_expressed=n_expressed,
            n_wanted=target_count(n_expressed, objective),
        )
        return cls(
            step_cells=engine.train_batch_size,
            n_genes=corpus.n_genes,
            world_size=ranks.world_size,
            flops_per_cell=flops,
            peak_flops=_peak_flops(engine.precision, ranks.device),
        )

    def figures(self, step_s: float) -> dict[str, float]:
        """Return the figures of a step by metric name.

        Args:
            step_s: Seconds of the step, with the wait for its data.
        """
        rate = self.step_cells / step_s
        flops = rate * self.flops_per_cell / self.world_size
        found = {
            "perf/step_time_s": step_s,
            "perf/cells_per_s": rate,
            "perf/genes_per_s": rate * self.n_genes,
            "perf/tflops_per_s_per_rank": flops / 1e12,
        }
        return found if self.peak_flops is None else found | {"perf/mfu": flops / self.peak_flops}


def _peak_flops(precision: str, device: torch.device) -> float | None:
    """Return the peak of a device in FLOP/s, or None when it is not known."""
    if device.type == "cpu":
        return None
    known = device_of_name(torch.cuda.get_device_name(device))
    return None if known is None else known.flops_per_s(precision)


class RankTimes:
    """Means of this rank's figures since the last `gather`."""

    def __init__(self) -> None:
        self._sums = np.zeros(len(RANK_COLUMNS))
        self._steps = 0

    def add(self, figures: Mapping[str, float]) -> None:
        """Add the figures of one step."""
        self._sums += [figures.get(name, 0.0) for name in RANK_COLUMNS]
        self._steps += 1

    def gather(self, ranks: Ranks) -> NDArray[np.float64] | None:
        """Return the means of all ranks and start again; every rank must call it.

        Args:
            ranks: The ranks.

        Returns:
            (ranks, RANK_COLUMNS) per step; None before the first step.
        """
        if self._steps == 0:
            return None
        mine = torch.from_numpy(self._sums / self._steps)
        self._sums, self._steps = np.zeros(len(RANK_COLUMNS)), 0
        everyone = [torch.zeros_like(mine) for _ in range(ranks.world_size)]
        dist.all_gather(everyone, mine, group=ranks.control)
        return torch.stack(everyone).numpy()


def skew(times: NDArray[np.float64]) -> dict[str, float]:
    """Return the figures of the worst rank, by metric name.

    Args:
        times: (ranks, RANK_COLUMNS) of `RankTimes.gather`.
    """
    worst = dict(zip(RANK_COLUMNS, times.max(axis=0).tolist(), strict=True))
    # The whole step ends at the same time everywhere; its first half, data and forward, does not.
    own = (
        times[:, RANK_COLUMNS.index("perf/data_wait_s")]
        + times[:, RANK_COLUMNS.index("perf/forward_s")]
    )
    return {
        "perf/data_wait_max_s": worst["perf/data_wait_s"],
        "mem/peak_max_gib": worst["mem/peak_gib"],
        "perf/rank_skew": float(own.max() / max(np.median(own), 1e-9)),
    }
