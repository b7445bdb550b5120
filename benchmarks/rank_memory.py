"""Measure the memory of the ranks of small runs on a CPU, and compare it with `plan`.

    python -m benchmarks.rank_memory [--ranks 2] [--only NAME ...] [--work DIR] [--json OUT]

Trains a wide model, whose memory is that of weights, gradients and optimizer, in all ZeRO stages
and offloaded, and a deep one on many cells, whose memory is that of activations, with and without
activation checkpointing. Measured is the highest resident memory of rank 0 without that of the same
run with a tiny model (python, libraries, corpus); predicted is the peak of
`sclong_ds.planning.memory`, on a CPU with what is offloaded. Prints a table.

What is freed in blocks of a MiB and more goes back to the system (`MALLOC_MMAP_THRESHOLD_`): glibc
else raises that limit to 32 MiB in the course of a run, and keeps up to 0.6 times as much again.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.environment import write_result
from sclong_ds.config.load import load_config
from sclong_ds.planning.memory import Setup, memory_per_rank, zero_settings
from sclong_ds.run_folder.rows import read_metrics
from tests.small_runs import N_GENES, make_corpus, settings, train

MIB = 2**20
STEPS = 2


def stack(depth: int, heads: int, dim_head: int) -> str:
    """Return a Performer stack as an override."""
    sizes = f"depth: {depth}, heads: {heads}, dim_head: {dim_head}"
    return f"{{{sizes}, nb_features: null, ff_mult: 4}}"


TINY = {
    "model.base_dim": 8, "model.large_dim": 8, "model.large_encoder": stack(1, 1, 8),
    "model.mini_encoder": stack(1, 1, 8), "model.decoder": stack(1, 1, 8),
}  # fmt: skip
WIDE = {
    "model.large_dim": 640, "model.large_encoder": stack(8, 10, 64), "model.top_seq_len": 8,
    "engine.train_batch_size": 4, "engine.train_micro_batch_size_per_gpu": 1,
}  # fmt: skip
DEEP = {
    "model.base_dim": 64, "model.large_dim": 128, "model.top_seq_len": 200,
    "model.large_encoder": stack(12, 4, 32), "model.decoder": stack(2, 4, 16),
    "engine.train_batch_size": 64, "engine.train_micro_batch_size_per_gpu": 32,
}  # fmt: skip
RECOMPUTE = {"engine.activation_checkpointing": "true"}
CASES: dict[str, dict[str, object]] = {
    "wide, zero1": WIDE | {"engine.ds_config": "zero1"},
    "wide, zero2": WIDE | {"engine.ds_config": "zero2"},
    "wide, zero3": WIDE | {"engine.ds_config": "zero3"},
    "wide, zero3_offload": WIDE | {"engine.ds_config": "zero3_offload"},
    "wide, zero1, bf16": WIDE | {"engine.ds_config": "zero1", "engine.precision": "bf16"},
    "wide, zero2, bf16": WIDE | {"engine.ds_config": "zero2", "engine.precision": "bf16"},
    "wide, zero3, bf16": WIDE | {"engine.ds_config": "zero3", "engine.precision": "bf16"},
    "deep, zero2": DEEP | {"engine.ds_config": "zero2"},
    "deep, zero2, recomputed": DEEP | {"engine.ds_config": "zero2"} | RECOMPUTE,
    "deep, zero3": DEEP | {"engine.ds_config": "zero3"},
    "deep, zero3, recomputed": DEEP | {"engine.ds_config": "zero3"} | RECOMPUTE,
}
OFF = {"run.max_steps": STEPS, "run.validate_every_n_steps": 0, "checkpoint.every_n_steps": 10**6}


def measure(changes: dict[str, object], run_dir: Path, corpus: Path, *, ranks: int) -> int:
    """Return the highest resident memory of rank 0 in a short run, bytes.

    Its last checkpoint comes after the last row and is in none.

    Args:
        changes: Settings of the run.
        run_dir: Run folder.
        corpus: Corpus of `make_corpus`.
        ranks: Number of ranks.
    """
    args = settings(run_dir, corpus, **changes | OFF)
    train(["-m", "sclong_ds.pretrain", *args], n_ranks=ranks, log=run_dir.with_suffix(".log"))
    return int(max(row["mem/peak_gib"] for row in read_metrics(run_dir)) * 2**30)


def predict(changes: dict[str, object], *, ranks: int) -> dict[str, int]:
    """Return the predicted parts and the peak of one rank, bytes.

    Args:
        changes: Settings of the run.
        ranks: Number of ranks.
    """
    from sclong_ds.engine.ds_config import resolve_ds_config

    words = settings(Path("run"), Path("corpus"), **changes)[2:]
    config = load_config("sclong_tiny", words)
    memory = memory_per_rank(
        config.model,
        zero_settings(resolve_ds_config(config.engine, world_size=ranks)),
        Setup(ranks, True, N_GENES, 0),
        micro_batch=config.engine.train_micro_batch_size_per_gpu,
        element_bytes=2 if config.engine.precision == "bf16" else 4,
        recompute=config.engine.activation_checkpointing,
    )
    return dataclasses.asdict(memory) | {"peak": memory.peak() + memory.offloaded}


def main() -> int:
    """Measure all cases and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="default %(default)s")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(CASES)}")
    parser.add_argument("--work", type=Path, help="folder to make and keep (default: temporary)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures as JSON")
    args = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MIB)
    rows = {}
    titles = ("model, stage", "states", "activations", "other", "predicted, MiB", "measured, MiB",
              "measured / predicted")  # fmt: skip
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        corpus = make_corpus(work / "corpus")
        base = measure(TINY, work / "tiny", corpus, ranks=args.ranks)
        for number, name in enumerate(args.only or CASES):
            parts = predict(CASES[name], ranks=args.ranks)
            own = measure(CASES[name], work / f"run_{number}", corpus, ranks=args.ranks) - base
            states = parts["weights"] + parts["gradients"] + parts["master_weights"]
            states += parts["adam_moments"] + parts["offloaded"]
            other = parts["peak"] - states - parts["activations"]
            sizes = (states, parts["activations"], other, parts["peak"], own)
            rows[name] = parts | {"measured": own, "ratio": own / parts["peak"]}
            print(
                f"| {name} | {' | '.join(f'{size / MIB:.0f}' for size in sizes)} | "
                f"{own / parts['peak']:.2f} |",
                flush=True,
            )
        print(f"a tiny model: {base / MIB:.0f} MiB")
    if args.json:
        ratios = [row["ratio"] for row in rows.values()]
        result = {"runs": len(rows), "least": min(ratios), "most": max(ratios), "rows": rows}
        write_result(args.json, "rank_memory", result | {"tiny": base})
    return 0


if __name__ == "__main__":
    sys.exit(main())
