"""Gene vectors of a model, networks of genes, and how both compare with controls.

    python -m sclong_ds genes MODEL_DIR [INPUT --by cell_type] --out genes.h5ad

Writes an AnnData with a row for each gene of the model: `obsm["gene_vectors"]`, the vectors before
any cell is seen, and with INPUT `obsm["contextual"]`, the mean representation over the cells that
express the gene, `obsm["contextual:VALUE"]` of those of each value of --by, and the numbers of
cells in `obs`. `--network` writes edge lists as OUT.KIND.tsv, `--benchmark` scores as
OUT.benchmark.tsv: areas under the ROC curve for GO terms and known sets of genes, beside controls.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.sparse import coo_matrix, issparse

from sclong_ds.embedding.cells import Cells
from sclong_ds.embedding.embed import check_out, plain_columns
from sclong_ds.embedding.opening import cells_of, known_from_training, model_of
from sclong_ds.embedding.perturb import genes_of
from sclong_ds.embedding.record import origin_of, record_of
from sclong_ds.embedding.stored import UNS_KEY
from sclong_ds.files.atomic import make_folder, whole_file, write_atomic
from sclong_ds.gene_analysis.benchmark import (
    count_vectors,
    level_areas,
    score_table,
    set_areas,
    verdict,
)
from sclong_ds.gene_analysis.contextual import Contextual, contextual_vectors
from sclong_ds.gene_analysis.network import (
    Weights,
    ablation_weights,
    attention_weights,
    cosine_edges,
    edge_table,
    gradient_weights,
    standardised,
)
from sclong_ds.gene_analysis.term_sets import SIZES, TermSets, go_terms, gold_sets
from sclong_ds.model.sclong import ScLong
from sclong_ds.page.words import counted

FEWEST_CELLS = 10
"""That express a gene which is scored; of inputs with fewer cells, one."""
_FEWEST_TO_DECOMPOSE = 2


@dataclass(frozen=True, slots=True)
class Read:
    """Cells of a command, in groups."""

    cells: Cells
    groups: tuple[str, ...]
    """(K,) values of --by; one empty text without it."""
    codes: np.ndarray
    """(B,) group of each cell, -1 for a missing value."""


def run(args: argparse.Namespace) -> int:
    """Run `python -m sclong_ds genes`.

    Args:
        args: Parsed arguments of `add_arguments`.

    Returns:
        0.

    Raises:
        FileNotFoundError: No such model or input.
        ValueError: A wrong option, an unknown gene or column, or one that needs INPUT without it.
    """
    _check(args)
    model = model_of(args)
    sources = None if args.of is None else genes_of(args.of, model.genes, option="--of")
    read = None if args.input is None else _read(args, model)
    contextual = None
    if read is not None:
        _check_cells(args, model, read, sources or [])
        contextual = contextual_vectors(
            model, read.cells, read.codes, n_groups=len(read.groups), batch_size=args.batch_size
        )
    table = gene_table(model, read, contextual)
    table.uns[UNS_KEY] = record_of(model, args.model_dir)
    if read is not None:
        table.uns[UNS_KEY] |= origin_of(args)
    for kind in args.network:
        edges = _network(kind, args, model, read, table, sources)
        path = beside(args.out, f"{kind}.tsv")
        write_atomic(path, edges.to_csv(sep="\t", index=False, float_format="%.6g").encode())
        n = counted(edges["source"].nunique(), "gene")
        print(f"{path}: {counted(len(edges), 'edge')} of {n}")
    if read is not None:
        print(known_from_training(args.model_dir, read.cells))
    if args.benchmark:
        _benchmark(args, model, read, table)
    with whole_file(args.out) as partial:
        table.write_h5ad(partial)
    print(f"{args.out}: {counted(table.n_obs, 'gene')}, {', '.join(table.obsm)}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse options that do not go together, before anything is opened."""
    check_out(args.out, input=args.input or Path(args.model_dir))
    if args.out.exists():
        raise ValueError(f"--out {args.out} exists; choose another name, or remove it")
    if args.by and args.input is None:
        raise ValueError("--by: needs INPUT, whose obs it names")
    for kind in args.network:
        if kind != "cosine" and (args.input is None or args.of is None):
            raise ValueError(f"--network {kind}: needs INPUT, and --of with the genes it is of")
    make_folder(args.out.parent)


def _check_cells(args: argparse.Namespace, model: ScLong, read: Read, sources: list[int]) -> None:
    """Refuse what cannot be had of the cells, before the model reads them."""
    if args.benchmark and len(read.cells.obs) < _FEWEST_TO_DECOMPOSE:
        raise ValueError(
            f"--benchmark: {args.input} has {len(read.cells.obs)} cells, "
            f"{_FEWEST_TO_DECOMPOSE} are needed for the singular vectors beside the model"
        )
    of_cells = [kind for kind in args.network if kind != "cosine"]
    if of_cells:
        n_cells = sum(block.counts[:, sources].getnnz(axis=0) for block in read.cells.blocks())
        silent = [
            model.genes.symbols[gene] for gene, n in zip(sources, n_cells, strict=True) if not n
        ]
        if silent:
            raise ValueError(
                f"--of {','.join(silent)}: no cell expresses it, so it has no edges by "
                f"{of_cells[0]}; leave it out"
            )


def beside(out: Path, ending: str) -> Path:
    """Return the name of a file beside the output: `genes.cosine.tsv` of `genes.h5ad`."""
    return out.with_name(f"{out.stem}.{ending}")


def _read(args: argparse.Namespace, model: ScLong) -> Read:
    cells = cells_of(args, model)
    if args.by is None:
        return Read(cells, ("",), np.zeros(len(cells.obs), dtype=np.int64))
    if args.by not in cells.obs:
        raise ValueError(
            f"--by {args.by}: no such column in obs; there are {', '.join(map(str, cells.obs))}"
        )
    values = cells.obs[args.by]
    codes, names = pd.factorize(
        values.astype(object).where(values.isna(), values.astype(str)), sort=True
    )
    if not len(names):
        raise ValueError(f"--by {args.by}: the column is empty")
    if len({_key(name) for name in map(str, names)}) < len(names):
        raise ValueError(
            f"--by {args.by}: two of its values differ in / and | alone, which the names of the "
            "output cannot; rename one"
        )
    return Read(cells, tuple(map(str, names)), codes)


def gene_table(model: ScLong, read: Read | None, contextual: Contextual | None) -> AnnData:
    """Return the vectors of all genes.

    Args:
        model: From `load_model`.
        read: The cells, or None.
        contextual: Means over them, or None.

    Returns:
        A row for each gene, without X.
    """
    obs = {"symbol": model.genes.symbols, "class": model.genes.classes}
    obsm = {"gene_vectors": gene_vectors(model)}
    if read is not None and contextual is not None:
        obs["n_cells"] = contextual.n_cells.sum(axis=0)
        obsm["contextual"] = contextual.together()
        if read.groups != ("",):
            for i, name in enumerate(read.groups):
                key = _key(name)
                obs[f"n_cells:{key}"] = contextual.n_cells[i]
                obsm[f"contextual:{key}"] = contextual.vectors[i]
    table = pd.DataFrame(obs, index=list(model.genes.ids))
    return AnnData(obs=plain_columns(table), obsm=obsm)


def _key(name: str) -> str:
    """Return a value of --by as part of a name: HDF5 takes a slash for a folder."""
    return name.replace("/", "|")


def gene_vectors(model: ScLong) -> np.ndarray:
    """Return the vectors of the genes (G, C) float32, before any cell is seen."""
    with torch.inference_mode():
        return np.asarray(model.gene_encoder()[: model.n_genes].float().cpu().numpy())


def _network(
    kind: str,
    args: argparse.Namespace,
    model: ScLong,
    read: Read | None,
    table: AnnData,
    sources: list[int] | None,
) -> pd.DataFrame:
    if kind == "cosine" or read is None or sources is None:
        vectors = table.obsm["gene_vectors" if read is None else "contextual"]
        chosen = range(model.n_genes) if sources is None else sources
        return cosine_edges(vectors, chosen, model.genes, edges=args.edges)
    if kind == "ablation":
        weights: Weights = ablation_weights(model, read.cells, sources, batch_size=args.batch_size)
    else:
        of_kind = {"attention": attention_weights, "gradient": gradient_weights}[kind]
        weights = of_kind(model, read.cells, sources)
    return edge_table(weights, sources, model.genes, edges=args.edges, min_cells=args.min_cells)


def _benchmark(args: argparse.Namespace, model: ScLong, read: Read | None, table: AnnData) -> None:
    """Score the vectors, print the tables and verdicts, and write them."""
    graph_file = args.model_dir / "gene_graph.npz"
    graph = graph_file if model.gene_encoder.graph is not None else None
    rows = {name: table.obsm[name] for name in ("gene_vectors", "contextual") if name in table.obsm}
    scored, means = np.ones(model.n_genes, dtype=bool), None
    if read is not None:
        svd, means, n_cells = count_vectors(
            read.cells, target_sum=model.transform.target_sum, seed=args.seed
        )
        rows["svd_of_values"] = svd
        scored = n_cells >= min(FEWEST_CELLS, max(1, len(read.cells.obs) // 10))
    if graph is not None:
        assert model.gene_encoder.graph is not None
        edges, weights = model.gene_encoder.graph
        shape = (model.n_genes, model.n_genes)
        rows["gene_graph"] = coo_matrix((weights, (edges[1], edges[0])), shape=shape).tocsr()
    files = {"obo": args.obo, "associations": args.associations}
    terms = go_terms(args.model_dir / "genes.tsv", model.genes, graph, **files)
    known = gold_sets(model.genes, known=graph is not None)
    parts = [
        _scored("GO", terms, SIZES[0], rows, scored, means, args.seed),
        _scored("known sets", known, 5, rows, scored, means, args.seed),
    ]
    path = beside(args.out, "benchmark.tsv")
    text = pd.concat(parts).to_csv(sep="\t", float_format="%.4f")
    write_atomic(path, text.encode())
    print(f"written: {path}")


def _scored(
    name: str,
    sets: TermSets,
    smallest: int,
    rows: dict[str, np.ndarray],
    scored: np.ndarray,
    means: np.ndarray | None,
    seed: int,
) -> pd.DataFrame:
    annotated = scored & sets.members.any(axis=1) if name == "GO" else scored
    within = sets.within(annotated, smallest=smallest)
    if not within.names:
        print(f"{name}: no set has {smallest} genes or more among the {annotated.sum()} compared")
        return pd.DataFrame()
    found = {}
    for row, vectors in rows.items():
        dense = vectors if issparse(vectors) else standardised(vectors, annotated)
        found[row] = set_areas(dense[annotated], within.members)
    if means is not None:
        found["expression_level"] = level_areas(means[annotated], within.members)
    table = score_table(found, seed=seed)
    held = ""
    if name == "GO" and not within.known:
        held = " not in the graph"
        if "gene_graph" in rows:
            held = " held out of the graph, which has terms above and below them"
    print(f"\n{name}{held}: {verdict(found, {'gene_vectors', 'contextual'}, within, seed=seed)}")
    print(table.to_string(float_format=lambda value: f"{value:.3f}"))
    return table.assign(sets=name, n_sets=len(within.names), known=within.known)
