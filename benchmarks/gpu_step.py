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
import socket
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
CELLS, EXPRESSED = 512, 0.07
"""Training cells, and the share of genes that one expresses."""


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
        corpus = random_corpus(folder / "corpus", n_genes=200 if args.tiny else None)
        for number, case in enumerate(cases(tiny=args.tiny)):
            left = args.deadline - time.monotonic()
            if left < LEAST_S[case.compiled] and not args.tiny:
                yield {"case": str(case), "skipped": "no time"}
                continue
            yield {"case": str(case)} | _measured(case, corpus, folder / str(number), left, args)


def _measured(case: Case, corpus: Path, run_dir: Path, left: float, args: Any) -> Row:
    """Start a run, wait for its steps, end it and return their medians."""
    from sclong_ds.run_folder.rows import read_metrics

    small = ["model.top_seq_len=64", "model.zero_genes=null"] if args.tiny else []
    command = [
        sys.executable, "-m", "sclong_ds.pretrain", "--config", case.preset, *case.overrides(),
        *small, f"run.dir={run_dir}", f"data.corpus={corpus}", "model.gene_encoder=embedding",
        f"run.max_steps={STEPS + 1000}", "run.validate_every_n_steps=0", "tracking.enabled=false",
        "tracking.picture_cells=null", "checkpoint.every_n_steps=100000",
    ]  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    env = os.environ | {name: str(value) for name, value in (ranks | {"MASTER_PORT": port}).items()}
    env |= {"DS_ACCELERATOR": args.device}
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


def random_corpus(folder: Path, *, n_genes: int | None) -> Path:
    """Write a corpus of random cells with the genes of the vocabulary, or the first of them.

    Args:
        folder: Folder to make.
        n_genes: Number of genes; None: all.
    """
    from scipy import sparse

    from sclong_ds.corpus.catalogue import DatasetInfo, write_catalogue
    from sclong_ds.corpus.cell_writer import CellWriter

    rng, folder_of_cells = np.random.default_rng(0), folder / "cells.zarr"
    folder.mkdir(parents=True)
    bundled = GeneVocabulary.bundled()
    columns = (bundled.ids, bundled.symbols, bundled.classes)
    genes = GeneVocabulary(*(column[:n_genes] for column in columns))
    genes.write(folder / "genes.tsv")
    n, train = len(genes), CELLS
    cells = sparse.random(train + 32, n, density=EXPRESSED, format="csr", random_state=rng)
    cells.data = rng.geometric(0.5, cells.nnz).astype(np.uint32)
    with CellWriter(folder_of_cells, n_genes=n, chunk_entries=2**18, chunks_per_shard=2) as writer:
        for rows in (slice(0, train), slice(train, train + 32)):
            part = cells[rows].astype(np.uint32)
            writer.append(part, source={"dataset": np.zeros(part.shape[0], np.uint32)})
            writer.end_chunk()
    total = np.asarray(cells[:train].sum(axis=0)).ravel()
    np.savez(
        folder / "gene_stats.npz", n_expressing=np.asarray((cells[:train] > 0).sum(axis=0)).ravel(),
        total_counts=total, mean_expressed=np.ones(n), mean_expressed_all=1.0,
        var_expressed_all=1.0, target_sum=1e4,
    )  # fmt: skip
    about = dict.fromkeys(DatasetInfo.__dataclass_fields__) | {"duplicates_dropped": 0}
    dataset = about | {"dataset_id": "random", "n_cells": train + 32,
                       "split_cells": {"train": train}}  # fmt: skip
    splits = {"train": [0, train], "validation": [train, train + 32], "test": [train + 32] * 2}
    catalogue = {"hash": "random", "genes_hash": genes.hash, "n_cells": train + 32}
    write_catalogue(folder, catalogue | {"splits": splits, "datasets": [dataset]})
    return folder
