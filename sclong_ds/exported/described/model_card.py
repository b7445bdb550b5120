"""The model card, with the front matter that the hub reads, and config.json beside it.

text = model_card(config, provenance, n_parameters=...)
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from sclong_ds.datasheet.citations import COLUMNS, UNKNOWN, doi_address, table
from sclong_ds.exported.recipe_file import ChosenRecipe
from sclong_ds.model.pooling import MEAN
from sclong_ds.page.words import counted
from sclong_ds.run_folder.metric_names import MSE, N_CELLS, N_HIDDEN
from sclong_ds.run_folder.rows import sentence

CONFIG = "config.json"
_MAX_NAMED = 20
"""Datasets in the card; provenance.json names all."""
_FENCE = "---\n"


def model_card(
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    *,
    n_parameters: int,
    chosen: ChosenRecipe | None = None,
) -> str:
    """Return the model card (Markdown).

    Args:
        config: Content of config.yaml.
        provenance: Content of provenance.json.
        n_parameters: Number of weights.
        chosen: The recipe of its embeddings; None: the mean over the expressed genes.
    """
    model, target_sum = config["model"], config["transform"]["target_sum"]
    imported = "imported_files" in provenance
    changed = "weights_changed_after" in provenance
    made = (
        "imported from a checkpoint of the released scLong code;\nsclong_ds did not train it."
        if imported
        else "trained with sclong_ds to reconstruct masked expression values."
    )
    head = front_matter("", licence=None, datasets=_dataset_names(provenance))
    return f"""{head}# scLong-style single-cell model

{n_parameters:,} parameters over {config["n_genes"]:,} genes (genes.tsv),
{made}
{_CHANGED if changed else ""}
## Use

```python
import sclong_ds
model = sclong_ds.load_model("MODEL_DIR")
predicted = model(x)        # (B, {config["n_genes"]}) values, if the gene is expressed
vectors = model.encode(x, genes=["CD3E", "CD19"])   # (B, 2, {model["base_dim"]})
```

or `python -m sclong_ds embed MODEL_DIR cells.h5ad --out embedded.h5ad`.

{_INTENDED}
`model(x)` is, for each gene, the value to expect given that the gene is expressed in the cell: only
expressed values were hidden and predicted in training. For a gene without counts it is not the
value of the cell, which is 0, and does not say whether the gene is expressed: do not use it as a
profile, to fill in zeros, or as the response to a perturbation.
{_ZERO_HEAD if model.get("zero_head") else ""}
Input: raw counts in the order of genes.tsv, transformed by log1p({target_sum:g} * count / total),
where the total is over these genes. `embed` takes raw counts and does this itself.

## Architecture

{_stacks(model)}

Base width {model["base_dim"]}, large width {model["large_dim"]}, {model["top_seq_len"]} genes
in the large encoder, gene encoder: {model["gene_encoder"]}.

{_fine_tuned(provenance)}{_embedding(chosen, scored=not changed)}
{_source(provenance) if imported else _training(provenance)}"""


_CHANGED = """
The weights were changed after export by code that this folder does not know. Training, cells and
the scores of the recipe below are those of the weights before.
"""
_INTENDED = """\
## Intended use

Research on cells of the species of genes.tsv: vectors to compare, to annotate with a head that is
fine-tuned and tested on donors of its own, to rank hypotheses. Not for diagnosis or treatment.

## Limits

Genes of other species, and counts that are no counts, are refused. Score it beside simple baselines
on your own cells before you rely on it (`python -m sclong_ds evaluate`); the figures below are of
its own validation cells.
"""
_ZERO_HEAD = """
`model.predict(x)` gives that chance (`expressed`), this value and their product (`expected`).
"""


def _stacks(model: Mapping[str, Any]) -> str:
    """Return the card's table of Performer stacks."""
    names = ("large_encoder", "mini_encoder", "decoder")
    rows = (
        (name, model[name]["depth"], f"{model[name]['heads']} x {model[name]['dim_head']}")
        for name in names
    )
    return table(("stack", "layers", "heads x width"), rows)


def _fine_tuned(provenance: Mapping[str, Any]) -> str:
    """Return the part of the card on what was fine-tuned; nothing for a model without a head."""
    facts = provenance.get("finetuned")
    if not facts:
        return ""
    what = {k: v for k, v in facts.items() if not isinstance(v, (dict, list)) and k != "verdict"}
    classes = f"Labels: {', '.join(facts['classes'])}.\n\n" if facts["classes"] else ""
    return (
        f"## Fine-tuned\n\n{facts['verdict']}.\n\n{classes}`embed` predicts "
        f"`{facts['label']}`.\n\n{table(('', ''), what.items())}\n"
    )


def _embedding(chosen: ChosenRecipe | None, *, scored: bool = True) -> str:
    """Return the part of the card on the recipe of an embedding, with its scores if they hold."""
    if chosen is None:
        return f"## Embedding\n\nOf a cell: {MEAN.text()}. No recipe was chosen.\n"
    facts, by = chosen.facts, chosen.facts["criterion"]
    # Not among the candidates where principal directions were asked for.
    mean = facts["candidates"].get(MEAN.text())
    text = (
        f"## Embedding\n\nOf a cell: {chosen.recipe.text()}.\n\n"
        f"Chosen among {len(facts['candidates'])} candidates (embedding.json) on "
        f"{facts['n_validation_cells']} validation cells by {by}; centres and scales are of "
        f"{facts['n_training_cells']} training cells. The best of many looks too good on the "
        "cells that chose it: `evaluate` it on others.\n"
    )
    if not scored:
        return text
    rows = [
        ("this recipe", f"{facts['score'][by]:.4f}"),
        ("the gene vectors alone, by the same weights", f"{facts['gene vectors alone'][by]:.4f}"),
    ]
    rows += [] if mean is None else [(MEAN.text(), f"{mean[by]:.4f}")]
    return f"{text}\n{table(('', by), rows)}"


def _training(provenance: Mapping[str, Any]) -> str:
    """Return the part of the card on training and validation."""
    facts = {k: v for k, v in provenance.items() if not isinstance(v, dict | list)}
    text = f"## Training\n\n{table(('', ''), facts.items())}{_trained_on(provenance)}"
    text += _data(provenance)
    found: Mapping[str, float] = provenance.get("validation") or {}
    if not found:
        return text
    scores = [
        (n, f"{v:,.0f}" if n in ("step", N_HIDDEN, N_CELLS) else f"{v:.4f}")
        for n, v in found.items()
    ]
    words = f"{_when(found, provenance)}{sentence(found)}.\n\n" if MSE in found else ""
    return f"{text}\n## Validation\n\n{words}{table(('figure', 'value'), scores)}"


def _when(found: Mapping[str, float], provenance: Mapping[str, Any]) -> str:
    """Return of which step a validation is; nothing in folders that do not record it."""
    if "step" not in found:
        return ""
    made, exported = int(found["step"]), provenance["step"]
    if made == exported:
        return f"Of step {made:,}: "
    return (
        f"No validation at step {exported:,}, which these weights are of. The last one before it, "
        f"of step {made:,}, is of other weights: "
    )


def _trained_on(provenance: Mapping[str, Any]) -> str:
    """Return the card's sentence on the training cells."""
    cells = provenance.get("training_cells")
    if not cells:
        return "\nThe folder does not tell which cells were in training.\n"
    names = cells["datasets"]
    more = f" and {len(names) - _MAX_NAMED} more" * (len(names) > _MAX_NAMED)
    return (
        f"\n{cells['n_digests']:,} distinct training cells of {counted(len(names), 'dataset')}: "
        f"{', '.join(names[:_MAX_NAMED])}{more}. `embed` and `evaluate` tell how many of the cells "
        f"that they are given are among them.\n"
    )


def _data(provenance: Mapping[str, Any]) -> str:
    """Return the card's table of the datasets: title, licence, version and publication."""
    datasets = provenance.get("training_data")
    if not datasets:
        return "\n## Data\n\nThe folder does not tell where the training cells come from.\n"
    found = Counter(d.get("licence", UNKNOWN) for d in datasets)
    counted = ", ".join(f"{name} ({n:,})" for name, n in found.most_common())
    rows = [
        (
            d["dataset_id"],
            f"{d['n_train_cells']:,}",
            *(d.get(name, UNKNOWN) for name in COLUMNS[:-1]),
            doi_address(d.get("doi", "")) or d.get("doi") or d.get("citation") or UNKNOWN,
        )
        for d in sorted(datasets, key=lambda d: -d["n_train_cells"])[:_MAX_NAMED]
    ]
    more = len(datasets) - len(rows)
    rest = f"\nAnd {more:,} more: `training_data` of provenance.json names all.\n" * (more > 0)
    return (
        f"\n## Data\n\nDatasets by licence: {counted}. Whoever uses the model cites them "
        f"and keeps to their licences.\n\n"
        f"{table(('dataset', 'training cells', *COLUMNS[:-1], 'publication'), rows)}{rest}"
    )


def _source(provenance: Mapping[str, Any]) -> str:
    """Return the part of the card on what was imported."""
    files = [(kind, *about.values()) for kind, about in provenance["imported_files"].items()]
    return f"## Source\n\n{table(('', 'file', 'bytes', 'sha256'), files)}"


def hub_config(config: Mapping[str, Any]) -> str:
    """Return config.json: by it the hub knows the library; config.yaml alone is read.

    Args:
        config: Content of config.yaml.
    """
    about = {"library_name": "sclong_ds", "model_type": "sclong", "architectures": ["ScLong"]}
    return json.dumps(about | dict(config), indent=2) + "\n"


def front_matter(card: str, *, licence: str | None, datasets: Sequence[str] = ()) -> str:
    """Return a model card with what the hub reads at its head; what a card has there stays.

    Args:
        card: Markdown.
        licence: Identifier; None leaves what the card says.
        datasets: Names of what the model was trained on.
    """
    about: dict[str, Any] = {"library_name": "sclong_ds"}
    if card.startswith(_FENCE):
        _, head, card = card.split(_FENCE, 2)
        about |= yaml.safe_load(head)
    else:
        about["tags"] = ["biology", "single-cell", "transcriptomics", "scRNA-seq"]
        if datasets:
            about["training_datasets"] = list(datasets)
    if licence is not None:
        about["license"] = licence
    return f"{_FENCE}{yaml.safe_dump(about, sort_keys=False)}{_FENCE}{card}"


def _dataset_names(provenance: Mapping[str, Any]) -> list[str]:
    """Return the names of the largest training datasets."""
    datasets = sorted(provenance.get("training_data") or [], key=lambda d: -d["n_train_cells"])
    return [str(dataset["dataset_id"]) for dataset in datasets[:_MAX_NAMED]]
