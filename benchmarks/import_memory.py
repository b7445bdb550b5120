"""Peak memory of importing a checkpoint as large as the published one, and time to open the model.

    python -m benchmarks.import_memory --out FOLDER [--json OUT]

Writes a checkpoint with the names, shapes and types of the published one (1,006,086,461 parameters
of no meaning) and part of an optimizer state beside it, imports it with `python -m sclong_ds
import-reference` in a process of its own, and prints that process's peak resident memory against
the size of the weights in float32. Then opens the model folder with `load_model`, which compares
the checksum of every file and looks for weights that are not finite, and reads the weights without
any check, three times each in a process that has imported the package. Needs about 10 GB in FOLDER,
which are removed.

Source of the shapes: tests/golden/full_config_state_dict.json.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import write_result
from sclong_ds.corpus.genes import GeneVocabulary

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ROOT / "tests" / "golden" / "full_config_state_dict.json"
N_MOMENTS = 40
"""Largest weights (26 MB each) for which the optimizer state is there: 1.05 GB."""
DISK_BYTES = 10 * 10**9
"""Disk that the inputs and the model folder need."""


_OPEN = """
import json, statistics, sys, time
import torch
from safetensors import safe_open
from sclong_ds import load_model
torch.set_num_threads(1)
def read():
    with safe_open(sys.argv[1] + "/model.safetensors", "pt") as file:
        for name in file.keys():
            file.get_tensor(name).sum()
found = {}
for name, do in {"opened": lambda: load_model(sys.argv[1]), "read": read}.items():
    times = []
    for _ in range(3):
        wall, cpu = time.perf_counter(), time.process_time()
        do()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    found[name + "_s"], found[name + "_cpu_s"] = map(statistics.median, zip(*times))
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Inputs:
    """Files of a checkpoint as it is published."""

    checkpoint: Path
    hyper_params: Path
    genes: Path
    n_parameters: int


@dataclass(frozen=True)
class Peak:
    """What an import took."""

    peak_bytes: int
    weight_bytes: int
    seconds: float
    opened: dict[str, float]
    """Wall and CPU seconds of opening the model, and of reading its weights unchecked."""

    @property
    def ratio(self) -> float:
        """Peak memory over the size of the weights in float32."""
        return self.peak_bytes / self.weight_bytes


def write_inputs(folder: Path) -> Inputs:
    """Write checkpoint, constructor arguments and gene list, with little memory.

    The first value of weight i is i + 1, all others are 0: zeros that nobody wrote take no memory.

    Args:
        folder: Where to.
    """
    published = json.loads(SHAPES.read_text())
    state: OrderedDict[str, torch.Tensor] = OrderedDict()
    for i, (name, (kind, shape)) in enumerate(published["state_dict"].items()):
        values = np.zeros(shape, dtype=kind)
        values.reshape(-1)[0] = i + 1
        state[name] = torch.from_numpy(values)
    largest = sorted(state.values(), key=torch.Tensor.numel)[-N_MOMENTS:]
    moments = {
        i: {"step": torch.tensor(7.0), "exp_avg": torch.from_numpy(np.zeros(t.shape, np.float32))}
        for i, t in enumerate(largest)
    }
    content = {
        "epoch": 7,
        "model_state_dict": state,
        "optimizer_state_dict": {"state": moments, "param_groups": [{"lr": 1.0e-6}]},
        "scheduler_state_dict": {"base_lrs": [1.0e-6], "last_epoch": 7},
    }
    torch.save(content, folder / "published.pth")
    genes = GeneVocabulary.bundled().ids
    (folder / "genes.txt").write_text("\n".join(genes) + "\n")
    (folder / "hyper_params.pkl").write_bytes(pickle.dumps(constructor_arguments(len(genes))))
    paths = (folder / name for name in ("published.pth", "hyper_params.pkl", "genes.txt"))
    return Inputs(*paths, n_parameters=published["n_parameters"])


def constructor_arguments(n_genes: int) -> dict[str, Any]:
    """Return constructor arguments of the published size, with a ring as gene graph."""
    arguments: dict[str, Any] = {
        "max_seq_len": n_genes + 1, "top_seq_len": 4096, "base_dim": 200, "large_dim": 1280,
        "mini_enc_depth": 2, "mini_enc_heads": 8, "mini_enc_dim_head": 64,
        "large_enc_depth": 42, "large_enc_heads": 32, "large_enc_dim_head": 64,
        "dec_depth": 2, "dec_heads": 8, "dec_dim_head": 64,
        "mask_token_thres": -1, "nb_features": None, "qkv_bias": False, "go_num_layers": 1,
        "device": torch.device("cpu"),
    }  # fmt: skip
    ring = torch.arange(n_genes)
    return arguments | {
        "G_go": torch.stack([ring, ring.roll(1)]),
        "G_go_weight": torch.full((n_genes,), 0.5),
    }


def measure(inputs: Inputs, out: Path) -> Peak:
    """Import in a process of its own.

    Args:
        inputs: Files to import.
        out: Model folder to make.

    Returns:
        Peak resident memory of the process, mapped pages of the checkpoint included, and time.

    Raises:
        RuntimeError: The import failed.
    """
    command = [sys.executable, "-m", "sclong_ds", "import-reference"]
    for option in ("checkpoint", "hyper_params", "genes"):
        command += [f"--{option.replace('_', '-')}", str(getattr(inputs, option))]
    started = time.perf_counter()
    process = subprocess.Popen([*command, "--out", str(out)], cwd=ROOT)
    # wait4 gives this process's own peak, RUSAGE_CHILDREN the largest of all children so far.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"the import ended with exit status {process.returncode}")
    seconds = time.perf_counter() - started
    done = subprocess.run(
        [sys.executable, "-c", _OPEN, out], cwd=ROOT, check=True, capture_output=True, text=True
    )
    opened = json.loads(done.stdout.splitlines()[-1])
    return Peak(usage.ru_maxrss * 1024, 4 * inputs.n_parameters, round(seconds, 1), opened)


def main() -> int:
    """Run the measurement and print it."""
    parser = argparse.ArgumentParser(description="Peak memory of importing a checkpoint.")
    parser.add_argument("--out", type=Path, required=True, help="folder for scratch files")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures as JSON")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        inputs = write_inputs(Path(folder))
        file_bytes = inputs.checkpoint.stat().st_size
        peak = measure(inputs, Path(folder) / "model")
    print("| checkpoint GB | float32 weights GB | peak memory GB | ratio | seconds |")
    print("|---|---|---|---|---|")
    figures = (file_bytes / 1e9, peak.weight_bytes / 1e9, peak.peak_bytes / 1e9, peak.ratio)
    print(f"| {' | '.join(f'{x:.2f}' for x in figures)} | {peak.seconds} |")
    print(
        "opened in {opened_s:.1f} s ({opened_cpu_s:.1f} CPU s); each weight read and summed: "
        "{read_s:.1f} s ({read_cpu_s:.1f})".format(**peak.opened)
    )
    if args.json:
        result = asdict(peak) | {"ratio": peak.ratio, "checkpoint_bytes": file_bytes}
        write_result(args.json, "import_memory", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
