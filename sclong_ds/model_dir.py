"""The exported model: a folder with weights, configuration, genes, graph and a model card.

No DeepSpeed needed.

    MODEL_DIR/model.safetensors   float32 weights
    MODEL_DIR/config.yaml         architecture (`model` section), value transform, format version
    MODEL_DIR/genes.tsv           gene order of the inputs
    MODEL_DIR/gene_graph.npz      the gene graph, when the architecture has one
    MODEL_DIR/provenance.json     corpus, graph and gene hashes, step, commit, versions
    MODEL_DIR/README.md           model card

`python -m sclong_ds export` writes it (`sclong_ds.checkpoint`), `sclong_ds.load_model` reads it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sclong_ds.config import ModelConfig, read_yaml, section_from_dict, to_dict
from sclong_ds.files import sync_tree
from sclong_ds.genes import GeneVocabulary
from sclong_ds.graph_file import read_gene_graph
from sclong_ds.model.sclong import ScLong, Transform

FORMAT = "sclong_ds-model"
VERSION = 1


def write_model_dir(
    out: Path,
    *,
    weights: Mapping[str, Tensor],
    model: ModelConfig,
    transform: Transform,
    redraw_index: int,
    genes: Path,
    graph: Path | None,
    provenance: Mapping[str, Any],
) -> None:
    """Write an exported model; the folder appears whole or not at all.

    Args:
        out: Folder to make; it must not exist.
        weights: State dict of `ScLong`.
        model: Architecture.
        transform: From counts to model input.
        redraw_index: Which draw of the random features the weights belong to.
        genes: genes.tsv of the training corpus.
        graph: The gene graph's npz, or None.
        provenance: What the model was trained from.

    Raises:
        FileExistsError: `out` exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists: give another --out or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_file(plain, partial / "model.safetensors", metadata={"format": "pt"})
        shutil.copyfile(genes, partial / "genes.tsv")
        if graph is not None:
            shutil.copyfile(graph, partial / "gene_graph.npz")
        config = _description(model, transform, redraw_index, partial)
        n_parameters = sum(t.numel() for t in plain.values())
        texts = {
            "config.yaml": yaml.safe_dump(config, sort_keys=False),
            "provenance.json": json.dumps(dict(provenance), indent=2) + "\n",
            "README.md": model_card(config, provenance, n_parameters=n_parameters),
        }
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        sync_tree(partial)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _description(
    model: ModelConfig, transform: Transform, redraw_index: int, folder: Path
) -> dict[str, Any]:
    """Return the content of config.yaml for a folder that holds the genes and the graph."""
    genes = GeneVocabulary.read(folder / "genes.tsv")
    graph = "gene_graph.npz" if (folder / "gene_graph.npz").is_file() else None
    return {
        "format": FORMAT,
        "version": VERSION,
        "n_genes": len(genes),
        "genes_hash": genes.hash,
        "transform": asdict(transform),
        "redraw_index": redraw_index,
        "model": to_dict(model) | {"gene_graph": graph, "gene_vectors": None},
    }


def load_model(model_dir: str | Path, *, device: str | torch.device = "cpu") -> ScLong:
    """Load an exported model in evaluation mode.

    Args:
        model_dir: Folder written by `python -m sclong_ds export`.
        device: Where the model goes.

    Returns:
        The model, float32, with `genes` (GeneVocabulary) and `transform` (Transform) set.

    Raises:
        FileNotFoundError: Not there, or a file is missing.
        ValueError: A damaged file, another format version, or files that do not belong together.
    """
    folder = Path(model_dir)
    for name in ("config.yaml", "genes.tsv", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is no exported model ({name} is missing): make one with "
                f"`python -m sclong_ds export CHECKPOINT_DIR --out MODEL_DIR`"
            )
    config = read_yaml(folder / "config.yaml")
    if config.get("format") != FORMAT or config.get("version") != VERSION:
        raise ValueError(
            f"{folder}/config.yaml: format {config.get('format')} version {config.get('version')}; "
            f"this version reads {FORMAT} {VERSION}"
        )
    genes = GeneVocabulary.read(folder / "genes.tsv")
    if genes.hash != config["genes_hash"]:
        raise ValueError(
            f"{folder}/genes.tsv was changed: its hash is not the one in config.yaml; export again"
        )
    architecture = section_from_dict(ModelConfig, config["model"], f"{folder}/config.yaml")
    graph = None
    if architecture.gene_graph is not None:
        graph = read_gene_graph(folder / architecture.gene_graph, genes_hash=genes.hash)
    model = ScLong(architecture, n_genes=len(genes), graph=graph)
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{folder}/model.safetensors does not fit its config.yaml: {reason}"
        ) from None
    model.redraw_features(config["redraw_index"])
    model.genes = genes
    model.transform = section_from_dict(Transform, config["transform"], f"{folder}/config.yaml")
    return model.to(device).eval()


def model_card(
    config: Mapping[str, Any], provenance: Mapping[str, Any], *, n_parameters: int
) -> str:
    """Return the model card (Markdown).

    Args:
        config: Content of config.yaml.
        provenance: Content of provenance.json.
        n_parameters: Number of weights.
    """
    model, target_sum = config["model"], config["transform"]["target_sum"]
    stacks = "\n".join(
        f"| {name} | {model[name]['depth']} | {model[name]['heads']} x {model[name]['dim_head']} |"
        for name in ("large_encoder", "mini_encoder", "decoder")
    )
    facts = "\n".join(
        f"| {key} | {value} |" for key, value in provenance.items() if not isinstance(value, dict)
    )
    validation = provenance.get("validation") or {}
    scores = "\n".join(f"| {key} | {value:.4f} |" for key, value in validation.items())
    return f"""# scLong-style single-cell model

{n_parameters:,} parameters over {config["n_genes"]:,} human genes,
trained with sclong_ds to reconstruct masked expression values.

## Use

```python
import sclong_ds
model = sclong_ds.load_model("MODEL_DIR")
predicted = model(x)        # (B, {config["n_genes"]}) values
vectors = model.encode(x)   # (B, {config["n_genes"]}, {model["base_dim"]})
```

or `python -m sclong_ds embed MODEL_DIR cells.h5ad --out embedded.h5ad`.

Input: raw counts in the order of genes.tsv, transformed by log1p({target_sum:g} * count / total),
where the total is over these genes. `embed` takes raw counts and does this itself.

## Architecture

| stack | layers | heads x width |
|---|---|---|
{stacks}

Base width {model["base_dim"]}, large width {model["large_dim"]}, {model["top_seq_len"]} genes
in the large encoder, gene encoder: {model["gene_encoder"]}.

## Training

| | |
|---|---|
{facts}

{"## Validation" if scores else ""}

{"| figure | value |" if scores else ""}
{"|---|---|" if scores else ""}
{scores}
"""
