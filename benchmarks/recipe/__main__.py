r"""Train candidate recipes side by side on real cells and print a table.

    python -m benchmarks.recipe --corpus CORPUS --graph graph.npz --out results.jsonl \
        --seeds 0 1 "as today:" "offset: model.cell_offset=visible optim.lr=0.01"
    python -m benchmarks.recipe --out results.jsonl --table

A candidate is `NAME: KEY=VALUE ...`, overrides of a preset (`benchmarks/recipe/training.py`
names the few keys that are the study's own). Each run adds a line to --out when it ends; a run that
is there already is not repeated. The figures are those of `sclong_ds.objective.scores` on hidden
values of datasets that were held out whole; one thread.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.recipe.panel import read_panel
from benchmarks.recipe.training import Study, run
from sclong_ds.config.load import load_config


def main(argv: Sequence[str] | None = None) -> None:
    """Run the candidates that --out lacks, then print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipe", description=__doc__)
    parser.add_argument("candidates", nargs="*", metavar="NAME: KEY=VALUE ...")
    parser.add_argument("--corpus", help="finalized corpus with held-out datasets")
    parser.add_argument("--graph", help="gene graph of its vocabulary")
    parser.add_argument("--out", type=Path, required=True, help="file of results, a line each")
    parser.add_argument("--config", default="sclong_tiny", help="preset that candidates change")
    parser.add_argument("--genes", type=int, default=1200, help="most expressed genes to keep")
    parser.add_argument("--top", type=int, default=256, help="model.top_seq_len")
    parser.add_argument("--validation-cells", type=int, default=60, help="of each held-out dataset")
    parser.add_argument(
        "--held-out", nargs="+", default=[], metavar="DATASET", help="instead of the corpus's own"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--table", action="store_true", help="print the table alone")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if not args.table:
        base = load_config(args.config)
        panel = read_panel(
            args.corpus,
            args.graph,
            genes=args.genes,
            validation_cells=args.validation_cells,
            held_out=args.held_out,
        )
        study = Study(panel, base.objective)
        for seed in args.seeds:
            for candidate in args.candidates:
                name, _, keys = candidate.partition(":")
                about = {"name": name.strip(), "keys": keys.split(), "genes": args.genes}
                if any(r["name"] == about["name"] and r["seed"] == seed for r in read(args.out)):
                    continue
                own = [f"model.top_seq_len={args.top}", *about["keys"]]
                found = about | run(study, own, seed=seed, preset=args.config)
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found) + "\n")
    print(table(read(args.out)))


def read(path: Path) -> list[dict[str, Any]]:
    """Return the results in a file; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table, a row per baseline and per candidate."""
    lines = [
        "| recipe | visits | seeds | hidden MSE (sd) | r per gene | r within a cell "
        "| large encoder uniform | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    if results:
        first = results[0]
        for key in first:
            if key.startswith("val/") and key.endswith("/mse") and key != "val/mse":
                name = key.split("/")[1]
                r = [
                    first.get(f"val/{name}/pearson_{w}", np.nan)
                    for w in ("per_gene", "within_cell")
                ]
                lines.append(f"| {name} | | | {first[key]:.4f} | {r[0]:.3f} | {r[1]:.3f} | | |")
    for name in dict.fromkeys(r["name"] for r in results):
        own = [r for r in results if r["name"] == name]

        def mean(key: str, own: list[dict[str, Any]] = own) -> float:
            return float(np.mean([r.get(key, np.nan) for r in own]))

        mse = [r["val/mse"] for r in own]
        spread = f" ({np.std(mse, ddof=1):.4f})" if len(mse) > 1 else ""
        uniform = mean("uniform_large_mse") / mean("val/mse") - 1
        lines.append(
            f"| {name} | {own[0]['visits']:,} | {len(own)} | {np.mean(mse):.4f}{spread} "
            f"| {mean('val/pearson_per_gene'):.3f} | {mean('val/pearson_within_cell'):.3f} "
            f"| {'' if np.isnan(uniform) else f'{uniform:+.1%}'} | {mean('cpu_s'):.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
