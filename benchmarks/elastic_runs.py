"""Continue runs on other numbers of ranks, and compare them with runs that kept theirs.

    python -m benchmarks.elastic_runs [--stages zero1 zero2 zero3] [--precision fp32] [--work DIR]
        [--json OUT]

Trains a small model on a corpus below DIR (the system's folder for temporary files unless told
otherwise) on one number of ranks, continues with another, saves there, and goes back to the first.
Cells are drawn by dataset, masks of every ratio, and the random features again every few steps; the
learning rate falls along a cosine and matrices alone are decayed. Prints, for every path, the
largest relative difference of a step's loss and of the gradient norm from a run that kept its 2
ranks, the largest difference of a weight after the last step, whether cells, targets and learning
rates are the same, and whether parameter groups and step counters are as they should. Exit
status 1: cells, targets or groups differ, or a loss by more than --tolerance.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment, write_result
from sclong_ds.checkpoint.load import full_weights
from sclong_ds.checkpoint.on_disk import complete_checkpoints
from sclong_ds.run_folder.files import read_events
from sclong_ds.run_folder.rows import read_metrics
from tests.small_runs import N_GENES, make_corpus, settings, train

PATHS = ((2, 1, 2), (2, 4, 2), (4, 2, 4))
STEPS_A_START = 4
DECAY = 0.5
EXACT = ("data/cells_crc32", "train/n_targets", "train/lr")
"""What a step must have in common with the same step on other ranks."""
CHANGES = {
    "data.balance_by": "dataset", "data.balance_exponent": 0.0, "data.max_repeats": 3,
    "objective.mask_prob_range": "[0.1, 0.4]", "model.feature_redraw_interval": 3,
    "checkpoint.every_n_steps": STEPS_A_START, "checkpoint.keep_last": 9,
    "run.validate_every_n_steps": 0, "optim.weight_decay": DECAY, "optim.warmup_steps": 2,
    "optim.decay_steps": 20,
}  # fmt: skip


def run_path(ranks: tuple[int, ...], run_dir: Path, corpus: Path, **changes: object) -> Path:
    """Train one start of STEPS_A_START steps on each number of ranks; returns the run folder.

    Args:
        ranks: Numbers of ranks, one after the other.
        run_dir: Run folder.
        corpus: Corpus of `make_corpus`.
        changes: Further settings.
    """
    for start, n_ranks in enumerate(ranks, start=1):
        end = {"run.max_steps": start * STEPS_A_START}
        args = settings(run_dir, corpus, **CHANGES | changes | end)
        train(["-m", "sclong_ds.pretrain", *args], n_ranks=n_ranks, log=run_dir.with_suffix(".log"))
    return run_dir


def compare(run_dir: Path, straight: Path) -> dict[str, Any]:
    """Compare a run with one that kept its ranks.

    Args:
        run_dir: The run.
        straight: The other one, of as many steps.

    Returns:
        `loss` and `grad_norm`: largest relative differences of a step; `weights`: largest absolute
        difference; `exact`: whether EXACT agrees in all steps.
    """
    ours, theirs = (
        [row for row in read_metrics(folder) if "train/loss" in row]
        for folder in (run_dir, straight)
    )

    def largest(name: str) -> float:
        pairs = zip(ours, theirs, strict=True)
        return max(abs(a[name] - b[name]) / abs(b[name]) for a, b in pairs)

    weights, others = (
        full_weights(complete_checkpoints(folder / "checkpoints")[0])
        for folder in (run_dir, straight)
    )
    return {
        "loss": largest("train/loss"),
        "grad_norm": largest("train/grad_norm"),
        "weights": max(float((weights[n] - others[n]).detach().abs().max()) for n in others),
        "exact": all(a[n] == b[n] for a, b in zip(ours, theirs, strict=True) for n in EXACT),
    }


def optimizer_is_whole(run_dir: Path) -> bool:
    """Tell whether the newest checkpoint has both parameter groups, with their own counters.

    Args:
        run_dir: Run folder.
    """
    newest = complete_checkpoints(run_dir / "checkpoints")[0]
    step = int(newest.name.removeprefix("step_"))
    found = []
    for file in sorted(newest.glob("*optim_states.pt")):
        state = torch.load(file, weights_only=False)["optimizer_state_dict"]
        own = state.get("optimizer_state_dict") or state["base_optimizer_state"]
        counters = [float(s["step"]) for s in own["state"].values()]
        decays = [(g["name"], g["weight_decay"]) for g in own["param_groups"]]
        found.append(counters == [step, step] and decays == [("decay", DECAY), ("no_decay", 0.0)])
    return all(found)


def main() -> int:
    """Run the paths and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stages", nargs="+", default=["zero1", "zero2", "zero3"], metavar="NAME")
    parser.add_argument("--precision", default="fp32", help="default %(default)s")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="default %(default)s")
    parser.add_argument("--work", type=Path, help="folder to make and keep (default: temporary)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures as JSON")
    args = parser.parse_args()
    titles = ("engine.ds_config", "ranks", "resumed after steps", "loss", "gradient norm",
              "weights", "cells, targets, rates", "groups, counters")  # fmt: skip
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    good, rows = True, {}
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        corpus = make_corpus(work / "corpus")
        for stage in args.stages:
            kinds = {"engine.ds_config": stage, "engine.precision": args.precision}
            straight = run_path((2, 2, 2), work / f"{stage}_straight", corpus, **kinds)
            for path in PATHS:
                name = "_".join(map(str, path))
                run_dir = run_path(path, work / f"{stage}_{name}", corpus, **kinds)
                found, whole = compare(run_dir, straight), optimizer_is_whole(run_dir)
                resumed = [e["step"] for e in read_events(run_dir) if e["event"] == "resume"]
                rows[f"{stage} {name}"] = found | {"whole": whole}
                good &= found["exact"] and whole and found["loss"] <= args.tolerance
                print(
                    f"| {stage} | {' -> '.join(map(str, path))} | {resumed} | {found['loss']:.1e} "
                    f"| {found['grad_norm']:.1e} | {found['weights']:.1e} | "
                    f"{'equal' if found['exact'] else 'DIFFERENT'} | "
                    f"{'right' if whole else 'WRONG'} |",
                    flush=True,
                )
    print(environment())
    if args.json:
        most = {key: max(row[key] for row in rows.values()) for key in ("loss", "weights")}
        result = {"steps": 3 * STEPS_A_START, "genes": N_GENES, "good": good, "most": most}
        write_result(args.json, "elastic_runs", result | {"rows": rows})
    return not good


if __name__ == "__main__":
    sys.exit(main())
