"""A simulated atlas of real-size cells through every command, from h5ad to training steps.

    python -m benchmarks.atlas --out FOLDER [--cells N] [--datasets N] [--tasks N ...] [--json OUT]

FOLDER/raw: the datasets of `benchmarks.atlas_cells` (1,000,000 cells in 36 of them take 17 GB).
Their last ones, at least a tenth of the cells, come later. Converts the others, finalizes a copy of
what is staged with 1, 4 and 16 tasks at a time and compares all products by their SHA-256, adds the
later ones to the first, and trains 3 steps of `sclong_tiny` on 1, 2 and 4 ranks on what came of it.
Of each stage: seconds, CPU seconds of all its processes, memory at its peak (of all processes,
shared pages divided among those that have them, and of the largest one), most bytes of the corpus
on disk without the staging, looked at every half second; of each finalize the CPU seconds of its
stages. What is done is kept in FOLDER/done.json: the command continues after a kill.
The metadata of a larger atlas: `python -m benchmarks.atlas_tables`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks.atlas_cells import N_CELLS, N_DATASETS, write_datasets
from benchmarks.data_prep import ROOT, adopt_orphans
from benchmarks.environment import environment, write_result
from benchmarks.finalize_tasks import Units
from benchmarks.growth import disk_bytes, products
from data_prep.corpus.finalize import finalize
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.files.atomic import write_atomic
from sclong_ds.run_folder.rows import read_metrics
from tests.small_runs import environments

TASKS, RANKS, STEPS, BATCH = (1, 4, 16), (1, 2, 4), 3, 8
NEW_SHARE = 0.1
LOOK_S = 0.5
EQUAL = ("data/cells_crc32", "train/n_targets")
"""What a step must have in common on any number of ranks; losses differ in the order of sums."""


class Watch(threading.Thread):
    """Looks at the memory of this process' children and at the disk of a folder."""

    def __init__(self, folder: Path) -> None:
        """Begin to look.

        Args:
            folder: A corpus folder, which need not be there.
        """
        super().__init__(daemon=True)
        self._folder, self._over = folder, threading.Event()
        self.found = {"memory_mib": 0.0, "largest_mib": 0.0, "disk_bytes": 0}
        self.start()

    def run(self) -> None:
        """Look until `stop`."""
        while not self._over.wait(LOOK_S):
            self._look()

    def _look(self) -> None:
        shared, largest = 0.0, 0.0
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                memory = child.memory_full_info()
                shared, largest = shared + memory.pss, max(largest, memory.rss)
        now = {"memory_mib": shared / 2**20, "largest_mib": largest / 2**20}
        now["disk_bytes"] = disk_bytes(self._folder)
        self.found = {name: max(self.found[name], value) for name, value in now.items()}

    def stop(self) -> dict[str, float]:
        """Return the peaks."""
        self._over.set()
        self.join()
        return self.found


def measured(
    commands: Sequence[Sequence[str]],
    folder: Path,
    *,
    log: Path,
    environs: Sequence[dict[str, str]] = (),
) -> dict[str, Any]:
    """Run commands at the same time; return what they cost.

    Args:
        commands: Arguments for this Python.
        folder: Corpus folder whose disk is looked at.
        log: Target of their output.
        environs: Environment of each.

    Raises:
        RuntimeError: One of them failed.
    """
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    watch, load = Watch(folder), os.getloadavg()[0]
    environs = environs or [os.environ | {"OMP_NUM_THREADS": "1"}] * len(commands)
    with log.open("wb") as output:
        processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", *command], cwd=ROOT, env=env, stdout=output,
                stderr=subprocess.STDOUT,
            )
            for command, env in zip(commands, environs, strict=True)
        ]  # fmt: skip
        statuses = [process.wait() for process in processes]
        with suppress(ChildProcessError):
            # Those that a command left come to this process (adopt_orphans).
            while True:
                os.wait()
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    peaks = watch.stop()
    if any(statuses):
        raise RuntimeError(f"{commands[0]}: see {log}\n{log.read_text()[-2000:]}")
    cpu = [after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime]
    return {"wall_s": wall, "cpu_s": sum(cpu), "system_s": cpu[1], "load_before": load, **peaks}


def as_task(corpus: Path, task: int, tasks: int, out: Path) -> None:
    """Finalize as one of some tasks; write the CPU seconds of its units, by stage.

    Args:
        corpus: The corpus folder.
        task: Which of the tasks.
        tasks: Their number.
        out: Target, JSON.
    """
    units = Units()
    crew = logging.getLogger("data_prep.passes.crew")
    crew.setLevel(logging.DEBUG)
    crew.addHandler(units)
    finalize(corpus, near_duplicates="drop", task=task, tasks=tasks)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu = usage.ru_utime + usage.ru_stime
    # Not ru_maxrss, which a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    about = {"cpu_s": cpu, "peak_mib": peak / 1024, "units": units.cpu_s}
    write_atomic(out, json.dumps(about).encode())


class Atlas:
    """The stages, each done once."""

    def __init__(self, out: Path, n_cells: int, n_datasets: int) -> None:
        """Take up what is done.

        Args:
            out: Folder of everything.
            n_cells: Cells to make.
            n_datasets: Datasets of them.
        """
        out.mkdir(parents=True, exist_ok=True)
        self._out, self._done = out, out / "done.json"
        self.found: dict[str, Any] = {}
        if self._done.exists():
            self.found = json.loads(self._done.read_bytes())
        if not (out / "raw/made.json").exists():
            shutil.rmtree(out / "raw", ignore_errors=True)
            write_datasets(out / "raw", n_cells, n_datasets)
        self.made = json.loads((out / "raw/made.json").read_bytes())
        if (self.made["n_cells"], len(self.made["sizes"])) != (n_cells, n_datasets):
            raise ValueError(f"{out}: made of other cells; choose another folder")

    def stage(self, name: str, do: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what a stage found, now or when it was done.

        Args:
            name: Its name.
            do: Does it, whatever a killed one has left.
        """
        if name not in self.found:
            self.found[name] = do()
            write_atomic(self._done, json.dumps(self.found, indent=1).encode())
            short = {k: v for k, v in self.found[name].items() if not isinstance(v, dict | list)}
            print(name, json.dumps(short), flush=True)
        return self.found[name]

    def folder(self, tasks: int) -> Path:
        """Return the corpus folder that so many tasks finalize."""
        return self._out / f"tasks_{tasks}"

    def first_manifest(self) -> Path:
        """Write the manifest without the datasets that come later; return it."""
        lines = (self._out / "raw/manifest.tsv").read_text().splitlines()
        sizes, n_new, new = self.made["sizes"], 0, 0
        while new < NEW_SHARE * self.made["n_cells"]:
            n_new += 1
            new = sum(sizes[-n_new:])
        path = self._out / "raw/first.tsv"
        write_atomic(path, ("\n".join(lines[:-n_new]) + "\n").encode())
        return path

    def convert(self, manifest: Path, corpus: Path) -> dict[str, Any]:
        """Convert a manifest's datasets, as many at a time as there are cores."""
        jobs = str(len(os.sched_getaffinity(0)))
        command = ["-m", "data_prep", "convert", str(manifest), "--out", str(corpus)]
        command += ["--jobs", jobs]
        found = measured([command], corpus, log=self._out / "convert.log")
        found["staging_bytes"] = sum(
            path.stat().st_size for path in (corpus / "staging").rglob("*") if path.is_file()
        )
        return found

    def finalize(self, corpus: Path, tasks: int) -> dict[str, Any]:
        """Finalize with some tasks at a time; return costs, also by task and by stage."""
        outs = [self._out / f"task_{task}.json" for task in range(tasks)]
        for out in outs:
            out.unlink(missing_ok=True)
        command = ["-m", "benchmarks.atlas", "--out", str(corpus), "--as-task"]
        commands = [[*command, str(task), str(tasks), str(out)] for task, out in enumerate(outs)]
        found = measured(commands, corpus, log=self._out / "finalize.log")
        each = [json.loads(out.read_bytes()) for out in outs]
        names = sorted({name for task in each for name in task["units"]})
        by_stage = {name: [c for task in each for c in task["units"].get(name, ())]
                    for name in names}  # fmt: skip
        about = Corpus(corpus)
        return found | {
            "busiest_cpu_s": max(task["cpu_s"] for task in each),
            "largest_task_mib": max(task["peak_mib"] for task in each),
            "stages": {n: [len(c), sum(c), max(c)] for n, c in by_stage.items()},
            "n_cells": len(about.cells), "bytes": disk_bytes(corpus), "hash": about.hash,
            "dropped": sum(d.duplicates_dropped for d in about.datasets),
        }  # fmt: skip

    def fresh(self, tasks: int) -> Path:
        """Return a copy of what is converted; staged files are the same by another name."""
        target = self.folder(tasks)
        shutil.rmtree(target, ignore_errors=True)

        def copied(source: str, place: str) -> None:
            staged = "staging" in Path(source).parts
            os.link(source, place) if staged else shutil.copyfile(source, place)

        shutil.copytree(self._out / "converted", target, copy_function=copied)
        return target

    def with_tasks(self, tasks: int) -> dict[str, Any]:
        """Finalize a fresh copy with some tasks; only that of the first stays."""
        corpus = self.fresh(tasks)
        found = self.finalize(corpus, tasks) | {"products": products(corpus)}
        if tasks != TASKS[0]:
            shutil.rmtree(corpus)
        return found

    def grow(self) -> dict[str, Any]:
        """Convert and add what comes later; return costs and what has become of old files."""
        corpus = self.fresh(TASKS[0])
        self.finalize(corpus, TASKS[0])
        before = products(corpus)
        converted = self.convert(self._out / "raw/manifest.tsv", corpus)
        found = self.finalize(corpus, 1)
        after = products(corpus)
        changed = sorted(name for name, digest in before.items() if after.get(name) != digest)
        cells = [name for name in changed if name.startswith(("cells.zarr", "obs", "columns"))]
        sizes = [(corpus / name).stat().st_size for name in cells if (corpus / name).exists()]
        return found | {
            "convert": converted, "changed": changed, "cells_rewritten_bytes": sum(sizes),
            "parts": len(Corpus(corpus).parts or ()),
        }  # fmt: skip

    def train(self, ranks: int) -> dict[str, Any]:
        """Train a few steps on some ranks; return costs and what the steps had."""
        run = self._out / f"run_{ranks}"
        shutil.rmtree(run, ignore_errors=True)
        options = {
            "run.dir": run, "data.corpus": self.folder(TASKS[0]), "run.max_steps": STEPS,
            "model.gene_encoder": "embedding", "engine.train_batch_size": BATCH,
            "engine.train_micro_batch_size_per_gpu": 1, "run.validate_every_n_steps": 0,
            "tracking.enabled": "false", "tracking.picture_cells": "null",
        }  # fmt: skip
        command = ["-m", "sclong_ds.pretrain", "--config", "sclong_tiny"]
        command += [f"{key}={value}" for key, value in options.items()]
        log = self._out / f"train_{ranks}.log"
        found = measured([command] * ranks, run, log=log, environs=environments(ranks))
        rows = [row for row in read_metrics(run) if "train/loss" in row]
        return found | {
            "losses": [row["train/loss"] for row in rows],
            "equal": [[row[name] for name in EQUAL] for row in rows],
        }

    def run(self, tasks: Sequence[int]) -> dict[str, Any]:
        """Do all stages; return the figures, without the hashes of the products."""
        self.stage("make", lambda: self.made)
        self.stage("convert", lambda: self.convert(self.first_manifest(), self._out / "converted"))
        for n in tasks:
            self.stage(f"finalize, {n} tasks", partial(self.with_tasks, n))
        hashes = [self.found[f"finalize, {n} tasks"]["products"] for n in tasks]
        self.stage("grow", self.grow)
        for n in RANKS:
            self.stage(f"train, {n} ranks", partial(self.train, n))
        steps = [self.found[f"train, {n} ranks"]["equal"] for n in RANKS]
        return {
            "same_bytes": all(found == hashes[0] for found in hashes),
            "files_compared": len(hashes[0]),
            "same_cells_on_all_ranks": all(found == steps[0] for found in steps),
            **{name: {k: v for k, v in found.items() if k != "products"}
               for name, found in self.found.items()},
        }  # fmt: skip


def main() -> int:
    """Run the stages and print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder, kept")
    parser.add_argument("--cells", type=int, default=N_CELLS, help="default %(default)s")
    parser.add_argument("--datasets", type=int, default=N_DATASETS, help="default %(default)s")
    parser.add_argument("--tasks", type=int, nargs="+", default=list(TASKS), metavar="N")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures as JSON")
    parser.add_argument("--as-task", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_task:
        task, tasks, out = args.as_task
        as_task(args.out, int(task), int(tasks), Path(out))
        return 0
    adopt_orphans()
    found = Atlas(args.out.resolve(), args.cells, args.datasets).run(args.tasks)
    print(json.dumps(found, indent=1))
    print(environment())
    if args.json:
        write_result(args.json, "atlas", found)
    return not (found["same_bytes"] and found["same_cells_on_all_ranks"])


if __name__ == "__main__":
    sys.exit(main())
