"""Makes the demo datasets of resources/demo from immune430.h5ad (430 real human immune cells).

    python data_prep/resources/make_demo_cells.py IMMUNE430_H5AD

Reads an h5ad file with whole counts in X and gene symbols as names. Writes, in the folder `demo`
beside this script, the same cells as three datasets of three formats (a seeded permutation decides
which cell goes where), a fourth that is cut short on purpose, and the manifest. Source of the
cells: celltypist 1.7.1 (MIT), see README.md.
"""

from __future__ import annotations

import gzip
import io
import sys
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd

from data_prep.genes.gene_names import GeneResolver
from sclong_ds.corpus.genes import GeneVocabulary

SEED = 430
N_A, N_B = 240, 126
BROKEN_BYTES = 200_000
DEMO = Path(__file__).resolve().parent / "demo"
MANIFEST = """\
dataset_id\tpath\ttissue\tnote
immune_a\timmune_a.h5ad\timmune cells\tAnnData, gene symbols
immune_b\timmune_b.h5\timmune cells\t10x HDF5 version 3, Ensembl ids
immune_c\timmune_c.csv.gz\timmune cells\ttext table, gene symbols
immune_broken\timmune_broken.h5ad\timmune cells\tcut short on purpose
"""


def main() -> int:
    """Write the demo folder."""
    if len(sys.argv) != 2:
        print(f"usage: {Path(__file__).name} IMMUNE430_H5AD", file=sys.stderr)
        return 2
    cells = anndata.read_h5ad(sys.argv[1])
    order = np.random.default_rng(SEED).permutation(cells.n_obs)
    parts = np.split(order, [N_A, N_A + N_B])
    a, b, c = (cells[np.sort(part)].copy() for part in parts)
    DEMO.mkdir(exist_ok=True)
    a.write_h5ad(DEMO / "immune_a.h5ad", compression="gzip", compression_opts=9)
    write_tenx(b, DEMO / "immune_b.h5")
    write_csv(c, DEMO / "immune_c.csv.gz")
    whole = (DEMO / "immune_a.h5ad").read_bytes()
    (DEMO / "immune_broken.h5ad").write_bytes(whole[:BROKEN_BYTES])
    (DEMO / "manifest.tsv").write_text(MANIFEST)
    return 0


def ensembl_ids(symbols: np.ndarray) -> np.ndarray:
    """Return the Ensembl id of each symbol; the symbol where it has none or the id is taken."""
    genes = GeneVocabulary.bundled()
    columns = GeneResolver(genes).columns(symbols)
    # A current symbol has the first claim on its id, an alias comes after.
    current = np.array(
        [genes.symbols[column] == name for column, name in zip(columns, symbols, strict=True)]
    )
    ids, taken = symbols.astype(object), set()
    for gene in [*np.flatnonzero(current), *np.flatnonzero(~current)]:
        if columns[gene] >= 0 and columns[gene] not in taken:
            taken.add(columns[gene])
            ids[gene] = genes.ids[columns[gene]]
    return ids


def write_tenx(cells: anndata.AnnData, path: Path) -> None:
    """Write the layout of Cell Ranger 3: CSC of genes x cells, which is CSR of cells x genes."""
    matrix = cells.X
    matrix.sort_indices()
    symbols = cells.var_names.to_numpy()
    columns = {
        "feature_type": np.full(cells.n_vars, "Gene Expression"),
        "genome": np.full(cells.n_vars, "GRCh38"),
        "id": ensembl_ids(symbols),
        "name": symbols,
    }
    packed = {"compression": "gzip", "compression_opts": 9, "shuffle": True}
    with h5py.File(path, "w") as root:
        root.attrs["filetype"], root.attrs["version"] = "matrix", 2
        group = root.create_group("matrix")
        barcodes = np.array(list(cells.obs_names), dtype="S")
        group.create_dataset("barcodes", data=barcodes, **packed)
        group.create_dataset("data", data=matrix.data.astype(np.int32), **packed)
        group.create_dataset("indices", data=matrix.indices.astype(np.int64), **packed)
        group.create_dataset("indptr", data=matrix.indptr.astype(np.int64), **packed)
        group.create_dataset("shape", data=np.array(matrix.shape[::-1], dtype=np.int32))
        features = group.create_group("features")
        features.create_dataset("_all_tag_keys", data=np.array([b"genome"]))
        for name, values in columns.items():
            features.create_dataset(name, data=np.array(list(values), dtype="S"), **packed)


def write_csv(cells: anndata.AnnData, path: Path) -> None:
    """Write cells in rows, gene symbols in the header."""
    text = io.StringIO()
    table = pd.DataFrame(cells.X.toarray(), index=cells.obs_names, columns=cells.var_names)
    table.to_csv(text, index_label="", lineterminator="\n")
    path.write_bytes(gzip.compress(text.getvalue().encode(), compresslevel=9, mtime=0))


if __name__ == "__main__":
    sys.exit(main())
