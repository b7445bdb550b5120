"""Tables of the commands that use a model, on real cells with labels, each beside its baselines.

    python -m benchmarks.use_model MODEL --work DIR [--json OUT]
    python -m benchmarks.use_model MODEL --work DIR --input CELLS --label KEY --group KEY

Runs `finetune` (modes frozen, head and lora), `evaluate`, `genes --benchmark` and `perturb` as a
user would and reads the tables that they write. Without --input the cells are the bundled ones of
immune tissue: labels from the strongest of four groups of marker genes, which `finetune` and
`evaluate` then do not get to see, three groups by position in the file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd

from benchmarks.environment import write_result
from sclong_ds.demo import CELLS

ROOT = Path(__file__).parents[1]
MARKERS = {
    "T": ("CD3D", "CD3E", "CD3G"),
    "B": ("CD79A", "CD79B", "MS4A1"),
    "monocyte": ("LYZ", "S100A8", "S100A9"),
    "NK": ("NKG7", "GNLY", "KLRD1"),
}
LABEL, GROUP, N_GROUPS = "cell_type", "donor", 3
PERTURBED, FROM, TOWARDS = "CD3E;IL7R;B2M;CD3E,CD3D", "T", "monocyte"
N_PERTURBED, N_NULL = 12, 20
MODES = {"frozen": (), "head": (), "lora": ("--max-epochs", "3", "--seeds", "1")}


def label_by_markers(cells: anndata.AnnData) -> None:
    """Put labels from marker genes and groups by position into obs."""
    share = {name: np.asarray(cells[:, m].X.sum(axis=1)).ravel() for name, m in MARKERS.items()}
    table = pd.DataFrame(share, index=cells.obs_names)
    table = table / table.mean()
    most = table.max(axis=1)
    clear = (most > 2 * table.apply(lambda row: row.nlargest(2).iloc[1], axis=1)) & (most > 0.3)
    cells.obs[LABEL] = table.idxmax(axis=1).where(clear)
    cells.obs[GROUP] = [f"{GROUP}{i % N_GROUPS + 1}" for i in range(cells.n_obs)]


def bundled(work: Path) -> dict[str, Path]:
    """Write the bundled cells with labels: without the markers, with all genes, and two kinds."""
    cells = anndata.read_h5ad(CELLS / "immune_a.h5ad")
    label_by_markers(cells)
    markers = [gene for genes in MARKERS.values() for gene in genes]
    few = np.zeros(cells.n_obs, dtype=bool)
    for name in (FROM, TOWARDS):
        few[np.flatnonzero(cells.obs[LABEL] == name)[:N_PERTURBED]] = True
    found = {
        "labelled": cells[:, ~cells.var_names.isin(markers)],
        "whole": cells,
        "few": cells[few],
    }
    for name, part in found.items():
        part.copy().write_h5ad(work / f"{name}.h5ad")
    return {name: work / f"{name}.h5ad" for name in found}


def run(command: str, *args: object) -> str:
    """Run a command of `sclong_ds` and return what it printed."""
    words = [sys.executable, "-m", "sclong_ds", command, *map(str, args)]
    print("$ sclong", *words[3:], flush=True)
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{command}: exit {done.returncode}\n{done.stderr[-3000:]}")
    print(done.stdout, flush=True)
    return done.stdout


def table_of(path: Path) -> dict[str, Any]:
    """Return a table that a command has written, by rows; what is not defined is null."""
    return json.loads(pd.read_csv(path, sep="\t", index_col=0).to_json(orient="index"))


def finetuned(model: str, cells: Path, label: str, group: str, work: Path) -> dict[str, Any]:
    """Return verdict and table of each mode."""
    found = {}
    for mode, options in MODES.items():
        out = work / f"finetuned-{mode}"
        folds = min(5, anndata.read_h5ad(cells, backed="r").obs[group].nunique())
        said = run(
            "finetune", model, cells, "--label", label, "--group", group, "--folds", folds,
            "--mode", mode, *options, "--out", out, "tracking.enabled=false",
        )  # fmt: skip
        verdict = next(line for line in said.splitlines() if line.strip())
        found[mode] = {"verdict": verdict, "rows": table_of(out / "scores.tsv")}
    return found


def perturbed(model: str, cells: Path, work: Path) -> dict[str, Any]:
    """Return shift, null, p and q of each set of genes for the cell's embedding."""
    out = work / "effects.h5ad"
    run(
        "perturb", model, cells, "--genes", PERTURBED, "--mode", "delete", "--null", N_NULL,
        "--towards", f"{LABEL}={TOWARDS}", "--out", out,
    )  # fmt: skip
    effects = anndata.read_h5ad(out)
    numbers = effects.obs.select_dtypes("number")
    return {
        "rows": json.loads(numbers.to_json(orient="index")),
        "genes_below_q_0.05": int((np.nan_to_num(effects.layers["q"], nan=1.0) < 0.05).sum()),
    }


def main() -> int:
    """Run the commands and print their tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="exported model, such as demo_run/model")
    parser.add_argument(
        "--work", type=Path, required=True, metavar="DIR",
        help="folder to make, or to continue in: fine-tuning does, the rest is made again",
    )  # fmt: skip
    parser.add_argument("--input", type=Path, metavar="CELLS", help="cells with labels and groups")
    parser.add_argument("--label", default=LABEL, metavar="KEY")
    parser.add_argument("--group", default=GROUP, metavar="KEY")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the tables as JSON")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for made in (*args.work.glob("genes.*"), *args.work.glob("effects.*")):
        made.unlink()
    files = {"labelled": args.input, "whole": args.input}
    if args.input is None:
        files = bundled(args.work)
    label, group = args.label, args.group
    cells, whole = files["labelled"], files["whole"]
    result: dict[str, Any] = {
        "finetune": finetuned(args.model, cells, label, group, args.work),
    }
    # By cells of unseen groups, and by the labels' neighbours among all.
    run("evaluate", args.model, cells, "--label", label, "--group", group, "--out",
        args.work / "evaluated")  # fmt: skip
    result["evaluate"] = {"rows": table_of(args.work / "evaluated" / "scores.tsv")}
    run("genes", args.model, whole, "--by", label, "--benchmark", "--out",
        args.work / "genes.h5ad")  # fmt: skip
    table = pd.read_csv(args.work / "genes.benchmark.tsv", sep="\t", index_col=0)
    result["genes"] = {
        sets: json.loads(rows.drop(columns="sets").to_json(orient="index"))
        for sets, rows in table.groupby("sets")
    }
    if args.input is None:
        result["perturb"] = perturbed(args.model, files["few"], args.work)
    if args.json:
        write_result(args.json, "use_model", result, cells=str(args.input or "bundled"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
