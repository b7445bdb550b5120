"""How a training ends when the storage of its corpus fails: statuses by kind of fault.

    python -m benchmarks.storage_faults [--s3] [--work DIR]

Serves a corpus of random cells by `benchmarks.object_store`, over HTTP or, with --s3, as a bucket
(which needs s3fs), and trains from it once for each fault. What passes is asked again until
SCLONG_STORAGE_WAIT_S is over and ends with 71, and what would be the same again with 1; with a
fault now and then the training is done, with the losses of one on local files. The run that was
stopped by an outage between its steps is continued and must have them too. Exit status 1: not so.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from sclong_ds.job.exit_status import OWN_STATUS, PASSING_STATUS
from sclong_ds.run_folder.rows import read_metrics
from tests.small_runs import openings, settings, write_corpus

SHORT_S, LONG_S, STEPS, CHUNKS = 5, 120, 16, "cells.zarr/gap/c"
FAULTS: dict[str, tuple[dict[str, float], int, int]] = {
    "now and then": ({"busy": 0.08, "cut": 0.08}, LONG_S, 0),
    "busy for good": ({"busy": 1}, SHORT_S, PASSING_STATUS),
    "cut for good": ({"cut": 1}, SHORT_S, PASSING_STATUS),
    "hangs": ({}, SHORT_S, PASSING_STATUS),
    "away between steps": ({}, SHORT_S, PASSING_STATUS),
    "away between steps, continued": ({}, LONG_S, 0),
    "denied": ({"denied": 1}, LONG_S, OWN_STATUS),
    "a chunk absent": ({}, LONG_S, OWN_STATUS),
    "a chunk changed": ({}, LONG_S, OWN_STATUS),
    "gone": ({}, SHORT_S, PASSING_STATUS),
}
"""What the store does, the seconds for which it is asked again, and how the training must end."""
EACH = """
import json, os, sys
import torch.distributed as dist
from sclong_ds import pretrain

# DeepSpeed cannot join a second process group in one process: the trainings share the first.
dist.destroy_process_group = lambda: None
for line in sys.stdin:
    wait_s, arguments = json.loads(line)
    os.environ["SCLONG_STORAGE_WAIT_S"] = str(wait_s)
    print("ended", pretrain.main(arguments), flush=True)
"""
"""Trains one run after the other and prints their exit statuses."""


class Store:
    """The object store, in a process of its own.

    Args:
        folder: Folder of the objects.
        control: Its control file.
    """

    def __init__(self, folder: Path, control: Path) -> None:
        self.control = control
        self.tell({})
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.object_store", str(folder), str(control)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.address = f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    def tell(self, faults: dict[str, float]) -> None:
        """Say what is to go wrong from now on."""
        partial = self.control.with_suffix(".new")
        partial.write_text(json.dumps(faults))
        os.replace(partial, self.control)


def make_corpus(folder: Path) -> Path:
    """Write a corpus of more chunks than a loader asks for in advance."""
    counts = np.random.default_rng(0).poisson(0.3, (140, 200))
    dataset = np.zeros(len(counts), np.uint32)
    return write_corpus(folder, counts, dataset, n_validation=8, chunk_entries=150)


def losses(run_dir: Path) -> list[tuple[float, float]]:
    """Return loss and checksum of the cells of every step."""
    rows = [row for row in read_metrics(run_dir) if "train/loss" in row]
    return [(row["train/loss"], row["data/cells_crc32"]) for row in rows]


def main() -> int:
    """Go through the faults, print how each ends, and return the exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--s3", action="store_true", help="as a bucket, with s3fs")
    parser.add_argument("--work", type=Path, help="folder for all files (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        corpus = make_corpus(work / "bucket" / "corpus")
        return go_through(work, corpus, s3=args.s3)


class Trainings:
    """One process that trains run after run.

    Args:
        work: Folder of the runs.
        env: Variables for it.
    """

    def __init__(self, work: Path, env: dict[str, str]) -> None:
        self.work = work
        self._process = subprocess.Popen(
            [sys.executable, "-c", EACH], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | env | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def begin(self, name: str, place: object, wait_s: int) -> None:
        """Begin or continue a run."""
        over: dict[str, object] = {
            "run.max_steps": STEPS, "optim.decay_steps": STEPS, "engine.train_batch_size": 8,
            "run.validate_every_n_steps": 0, "data.prefetch_batches": 1,
            "data.cache_dir": self.work / "cache" / name,
        }  # fmt: skip
        assert self._process.stdin is not None
        arguments = settings(self.work / name, corpus=place, **over)  # type: ignore[arg-type]
        self._process.stdin.write(json.dumps([wait_s, arguments]) + "\n")
        self._process.stdin.flush()

    def status(self) -> int:
        """Wait for the end of the run and return its exit status."""
        assert self._process.stdout is not None
        # DeepSpeed prints to standard output too.
        ended = next(line for line in self._process.stdout if line.startswith("ended "))
        return int(ended.split()[1])

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def go_through(work: Path, corpus: Path, *, s3: bool) -> int:
    """Train once for each fault, compare, and return the exit status.

    Args:
        work: Folder for all files.
        corpus: The corpus, in a folder that is served.
        s3: Whether to read it as a bucket.
    """
    store = Store(corpus.parent, work / "control.json")
    keys = {"AWS_ENDPOINT_URL": store.address, "AWS_DEFAULT_REGION": "us-east-1"}
    keys |= {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    url = "s3://bucket/corpus" if s3 else f"{store.address}/bucket/corpus"
    trainings = Trainings(work, keys)
    trainings.begin("calm", corpus, 0)
    wrong = int(trainings.status() != 0)
    chunk = next(path for path in sorted((corpus / CHUNKS).rglob("*")) if path.is_file())
    sound = chunk.read_bytes()
    for fault, (told, wait_s, expected) in FAULTS.items():
        name = fault.removesuffix(", continued").replace(" ", "_")
        store.tell(told)
        disturb(fault, store, chunk)
        began = time.monotonic()
        trainings.begin(name, url, wait_s)
        if fault == "away between steps":
            rows = work / name / "metrics.jsonl"
            while not (rows.exists() and rows.stat().st_size):
                time.sleep(0.01)
            store.tell({"busy": 1})
        status, seconds = trainings.status(), time.monotonic() - began
        store.process.send_signal(signal.SIGCONT)
        chunk.write_bytes(sound)
        same = status != 0 or losses(work / name) == losses(work / "calm")
        wrong += status != expected or not same
        steps = openings(work / name) if (work / name / "events.jsonl").exists() else []
        print(f"{fault}: status {status} after {seconds:.1f} s, starts at {steps}, "
              f"losses {'as without' if same else 'DIFFER'}", flush=True)  # fmt: skip
    trainings.close()
    print(f"{len(FAULTS)} faults, {wrong} end otherwise than they must")
    return int(wrong > 0)


def disturb(fault: str, store: Store, chunk: Path) -> None:
    """Do what the store cannot do itself.

    Args:
        fault: One of FAULTS.
        store: The store.
        chunk: A file of the corpus.
    """
    if fault == "a chunk absent":
        chunk.unlink()
    elif fault == "a chunk changed":
        sound = chunk.read_bytes()
        chunk.write_bytes(bytes([sound[0] ^ 64]) + sound[1:])
    elif fault == "hangs":
        store.process.send_signal(signal.SIGSTOP)
    elif fault == "gone":
        store.process.kill()


if __name__ == "__main__":
    sys.exit(main())
