"""Stage `step` of `benchmarks/gpu_check.py`: what a run of the product makes of the GPU.

Each case is a start of `sclong_ds.pretrain` on one rank, with its loader, masks, DeepSpeed and
checks, on a corpus of random cells of the usual size; it is ended after some steps, and its figures
are those that the run wrote down. On one rank ZeRO-3 gathers nothing from others, but its hooks run
as on many.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sclong_ds.corpus.genes import GeneVocabulary

Row = dict[str, Any]
NEEDED = ("deepspeed", "numba", "scipy")
STEPS, WARM = 8, 3
"""Steps of a case, and of these the first that are not counted."""
LEAST_S = {False: 30.0, True: 90.0}
"""A case, with compiled layers or not, is not started with less time left."""
CELLS, VALIDATION, EXPRESSED = 512, 32, 0.07
"""Cells, and the share of genes that one expresses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One setting of `engine`."""

    preset: str
    stage: int
    micro_batch: int
    recomputed: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        """Return the case as readable text."""
        extras = {"recomputed": self.recomputed, "compiled layers": self.compiled}
        return " ".join(
            [f"{self.preset} zero{self.stage} micro-batch {self.micro_batch}",
             *(name for name, chosen in extras.items() if chosen)]
        )  # fmt: skip

    def overrides(self) -> list[str]:
        """Return the keys of the command line; two micro-batches make a step."""
        return [
            f"engine.ds_config=zero{self.stage}",
            f"engine.train_micro_batch_size_per_gpu={self.micro_batch}",
            f"engine.train_batch_size={2 * self.micro_batch}",
            f"engine.activation_checkpointing={str(self.recomputed).lower()}",
            f"engine.compile_layers={str(self.compiled).lower()}",
        ]


def cases(*, tiny: bool) -> list[Case]:
    """Return what is measured, in the order of worth."""
    if tiny:
        return [Case(preset="sclong_tiny", stage=3, micro_batch=2)]
    published, recommended = "sclong_1b", "sclong_1b_recommended"
    return [
        Case(preset=published, stage=3, micro_batch=4),
        Case(preset=recommended, stage=3, micro_batch=8),
        Case(preset=published, stage=1, micro_batch=4),
        Case(preset=published, stage=3, micro_batch=4, recomputed=True),
        Case(preset=recommended, stage=1, micro_batch=8),
        Case(preset=published, stage=3, micro_batch=4, compiled=True),
        Case(preset=recommended, stage=3, micro_batch=8, compiled=True),
    ]


def step(args: argparse.Namespace) -> Iterator[Row]:
    """Yield the figures of each case."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        yield {"case": "step", "skipped": f"not installed: {', '.join(missing)}"}
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = random_corpus(
            folder / "corpus", n_genes=200 if args.tiny else len(GeneVocabulary.bundled())
        )
        for number, case in enumerate(cases(tiny=args.tiny)):
            left = args.deadline - time.monotonic()
            if left < LEAST_S[case.compiled] and not args.tiny:
                yield {"case": str(case), "skipped": "no time"}
                continue
            yield {"case": str(case)} | _measured(case, corpus, folder / str(number), left, args)


def _measured(case: Case, corpus: Path, run_dir: Path, left: float, args: Any) -> Row:
    """Start a run, wait for its steps, end it and return their medians."""
    from sclong_ds.run_folder.rows import read_metrics
    from tests.small_runs import environments

    small = ["model.top_seq_len=64", "model.zero_genes=null"] if args.tiny else []
    command = [
        sys.executable, "-m", "sclong_ds.pretrain", "--config", case.preset, *case.overrides(),
        *small, f"run.dir={run_dir}", f"data.corpus={corpus}", "model.gene_encoder=embedding",
        f"run.max_steps={STEPS + 1000}", "run.validate_every_n_steps=0", "tracking.enabled=false",
        "tracking.picture_cells=null", "checkpoint.every_n_steps=100000",
    ]  # fmt: skip
    env = environments(1)[0] | {"DS_ACCELERATOR": args.device}
    log = run_dir.with_suffix(".log")
    with log.open("w") as out:
        run = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
        until = time.monotonic() + left - 5
        rows: list[dict[str, Any]] = []
        try:
            while len(rows) < STEPS and run.poll() is None and time.monotonic() < until:
                time.sleep(0.5)
                if (run_dir / "metrics.jsonl").exists():
                    rows = [row for row in read_metrics(run_dir) if "train/loss" in row]
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    if len(rows) <= WARM:
        ended = "out of time" if run.returncode == -signal.SIGKILL else f"exit {run.returncode}"
        return {"failed": [ended, *log.read_text(errors="replace").strip().splitlines()[-2:]]}
    return _figures(rows[WARM:])


def _figures(rows: list[dict[str, Any]]) -> Row:
    """Return medians of the steps; `host_over_gpu` above 0.9 says that the GPU waits for Python."""

    def median(name: str) -> float:
        return statistics.median(row.get(name, float("nan")) for row in rows)

    parts = {name: median(f"perf/{name}_s") for name in ("forward", "backward", "optimizer")}
    found: Row = {"steps": len(rows), "cells_per_s": median("perf/cells_per_s")}
    found |= {f"{name}_ms": 1e3 * seconds for name, seconds in parts.items()}
    found |= {"data_wait_ms": 1e3 * median("perf/data_wait_s"), "peak_gib": median("mem/peak_gib")}
    if "perf/host_s" in rows[0]:
        host = median("perf/host_s")
        found |= {"host_ms": 1e3 * host, "host_over_gpu": host / sum(parts.values())}
    if "perf/mfu" in rows[0]:
        found["mfu"] = median("perf/mfu")
    found["correct"] = bool(np.isfinite([row["train/loss"] for row in rows]).all())
    return found


def random_corpus(folder: Path, *, n_genes: int) -> Path:
    """Write a corpus of random cells of one dataset, as many genes expressed as usual.

    Args:
        folder: Folder to make.
        n_genes: Number of genes.
    """
    from tests.small_runs import write_corpus

    rng, shape = np.random.default_rng(0), (CELLS + VALIDATION, n_genes)
    counts = np.where(rng.random(shape) < EXPRESSED, rng.geometric(0.5, shape), 0)
    counts[:, 0] = 1  # no cell is empty
    dataset = np.zeros(len(counts), np.uint32)
    return write_corpus(folder, counts, dataset, n_validation=VALIDATION, chunk_entries=2**18)
