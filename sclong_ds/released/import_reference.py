"""A checkpoint of the released scLong code, say the published one, to a model folder.

    python -m sclong_ds import-reference --checkpoint X.pth --hyper-params X.pkl --genes X.txt
        --out MODEL_DIR [--gene-graph graph.npz] [--target-sum 1e4]

Reads the checkpoint (a state dict, alone or as `model_state_dict` beside optimizer and scheduler),
the pickled constructor arguments with the gene graph (G_go, G_go_weight), and the gene list in the
order of the inputs; nothing in them is run (`sclong_ds.released.safe_pickle`). Only the model's
weights are read, one at a time, so peak memory stays near their size. Writes MODEL_DIR
(`sclong_ds.exported.model_dir`) in float32: the released pos_emb is float64 and is rounded.

A list of symbols gets the Ensembl ids of the bundled gene table where that is safe, so that cells
find their genes however they name them; the order stays.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import logging
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sclong_ds.config.sections import ModelConfig
from sclong_ds.corpus.gene_graph import check_edges, read_gene_graph, write_gene_graph
from sclong_ds.corpus.genes import BUNDLED_PATH, UNKNOWN_CLASS, GeneVocabulary
from sclong_ds.corpus.transform import Transform
from sclong_ds.exported.model_dir import GRAPH, check_absent, write_model_dir
from sclong_ds.files.atomic import file_sha256
from sclong_ds.model.gene_encoder import GeneGraph
from sclong_ds.model.sclong import ScLong
from sclong_ds.released.mapping import (
    ReferenceWeights,
    check_hyper_parameters,
    reference_config,
    reference_features,
)
from sclong_ds.released.safe_pickle import load_plain
from sclong_ds.run_folder.identity import environment, git_commit

ALIASES_PATH = BUNDLED_PATH.with_name("symbol_aliases.tsv.gz")
_ENSEMBL_ID, _VERSION = re.compile(r"ENSG\d{11}"), re.compile(r"(?<=^ENSG\d{11})\.\d+$")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleasedModel:
    """What the checkpoint and the constructor arguments say, checked against each other."""

    config: ModelConfig
    """Architecture."""
    weights: ReferenceWeights
    """Weights of `ScLong`, read when asked for."""
    features: dict[str, Tensor]
    """Random features (M, K) by `stack.layer`."""
    graph: GeneGraph | None
    """Gene graph, by position in the gene list."""
    facts: dict[str, Any]
    """Numbers beside the weights, for the record."""


def import_reference(
    *,
    checkpoint: Path,
    hyper_params: Path,
    genes: Path,
    out: Path,
    gene_graph: Path | None = None,
    target_sum: float = 1.0e4,
) -> dict[str, Any]:
    """Write the model folder of a checkpoint of the released code.

    Args:
        checkpoint: The .pth.
        hyper_params: Pickled dict of constructor arguments; top_seq_len must be among them.
        genes: Gene list, one name a line, or a gene table.
        out: Folder to make.
        gene_graph: Graph to use instead of the hyper-parameters' one, made for the list `genes`.
        target_sum: Counts of a cell after scaling, before log1p.

    Returns:
        The provenance that was written.

    Raises:
        FileNotFoundError: An input is not there.
        FileExistsError: `out` exists.
        ValueError: An input is not what it should be, or the inputs do not fit together.
    """
    check_absent(out)
    if not (math.isfinite(target_sum) and target_sum > 0):
        raise ValueError(f"--target-sum: got {target_sum}, must be > 0")
    listed = GeneVocabulary.read(genes)
    model = read_released(checkpoint, hyper_params, genes=listed, gene_graph=gene_graph)
    vocabulary, mapped = with_ensembl_ids(listed)
    _log.info("%d genes: %s", len(listed), ", ".join(f"{k} {n}" for k, n in mapped.items()))
    sources = {"checkpoint": checkpoint, "hyper_params": hyper_params, "genes": genes}
    files = _files(sources | ({"gene_graph": gene_graph} if gene_graph else {}))
    versions = {"target_sum": target_sum, "commit": git_commit(), "environment": environment()}
    provenance = {"imported_files": files, **model.facts, "genes": mapped, **versions}
    _log.info("writing %s", out)
    with tempfile.TemporaryDirectory() as scratch:
        table, graph = Path(scratch) / "genes.tsv", Path(scratch) / GRAPH
        vocabulary.write(table)
        if model.graph is not None:
            about: Any = {"n_genes": len(vocabulary), "genes_hash": vocabulary.hash}
            write_gene_graph(graph, *model.graph, **about, settings=files, counts={})
        write_model_dir(
            out,
            weights=model.weights,
            model=model.config,
            transform=Transform(name="log1p_total", target_sum=target_sum),
            genes=table,
            graph=None if model.graph is None else graph,
            features=model.features,
            provenance=provenance,
        )
    return provenance


def read_released(
    checkpoint: Path, hyper_params: Path, *, genes: GeneVocabulary, gene_graph: Path | None
) -> ReleasedModel:
    """Read a checkpoint and its constructor arguments; of the weights only names and shapes.

    Args:
        checkpoint: The .pth.
        hyper_params: Pickled dict of constructor arguments.
        genes: The genes as listed.
        gene_graph: Graph to use instead of the constructor argument.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: A file is not what it should be, or they do not fit together.
    """
    hyper = read_hyper_parameters(hyper_params)
    state, numbers = read_checkpoint(checkpoint)
    with _about(checkpoint):
        config = reference_config(state, top_seq_len=hyper["top_seq_len"])
        weights, features = ReferenceWeights(state, config), reference_features(state, config)
        if weights.unused:
            raise ValueError(
                f"{weights.unused[0]} ({len(weights.unused)} such names) is no weight of the "
                f"released scLong model; checkpoints of other models cannot be imported"
            )
        _check_types(state)
    n_tokens = weights.n_tokens
    with _about(hyper_params):
        unknown = check_hyper_parameters(hyper, config, n_tokens=n_tokens)
        if len(genes) != n_tokens - 1:
            raise ValueError(
                f"max_seq_len is {n_tokens}, which are {n_tokens - 1} genes and a pad token; "
                f"--genes lists {len(genes)}"
            )
        own = config.gene_encoder == "graph" and gene_graph is None
        graph = graph_of(hyper, n_genes=len(genes)) if own else None
    if gene_graph is not None:
        graph = read_gene_graph(gene_graph, genes_hash=genes.hash)
    with _about(checkpoint):
        with torch.device("meta"):
            model = ScLong(config, n_genes=len(genes), graph=graph, features=features)
        weights.check_shapes({name: tuple(t.shape) for name, t in model.state_dict().items()})
    if unknown:
        _log.warning("%s: without effect here: %s", hyper_params, ", ".join(unknown))
    facts = {
        "checkpoint": numbers,
        "hyper_parameters": {k: v for k, v in hyper.items() if _is_number(v)},
        "hyper_parameters_without_effect": unknown,
        "rounded_to_float32": weights.converted(),
    }
    return ReleasedModel(
        config=config, weights=weights, features=features, graph=graph, facts=facts
    )


def read_hyper_parameters(path: Path) -> dict[str, Any]:
    """Read pickled constructor arguments.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No dict of plain values, or top_seq_len is missing.
    """
    given = load_plain(path)
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise ValueError(
            f"{path}: holds {type(given).__name__}, must be a dict of constructor arguments by name"
        )
    length = given.get("top_seq_len")
    if type(length) is not int or length < 1:
        raise ValueError(f"{path}: top_seq_len is {length}, must be a whole number of 1 or more")
    return given


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Read the state dict of a checkpoint; its tensors stay in the file until they are used.

    Args:
        path: File of torch.save: a state dict, or a dict with one as `model_state_dict`. The
            prefix `module.` of distributed training is removed.

    Returns:
        The state dict, and the numbers beside it (epoch, loss).

    Raises:
        FileNotFoundError: No such file.
        ValueError: Damaged, or something else than a state dict.
    """
    loaded = load_plain(path)
    state = loaded.get("model_state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not any(isinstance(t, Tensor) for t in state.values()):
        holds = ", ".join(map(str, list(loaded)[:5])) if isinstance(loaded, dict) else "no dict"
        raise ValueError(f"{path}: neither a state dict nor a model_state_dict (holds {holds})")
    for name, tensor in state.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor)):
            raise ValueError(f"{path}: {name} is no tensor by name, so this is no state dict")
    numbers = {str(k): v for k, v in loaded.items() if _is_number(v)}
    prefix = "module." if all(name.startswith("module.") for name in state) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}, numbers


def graph_of(hyper: Mapping[str, Any], *, n_genes: int) -> GeneGraph:
    """Return the gene graph of the constructor arguments.

    Args:
        hyper: Constructor arguments with G_go (2, E) and G_go_weight (E,).
        n_genes: Number of genes.

    Raises:
        ValueError: There is none, or it is not one over these genes.
    """
    if hyper.get("G_go") is None or hyper.get("G_go_weight") is None:
        raise ValueError("no G_go and G_go_weight: give the graph with --gene-graph")
    edges, weights = (_as_numpy(hyper[key]) for key in ("G_go", "G_go_weight"))
    if edges.dtype.kind not in "iu" or weights.dtype.kind != "f":
        raise ValueError(
            f"G_go is {edges.dtype} and G_go_weight {weights.dtype}, must be integers and floats"
        )
    check_edges("G_go, G_go_weight", edges, weights, n_genes)
    return edges.astype(np.int64), weights.astype(np.float32)


def with_ensembl_ids(listed: GeneVocabulary) -> tuple[GeneVocabulary, dict[str, int]]:
    """Return a gene list with Ensembl ids instead of symbols, and how its ids came about.

    A name becomes the Ensembl id that it is (without version), the one of the bundled gene with
    this symbol, or with this alias, in this order of precedence; where two names mean the same
    gene, both keep their name. A gene table is returned as it is.

    Args:
        listed: The genes as listed.
    """
    if listed.ids != listed.symbols:
        return listed, {"of a gene table": len(listed)}
    bundled, exact = GeneVocabulary.bundled(), list(filter(_ENSEMBL_ID.fullmatch, listed.ids))
    lookups: dict[str, Callable[[str], str | None]] = {
        "ensembl_id_with_version": lambda name: _VERSION.sub("", name),
        "symbol": dict(zip(bundled.symbols, bundled.ids, strict=True)).get,
        "alias": _aliases().get,
    }
    ids, mapped = dict(zip(exact, exact, strict=True)), {"ensembl_id": len(exact)}
    taken = set(listed.ids)
    for kind, lookup in lookups.items():
        found = {name: lookup(name) for name in listed.ids if name not in ids}
        claims = Counter(found.values())
        new = {n: g for n, g in found.items() if g and g not in taken and claims[g] == 1}
        taken |= set(new.values())
        ids |= new
        mapped[kind] = len(new)
    mapped["unmapped"] = len(listed) - len(ids)
    rows = [bundled.index.get(ids.get(name, name), -1) for name in listed.ids]
    vocabulary = GeneVocabulary(
        tuple(ids.get(name, name) for name in listed.ids),
        tuple(bundled.symbols[i] if i >= 0 else n for i, n in zip(rows, listed.ids, strict=True)),
        tuple(bundled.classes[i] if i >= 0 else UNKNOWN_CLASS for i in rows),
    )
    return vocabulary, mapped


def run(args: argparse.Namespace) -> int:
    """Run `python -m sclong_ds import-reference`."""
    import_reference(
        checkpoint=args.checkpoint,
        hyper_params=args.hyper_params,
        genes=args.genes,
        out=args.out,
        gene_graph=args.gene_graph,
        target_sum=args.target_sum,
    )
    _log.info("wrote %s from %s", args.out, args.checkpoint)
    return 0


def _files(sources: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Return name, size and hash of the inputs."""
    _log.info("hashing %.1f GB", sum(path.stat().st_size for path in sources.values()) / 1e9)
    return {
        kind: {"file": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for kind, path in sources.items()
    }


def _aliases() -> dict[str, str]:
    """Return the Ensembl id of each alias of the bundled table; none is ambiguous."""
    with gzip.open(ALIASES_PATH, "rt", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return {row["alias"]: row["ensembl_id"] for row in rows}


def _as_numpy(value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.float() if value.is_floating_point() else value
    return np.asarray(value)


def _check_types(state: Mapping[str, Tensor]) -> None:
    """Check that all but the counters of redraws are floating-point numbers."""
    for name, tensor in state.items():
        if not tensor.is_floating_point() and not name.endswith(".calls_since_last_redraw"):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(
                f"{name} is {kind}, must be floating-point numbers: weights of other types "
                f"(quantized, complex) cannot be imported"
            )


def _is_number(value: Any) -> bool:
    """Tell whether a value is a number that JSON can hold."""
    return isinstance(value, (int, float)) and math.isfinite(value)


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Put the file before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
