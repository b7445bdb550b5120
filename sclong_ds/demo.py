"""`make demo`: real cells to a trained, exported, used model with the commands a user would type.

430 human immune cells in three formats and one broken file are converted, finalized and verified;
the gene graph is built; `sclong_tiny` is pretrained under ZeRO-3 on the GPUs, or on
two CPU processes, interrupted and resumed; the model is exported, embeds the held-out
cells, and a report is written. Everything goes below --out.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from data_prep import __name__ as DATA_PREP
from sclong_ds.command_line import new_folder
from sclong_ds.config.load import load_config
from sclong_ds.engine.ports import free_port
from sclong_ds.files.places import place_of
from sclong_ds.run_folder.files import read_events, read_run_json
from sclong_ds.run_folder.metric_names import (
    LOSS,
    MEAN_MSE,
    MSE,
    PEARSON,
    PER_GENE,
    STRONGEST_MSE,
    of_baseline,
)
from sclong_ds.run_folder.rows import read_metrics, standing, strongest

ROOT = Path(__file__).parents[1]
CELLS = place_of("data_prep") / "resources" / "demo"
HELD_OUT = "immune_c"
BATCH = load_config("sclong_tiny").engine.train_batch_size
INTERRUPT_AT = 60
"""Optimizer step after which the run is interrupted."""
MARK = ".sclong_ds_demo"
"""Marks a folder as this program's, which may be deleted by the next demo."""


class DemoError(Exception):
    """A step of the demo did not do what it must; the message states which."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sclong_ds.demo", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--out",
        type=new_folder,
        default=Path("demo_run"),
        help="folder to make (default: demo_run)",
    )
    out = parser.parse_args(argv).out.resolve()
    if out.exists() and not (out / MARK).exists():
        print(f"error: {out} exists and is not a demo's: give another --out", file=sys.stderr)
        return 1
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARK).touch()
    started = time.monotonic()
    try:
        prepare(out)
        pretrain(out)
        use(out)
        print(summary(out, minutes=(time.monotonic() - started) / 60))
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    return 0


def prepare(out: Path) -> None:
    """Convert the cells, finish and check the corpus, build the gene graph."""
    corpus = out / "corpus"
    say(
        "convert three datasets; "
        "the fourth file is broken and must be reported, not stop the others"
    )
    command(DATA_PREP, "convert", CELLS / "manifest.tsv", "--out", corpus, "--jobs", 2, expected=1)
    entries = json.loads(command(DATA_PREP, "status", corpus, "--json", capture=True))["datasets"]
    statuses = {e["dataset_id"]: e["status"] for e in entries}
    if (
        sorted(statuses.values()) != ["failed", "ok", "ok", "ok"]
        or statuses["immune_broken"] != "failed"
    ):
        raise DemoError(f"convert: expected three good datasets and a failed one, got {statuses}")
    say(f"finalize: drop duplicates, hold out {HELD_OUT}, shuffle, write the Zarr corpus")
    command(DATA_PREP, "finalize", corpus, "--validation-datasets", HELD_OUT)
    say("verify: read everything again")
    command(DATA_PREP, "verify", corpus)
    say("gene graph from the Gene Ontology")
    command(DATA_PREP, "gene-graph", "--genes", corpus / "genes.tsv", "--out", out / "graph.npz")


def pretrain(out: Path) -> None:
    """Train, interrupt the run, and start the same command again."""
    run_dir = out / "runs" / "demo"
    launch = [
        Path(sys.executable).parent / "deepspeed", *where(), "--master_port", free_port(),
        "--module", "sclong_ds.pretrain", "--config", "sclong_tiny",
        f"run.dir={run_dir}", f"data.corpus={out / 'corpus'}",
        f"model.gene_graph={out / 'graph.npz'}",
        # A step as one micro-batch of each rank: the same sums in less time than cell by cell.
        f"engine.train_micro_batch_size_per_gpu={BATCH // ranks()}",
    ]  # fmt: skip
    devices = "GPU(s)" if n_gpus() else "CPU processes"
    say(f"pretrain sclong_tiny with ZeRO-3 on {ranks()} {devices}")
    process = subprocess.Popen(
        list(map(str, launch)), cwd=ROOT, env=environment(), start_new_session=True
    )
    try:
        while process.poll() is None and last_step(run_dir) < INTERRUPT_AT:
            time.sleep(0.2)
    finally:
        # Also when the demo itself is interrupted: the ranks have a session of their own.
        if process.poll() is None:
            say(f"interrupt the run after step {last_step(run_dir)} with SIGTERM")
            # To the launcher, which passes it on; the outer `deepspeed` process would not.
            for launcher in psutil.Process(process.pid).children():
                launcher.terminate()
            process.wait()
    if last_step(run_dir) < INTERRUPT_AT or not (run_dir / "checkpoints" / "latest").exists():
        raise DemoError(
            f"pretrain stopped with status {process.returncode} before step {INTERRUPT_AT}"
        )
    say("start the same command again: it resumes")
    done = subprocess.run(list(map(str, launch)), cwd=ROOT, env=environment(), check=False)
    if done.returncode != 0:
        raise DemoError(f"the resumed run ended with status {done.returncode}")


def use(out: Path) -> None:
    """Export the model, embed the held-out cells, write the report."""
    say("export to safetensors")
    command("sclong_ds", "export", out / "runs" / "demo", "--out", out / "model")
    say("embed the held-out cells")
    held_out = next(CELLS.glob(f"{HELD_OUT}.*"))
    command("sclong_ds", "embed", out / "model", held_out, "--out", out / "embedded.h5ad")
    say("report")
    command("sclong_ds", "report", out / "runs" / "demo", "--out", out / "report.html")


def summary(out: Path, *, minutes: float) -> str:
    """Return where everything is and the table of what ran."""
    run_dir = out / "runs" / "demo"
    rows = read_metrics(run_dir)
    train, scores = [r for r in rows if LOSS in r], [r for r in rows if MSE in r]
    about = read_run_json(run_dir)["summary"]
    status = command(DATA_PREP, "status", out / "corpus", "--json", capture=True)
    entries = json.loads(status)["datasets"]
    good = [e for e in entries if e["status"] == "ok"]
    rate = sorted(r["perf/cells_per_s"] for r in train)[len(train) // 2]
    resumed = [e["step"] for e in read_events(run_dir) if e["event"] == "resume"]
    first, last = scores[0], scores[-1]
    best = strongest(last)
    if best is None:
        raise DemoError(f"{run_dir}: the last validation has no baseline with a finite error")
    beside = {
        n: f"(strongest baseline {last[of_baseline(best, n)]:.3f})" for n in (PEARSON, PER_GENE)
    }
    table = {
        "cells": f"{about['n_cells_train']} for training, {about['n_cells_validation']} held out",
        "datasets": f"{len(good)} converted, {len(entries) - len(good)} failed (the broken file)",
        "genes mapped": f"{max(e['n_genes_mapped'] for e in good):,} of {about['n_genes']:,}",
        "parameters": f"{sum(about['parameters'].values()):,}",
        "ranks": f"{about['world_size']} x {about['device']}, {about['ds_config']}",
        "steps": f"{train[-1]['step']:.0f}, interrupted and resumed after step "
        f"{', '.join(map(str, resumed))}",
        "training loss": f"{train[0][LOSS]:.3f} first, {train[-1][LOSS]:.3f} last",
        "variance of the masked values": f"{last['val/target_variance']:.3f}",
        "strongest baseline, hidden values": f"MSE {last[STRONGEST_MSE]:.3f} "
        f"({best.replace('_', ' ')})",
        "model, hidden values": f"MSE {first[MSE]:.3f} before, {last[MSE]:.3f} after training: "
        f"{standing(last)}",
        "per-gene mean, hidden values": f"MSE {last[MEAN_MSE]:.3f}",
        "Pearson, hidden values": f"{last[PEARSON]:.3f} {beside[PEARSON]}",
        "Pearson per gene across cells": f"{last[PER_GENE]:.3f} {beside[PER_GENE]}",
        "cells/s": f"{rate:.2f} (median)",
        "wall time": f"{minutes:.1f} minutes",
    }
    places = {
        "run folder": run_dir,
        "model": out / "model",
        "embedded cells": out / "embedded.h5ad",
        "report": out / "report.html",
        "MLflow store": os.environ.get("MLFLOW_TRACKING_URI") or out / "runs" / "mlflow.db",
    }
    width = max(map(len, [*table, *places]))
    lines = ["", *(f"{k:<{width}}  {v}" for k, v in table.items()), ""]
    lines += [f"{k:<{width}}  {v}" for k, v in places.items()]
    lines.append(f"{'open MLflow':<{width}}  {mlflow_command(out)}")
    if last[MSE] > 0.9 * last[MEAN_MSE]:
        raise DemoError(
            "the model did not beat the per-gene-mean predictor by 10%:" + "\n".join(lines)
        )
    return "\n".join(lines)


def mlflow_command(out: Path) -> str:
    """Return the command that shows the runs in a browser."""
    return f"{sys.executable} -m sclong_ds ui {out / 'runs'} --open"


@functools.cache
def n_gpus() -> int:
    """Return the number of GPUs that can be used."""
    import torch  # late, for --help

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def ranks() -> int:
    """Return how many processes to train with.

    The GPUs found (a divisor of the batch), or 2 on a CPU.
    """
    gpus = n_gpus()
    return max(n for n in (1, 2, 4, 8) if n <= gpus) if gpus else 2


def where() -> list[str]:
    """Return the launcher's options for these processes; it would ignore CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible and n_gpus():
        return ["--include", f"localhost:{','.join(visible.split(',')[: ranks()])}"]
    return ["--num_gpus", str(ranks())]


def last_step(run_dir: Path) -> int:
    """Return the last step in metrics.jsonl; 0 before the first."""
    if not (run_dir / "metrics.jsonl").exists():
        return 0
    return int(max((r["step"] for r in read_metrics(run_dir)), default=0))


def environment() -> dict[str, str]:
    """Return the environment of the commands; without a GPU, DeepSpeed is told so."""
    found = dict(os.environ)
    return found if n_gpus() else found | {"DS_ACCELERATOR": "cpu"}


def command(*args: object, expected: int = 0, capture: bool = False) -> str:
    """Run `python -m ARGS`, check its exit status, and return what it printed when captured."""
    line = [sys.executable, "-m", *map(str, args)]
    if not capture:
        print(f"$ python -m {' '.join(map(str, args))}", flush=True)
    done = subprocess.run(
        line,
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE if capture else None,
        check=False,
    )
    if done.returncode != expected:
        raise DemoError(
            f"`python -m {' '.join(map(str, args))}` ended with status {done.returncode}, "
            f"not {expected}"
        )
    return done.stdout or ""


def say(text: str) -> None:
    """Print a heading."""
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
